import contextlib

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from sret_jax.checkpoints import manager
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.checkpoints.reading import best_step, read_weights
from sret_jax.errors import UserError
from tests.conftest import save_evaluated

TREE = {"params": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
TARGET = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), TREE)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def save(workdir, scores, **settings):
    """Saves a checkpoint per score, reopening the manager each time as a restart does."""
    for step, top1 in scores.items():
        checkpoints = Checkpoints(workdir, **settings)
        checkpoints.save(step, {"model": TREE})
        if top1 is not None:
            checkpoints.record_metrics(step, {"top1": top1})
        checkpoints.close()


def steps(workdir):
    return {int(p.name) for p in (workdir / "checkpoints").iterdir()}


def test_latest_best_and_every_nth_are_kept_together_across_restarts(workdir):
    scores = {10: 0.2, 15: 0.9, 20: 0.3, 25: 0.1, 30: 0.4, 40: 0.5}
    save(workdir, scores, keep_latest=2, keep_best=1, keep_every=20)
    assert steps(workdir) == {15, 20, 30, 40}


def test_a_checkpoint_without_metrics_is_kept_while_newest_and_evicts_no_other(workdir):
    save(workdir, {10: 0.9, 20: 0.1, 30: 0.2, 33: None, 36: None}, keep_latest=2, keep_best=1)
    assert steps(workdir) == {10, 20, 30, 36}
    save(workdir, {40: 0.3}, keep_latest=2, keep_best=1)
    assert steps(workdir) == {10, 30, 40}


def test_metrics_added_later_count_at_once_and_after_a_restart(workdir):
    save(workdir, {1: 0.5, 2: None})
    for _ in range(2):
        with contextlib.closing(Checkpoints(workdir, keep_latest=2)) as checkpoints:
            if not checkpoints.is_evaluated(2):
                checkpoints.record_metrics(2, {"top1": 0.9})
            assert checkpoints.newest_evaluated(at_most=9) == 2
            assert checkpoints.newest_evaluated(at_most=1) == 1
    save(workdir, {3: 0.1, 4: 0.2}, keep_latest=1, keep_best=1)
    assert steps(workdir) == {2, 4}


def test_a_checkpoint_that_is_evaluated_replaces_those_it_outranks_at_once(workdir):
    with contextlib.closing(Checkpoints(workdir, keep_latest=1, keep_best=1)) as checkpoints:
        save_evaluated(checkpoints, 1, {"model": TREE}, 0.5)
        checkpoints.save(2, {"model": TREE})
        assert checkpoints.settle() and steps(workdir) == {1, 2}  # step 2 may yet prove bad
        assert checkpoints.best() == (1, 0.5)
        checkpoints.record_metrics(2, {"top1": 0.6})
        assert steps(workdir) == {2} and checkpoints.best() == (2, 0.6)
        save_evaluated(checkpoints, 3, {"model": TREE}, 0.6)
        assert checkpoints.best() == (3, 0.6)  # the newest of equals, which is the one kept
    assert steps(workdir) == {3}


def test_deleting_any_one_checkpoint_by_hand_breaks_nothing(workdir):
    for victim in (1, 2, 3):
        folder = workdir / str(victim)
        save(folder, {1: 0.9, 2: 0.5, 3: 0.1}, keep_latest=2, keep_best=1)
        (folder / "checkpoints" / str(victim)).rmtree()
        with contextlib.closing(Checkpoints(folder, keep_latest=2)) as checkpoints:
            assert checkpoints.restore_newest({"model": TARGET})[0] == (2 if victim == 3 else 3)
            save_evaluated(checkpoints, 4, {"model": TREE}, 0.2)
        assert steps(folder) == {1, 2, 3, 4} - {victim}


