"""What a run goes on from: the newest checkpoint that can be read, and only one of its own."""

import pathlib
import shutil

import pytest
from etils import epath

from sret_jax.checkpoints.manager import CHECKPOINTS, SET_ASIDE
from sret_jax.errors import UserError
from sret_jax.training import loop
from sret_jax.training.checkpoint_evaluation import evaluate_checkpoint
from tests.conftest import read_metrics


@pytest.fixture
def two_checkpoints(tiny_config, tmp_path):
    """A workdir with the checkpoints of steps 3 and 6, and its config."""
    tiny_config.epochs = 6 * 64 / 1438
    tiny_config.checkpoint.every_epochs = 3 * 64 / 1438
    workdir = epath.Path(tmp_path)
    loop.train(tiny_config, workdir)
    assert {p.name for p in (workdir / CHECKPOINTS).iterdir()} == {"3", "6"}
    return tiny_config, workdir


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
    config.model.groups = ((4, 2), (1, 1))
    with pytest.raises(UserError, match=r"trained with another model \(model.groups: "):
        loop.train(config, workdir)


def test_a_checkpoint_of_another_architecture_is_an_error_that_names_the_arrays(two_checkpoints):
    config, workdir = two_checkpoints
    config.model.mlp_ratio = 3.0
    with pytest.raises(UserError, match=r"another architecture .*mlp/fc1/bias is \(32,\) there"):
        loop.train(config, workdir)
    with pytest.raises(UserError, match="another architecture"):
        evaluate_checkpoint(config, workdir)
    assert {p.name for p in (workdir / CHECKPOINTS).iterdir()} == {"3", "6"}


def test_a_workdir_copied_elsewhere_goes_on_there(two_checkpoints, tmp_path_factory):
    config, workdir = two_checkpoints
    copy = epath.Path(tmp_path_factory.mktemp("copy") / "run")
    shutil.copytree(workdir, copy)
    shutil.rmtree(copy / CHECKPOINTS / "6")
    result = loop.train(config, copy)
    assert result["step"] == 6
