"""A run resumes from its newest readable checkpoint, and only from its own."""

import copy
import json
import pathlib
import shutil

import pytest
from etils import epath

from sret_jax.checkpoints.manager import CHECKPOINTS, SET_ASIDE
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.run import loop
from sret_jax.run.data_record import DATA_FILE
from tests.conftest import make_tiny_config, read_metrics


def epochs(steps):
    return steps * 64 / 1438


@pytest.fixture(scope="module")
def trained(digits_dir, tmp_path_factory):
    """A workdir with the checkpoints of steps 3 and 6, and its config."""
    config = make_tiny_config(digits_dir)
    config.epochs = epochs(6)
    config.optim.warmup_epochs = 0.0
    config.checkpoint.every_epochs = epochs(3)
    workdir = epath.Path(tmp_path_factory.mktemp("trained"))
    loop.train(config, workdir)
    assert {p.name for p in (workdir / CHECKPOINTS).iterdir()} == {"3", "6"}
    return config, workdir


@pytest.fixture
def two_checkpoints(trained, tmp_path):
    """A copy of `trained`, which a test may change."""
    config, workdir = trained
    return copy.deepcopy(config), epath.Path(shutil.copytree(workdir, tmp_path / "run"))


def truncate_arrays(step_dir):
    for file in pathlib.Path(step_dir / "model").glob("**/d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(step_dir):
    step_dir.rmtree()
    step_dir.mkdir()


@pytest.mark.parametrize("damage", [truncate_arrays, empty])
def test_a_damaged_newest_checkpoint_is_moved_aside_and_the_one_before_taken(
    damage, two_checkpoints, capfd
):
    config, workdir = two_checkpoints
    expected = read_metrics(workdir)
    damage(workdir / CHECKPOINTS / "6")
    result = loop.train(config, workdir)
    output = capfd.readouterr().out
    assert result["step"] == 6
    assert "checkpoint of step 6 cannot be read" in output
    assert "trying the one before it" in output and "at step 3" in output
    assert (workdir / SET_ASIDE / "6.0").exists()
    assert read_metrics(workdir) == pytest.approx(expected, rel=1e-6)


def test_when_no_checkpoint_can_be_read_nothing_is_moved_and_nothing_starts_over(two_checkpoints):
    config, workdir = two_checkpoints
    before = (workdir / "metrics.jsonl").read_text()
    for step in ("3", "6"):
        empty(workdir / CHECKPOINTS / step)
    with pytest.raises(UserError, match=r"none of the checkpoints \[6, 3\] .* can be read"):
        loop.train(config, workdir)
    assert {p.name for p in (workdir / CHECKPOINTS).iterdir()} == {"3", "6"}
    assert (workdir / "metrics.jsonl").read_text() == before


def test_another_model_of_the_same_shapes_is_refused(two_checkpoints):
    config, workdir = two_checkpoints
    for name, value in (("groups", ((4, 2),)), ("permutation", "identity")):
        changed = copy.deepcopy(config)
        changed.model[name] = value
        with pytest.raises(UserError, match=rf"trained with another model \(model.{name}: "):
            loop.train(changed, workdir)


def test_a_checkpoint_of_another_architecture_is_an_error_that_names_the_arrays(two_checkpoints):
    config, workdir = two_checkpoints
    config.model.mlp_ratio = 3.0
    with pytest.raises(UserError, match=r"another architecture .*mlp/fc1/bias is \(64,\) there"):
        loop.train(config, workdir)
    with pytest.raises(UserError, match=r"another architecture .*mlp_ratio is 2.0 there, 3.0"):
        evaluate_checkpoint(config, workdir)
    assert {p.name for p in (workdir / CHECKPOINTS).iterdir()} == {"3", "6"}


def test_a_workdir_copied_elsewhere_goes_on_there(two_checkpoints, tmp_path_factory):
    config, workdir = two_checkpoints
    copy = epath.Path(tmp_path_factory.mktemp("copy") / "run")
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / CHECKPOINTS / "6")
    result = loop.train(config, copy)
    assert result["step"] == 6


def test_another_batch_size_is_refused_for_all_is_counted_in_batches(two_checkpoints):
    config, workdir = two_checkpoints
    config.batch_size = 128
    with pytest.raises(UserError, match=r"batches of 64 to step 6.*keep 64.*grad_accum=N"):
        loop.train(config, workdir)


def test_fewer_epochs_than_were_trained_are_refused(two_checkpoints):
    config, workdir = two_checkpoints
    config.epochs = epochs(4)
    with pytest.raises(UserError, match="ends at step 4, and .* is at step 6 already; give more"):
        loop.train(config, workdir)


def test_other_numbers_of_images_are_said_with_the_schedule_that_follows(two_checkpoints, capfd):
    config, workdir = two_checkpoints
    record = json.loads((workdir / DATA_FILE).read_text())
    record["train"]["images"] = 1678  # 7 steps in as many epochs
    (workdir / DATA_FILE).write_text(json.dumps(record))
    loop.train(config, workdir)
    said = capfd.readouterr().out
    assert "1,678 at the last start, 1,438 now" in said
    assert "The schedule ends at step 6, where it was 7; the learning rate of step 7 is" in said


def test_what_has_changed_and_what_follows_is_said_last_before_the_first_step(
    two_checkpoints, capfd
):
    config, workdir = two_checkpoints
    config.epochs = epochs(12)
    config.seed = 1
    config.stop_at_step = 7
    assert loop.train(config, workdir)["step"] == 7
    lines = capfd.readouterr().out.splitlines()
    compiled = next(i for i, line in enumerate(lines) if line.startswith("Compiled in"))
    first_step = next(i for i, line in enumerate(lines) if line.startswith("step 7/12"))
    said = lines[compiled + 1 : first_step]
    assert said[0] == "These settings change from step 7 on:"
    assert said[1].startswith(f"  epochs: {epochs(6)} -> {epochs(12)}")
    assert said[2].startswith("  seed: 0 -> 1 (later images come in another order")
    assert said[3].startswith("  stop_at_step: None -> 7")
    rate = float(lines[first_step].partition("  lr ")[2].split()[0])
    assert said[4] == (
        f"The schedule ends at step 12, where it was 6; the learning rate of step 7 is {rate:.2e}, "
        "where it was 1.00e-05."
    )
    assert len(said) == 5