def test_what_a_failed_save_leaves_late_or_at_a_crash_is_gone_with_the_next_one(workdir):
    half = workdir / "checkpoints" / "1.orbax-checkpoint-tmp"
    half.mkdir(parents=True)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        assert not half.exists()
        (half / "model").mkdir(parents=True)  # as a writer does that outlived the failed save
        checkpoints.save(2, {"model": TREE})
        assert checkpoints.settle() and steps(workdir) == {2}


def test_a_new_best_replaces_the_old(workdir):
    save(workdir, {1: 0.5, 2: 0.6, 3: 0.1, 4: 0.2}, keep_latest=1, keep_best=1)
    assert steps(workdir) == {2, 4}


def test_deleting_the_best_under_an_open_run_lets_the_next_best_stay(workdir):
    with contextlib.closing(Checkpoints(workdir, keep_latest=1, keep_best=1)) as checkpoints:
        for step, top1 in {1: 0.5, 2: 0.9, 3: 0.1}.items():
            save_evaluated(checkpoints, step, {"model": TREE}, top1)
            checkpoints.settle()
        (workdir / "checkpoints" / "2").rmtree()
        save_evaluated(checkpoints, 4, {"model": TREE}, 0.05)
    assert steps(workdir) == {3, 4}


def test_weights_are_read_from_the_newest_checkpoint(workdir):
    save(workdir, {1: 0.5, 2: 0.6})
    step, weights = read_weights(workdir, TARGET)
    assert step == 2 and set(weights) == {"eval"}
    assert jnp.array_equal(weights["eval"]["params"]["kernel"], TREE["params"]["kernel"])


def test_a_folder_without_checkpoints_is_an_error(workdir):
    with pytest.raises(UserError, match="holds no checkpoints/"):
        read_weights(workdir, TARGET)
    (workdir / "checkpoints").mkdir()
    with pytest.raises(UserError, match="holds no readable checkpoint"):
        read_weights(workdir, TARGET)


@pytest.mark.parametrize("failures", [1, 99])
def test_storage_that_fails_to_read_is_asked_again_and_no_checkpoint_is_moved(
    failures, workdir, monkeypatch, capsys
):
    save(workdir, {1: 0.5, 2: 0.4})
    kernel = next((workdir / "checkpoints" / "2" / "model" / "d").iterdir())
    hidden = kernel.with_name("hidden")
    kernel.rename(hidden)
    kernel.mkdir()  # so that reading it is an error of the storage, not an absent file
    pauses = []

    def while_it_pauses(seconds):
        pauses.append(seconds)
        if len(pauses) == failures:
            kernel.rmdir()
            hidden.rename(kernel)

    monkeypatch.setattr(manager, "sleep", while_it_pauses)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        if failures == 1:
            assert checkpoints.restore_newest({"model": TARGET})[0] == 2
            assert pauses == [manager.RETRY_PAUSES[0]]
        else:
            with pytest.raises(UserError, match=r"step 2 .* cannot be read \(.*start again once"):
                checkpoints.restore_newest({"model": TARGET})
            assert pauses == list(manager.RETRY_PAUSES)
    assert "trying again in 1 s" in capsys.readouterr().out
    assert steps(workdir) == {1, 2}


def test_the_best_step_needs_an_evaluation(workdir):
    save(workdir, {1: None})
    with pytest.raises(UserError, match="was evaluated, so none is the best; name its step"):
        best_step(workdir)


def test_converted_weights_cannot_be_resumed_and_say_so(workdir):
    save(workdir, {0: None})
    with pytest.raises(UserError, match="no 'ema' item at step 0 .* train in another --workdir"):
        Checkpoints(workdir).restore_newest({"model": TARGET, "ema": TARGET})


def test_other_shapes_are_named(workdir):
    save(workdir, {1: 0.5})
    other = {"params": {"kernel": jax.ShapeDtypeStruct((3, 3), jnp.float32)}}
    with pytest.raises(UserError, match=r"params/kernel is \(2, 3\) there, \(3, 3\) here"):
        Checkpoints(workdir).restore_newest({"model": other})
