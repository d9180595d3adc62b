"""The train loop while something goes wrong."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import threading
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from sret_jax.checkpoints.manager import CHECKPOINTS
from sret_jax.checkpoints.reading import open_existing
from sret_jax.errors import UserError
from sret_jax.parallel.preemption import Preempted
from sret_jax.run import loop
from sret_jax.run.lock import locked
from sret_jax.run.rollback import ROLLBACKS_FILE
from tests.conftest import read_metrics


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path / "run")


def checkpoints(workdir):
    return {int(path.name) for path in (workdir / CHECKPOINTS).iterdir()}


def epochs(steps):
    return steps * 64 / 1438


def when(condition, action):
    """Calls the action, in a thread, as soon as the condition holds."""

    def wait():
        while not condition():
            time.sleep(0.002)
        action()

    threading.Thread(target=wait, daemon=True).start()


def ask_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def test_asked_to_stop_in_an_evaluation_it_saves_and_then_evaluates_what_it_saved(
    tiny_config, workdir
):
    tiny_config.epochs = epochs(8)
    tiny_config.checkpoint.every_epochs = epochs(4)
    tiny_config.eval_batch_size = 8  # so that an evaluation takes a while
    when(lambda: 4 in read_metrics(workdir), ask_to_stop)
    with pytest.raises(Preempted, match="Stopped as asked at step 4, which is saved"):
        loop.train(tiny_config, workdir)
    assert 4 not in read_metrics(workdir, "eval/top1"), "the signal came too late to test anything"

    tiny_config.stop_at_step = 5
    loop.train(tiny_config, workdir)
    assert sorted(read_metrics(workdir, "eval/top1")) == [4, 5]
    with contextlib.closing(open_existing(workdir)) as on_disk:
        assert [on_disk.is_evaluated(step) for step in (4, 5)] == [True, True]


def test_steps_that_are_not_finite_lead_back_to_the_last_good_checkpoint(
    tiny_config, workdir, capfd
):
    """An absurdly high initial warm-up rate makes only the first steps overflow."""
    tiny_config.epochs = epochs(16)
    tiny_config.checkpoint.every_epochs = epochs(6)
    tiny_config.optim.update(warmup_lr=1e30, warmup_epochs=epochs(9))
    tiny_config.rollback.update(bad_steps=3, most=5)
    loop.train(tiny_config, workdir)
    windows = json.loads((workdir / ROLLBACKS_FILE).read_text())["windows"]
    assert windows == [[1, 4], [1, 6], [7, 10]]
    assert sorted(read_metrics(workdir)) == [*range(11, 17)]
    assert "back to the weights of step 6" in capfd.readouterr().out
    assert checkpoints(workdir) == {12, 16}
    before = read_metrics(workdir)

    for step in checkpoints(workdir):
        (workdir / CHECKPOINTS / str(step)).rmtree()
    loop.train(tiny_config, workdir)  # from the start, over the windows at once
    assert json.loads((workdir / ROLLBACKS_FILE).read_text())["windows"] == windows
    assert read_metrics(workdir) == before


def test_a_streak_that_was_saved_at_its_limit_leads_back_at_the_next_start(
    tiny_config, workdir, capfd
):
    tiny_config.epochs = epochs(16)
    tiny_config.checkpoint.every_epochs = epochs(4)
    tiny_config.rollback.bad_steps = 3
    tiny_config.stop_at_step = 5
    loop.train(tiny_config, workdir)
    assert checkpoints(workdir) == {4, 5}
    items = workdir / CHECKPOINTS / "5" / "train"
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        train = checkpointer.restore(items)
        checkpointer.save(items, train | {"bad_streak": np.int32(3)}, force=True)
    tiny_config.stop_at_step = 6
    loop.train(tiny_config, workdir)
    assert json.loads((workdir / ROLLBACKS_FILE).read_text())["windows"] == [[1, 5]]


def test_a_run_that_keeps_diverging_ends_with_a_sentence_and_a_report(tiny_config, workdir):
    tiny_config.optim.update(lr_per_512=1e30, warmup_epochs=0.0)
    tiny_config.rollback.update(bad_steps=2, most=1)
    with pytest.raises(UserError, match=r"2 steps in a row .* after rollbacks from steps 1 to 3;"):
        loop.train(tiny_config, workdir)
    assert not checkpoints(workdir)
    (report,) = map(pathlib.Path, (workdir / "crash").iterdir())
    report = json.loads(report.read_text())
    assert report["losses"]["6"] == "nan"


def test_a_dead_loader_worker_ends_the_run_with_a_crash_report(tiny_config, workdir):
    tiny_config.data.workers = 1
    when(
        lambda: len(read_metrics(workdir)) >= 2,
        lambda: [worker.kill() for worker in multiprocessing.active_children()],
    )
    with pytest.raises(RuntimeError, match="terminated unexpectedly"):
        loop.train(tiny_config, workdir)
    (report,) = map(pathlib.Path, (workdir / "crash").iterdir())
    report = json.loads(report.read_text())
    assert report["step"] >= 2 and set(report["losses"]) >= {"1", "2"}
    assert len(report["batches"][-1]) == 64
    assert all(name.startswith("digits/1.0.0 train record ") for name in report["batches"][-1])
    assert report["config"]["batch_size"] == 64 and "jax" in report["versions"]
    assert "Traceback" in report["traceback"][0]


def test_a_second_run_in_the_workdir_is_refused_and_changes_nothing(tiny_config, workdir):
    workdir.mkdir()
    with locked(workdir):
        before = sorted(workdir.iterdir())
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
            loop.train(tiny_config, workdir)
        assert sorted(workdir.iterdir()) == before
