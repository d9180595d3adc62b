import os
import signal

import pytest

from sret_jax.parallel.preemption import SIGNALS, Preempted, Preemption


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_seen_at_the_next_check_and_not_before(number, capfd):
    before = {n: signal.getsignal(n) for n in SIGNALS}
    with Preemption() as preemption:
        preemption.check()
        os.kill(os.getpid(), number)
        with pytest.raises(Preempted):
            preemption.check()
        assert signal.getsignal(signal.SIGINT) == before[signal.SIGINT]
        os.kill(os.getpid(), signal.SIGTERM)  # once from a launcher, once from a service manager
    assert {n: signal.getsignal(n) for n in SIGNALS} == before
    assert f"{number.name}: stopping after this batch" in capfd.readouterr().out
