from sret_jax.exit_status import HUNG
from sret_jax.run.watchdog import Watchdog
from tests.conftest import run_python

HANG = """
import threading, time
from sret_jax.run.watchdog import Watchdog

def a_thread_that_waits(): time.sleep(60)

threading.Thread(target=a_thread_that_waits, daemon=True).start()
with Watchdog(factor=2.0, least_seconds=1.0, stop_seconds=4.0) as watchdog:
    for _ in range(3):
        time.sleep(0.1)
        watchdog.beat(step=True)
    time.sleep(60)
"""


def test_a_hang_prints_all_stacks_once_and_ends_the_process_with_its_own_status():
    done = run_python("-c", HANG)
    assert done.returncode == HUNG
    assert done.stderr.count("a_thread_that_waits") == 1
    assert done.stderr.count("What its threads are doing") == 1
    assert "resume from the newest checkpoint" in done.stderr


RESTORING_HANGS = """
import time
from sret_jax.run.watchdog import Watchdog

with Watchdog(factor=2.0, least_seconds=0.2, stop_seconds=2.0) as watchdog:
    watchdog.beat(step=True)
    with watchdog.during("restoring a checkpoint"):
        time.sleep(60)
"""


def test_what_has_no_steps_says_that_it_still_goes_on_and_ends_the_process_too():
    done = run_python("-c", RESTORING_HANGS)
    assert done.returncode == HUNG
    lines = [line for line in done.stderr.splitlines() if "Still restoring a checkpoint" in line]
    assert len(lines) > 2 and "raise config.watchdog.stop_seconds" in lines[-1]


def test_patience_is_that_for_starting_until_the_median_step_is_known():
    watchdog = Watchdog(factor=20.0, least_seconds=0.1, stop_seconds=1000.0)
    assert watchdog.patience == 1000
    watchdog.beat()
    assert watchdog.patience == 1000, "an evaluation is no step"
    watchdog.beat(step=True)
    assert watchdog.patience == 0.1
    with watchdog.during("compiling"):
        assert watchdog.patience == 1000
    assert Watchdog(1.0, 50.0, 10.0).patience == 10
