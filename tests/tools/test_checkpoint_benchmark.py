"""The benchmark of checkpoints runs, and its figures are those of what it measured."""

import json

import jax
import pytest
from etils import epath

from configs import quickstart
from sret_jax.tools.checkpoint_benchmark import Bench, Round, folder_bytes, measure, times
from sret_jax.training.experiment import open_experiment
from sret_jax.training.state import to_items
from tests.conftest import TINY_FLAGS, run_commands, run_python


@pytest.fixture
def experiment(tmp_path):
    config = quickstart.get_config()
    config.model.update(image_size=16, groups=((2, 2), (1, 1)), heads=(2, 4), dim=8)
    config.data.synthetic = True
    return open_experiment(config, epath.Path(tmp_path))


def test_the_figures_are_those_of_the_checkpoint_on_disk(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "steps", lambda self, number: None)  # the command below takes some
    report = measure(experiment, steps=2, rounds=1)
    newest = max((tmp_path / "checkpoints").iterdir(), key=lambda path: int(path.name))
    files = [path for path in newest.rglob("*") if path.is_file()]
    arrays = jax.tree.leaves(to_items(experiment.abstract_state))
    assert report["disk_bytes"] == sum(path.stat().st_size for path in files)
    assert report["array_bytes"] == sum(x.size * x.dtype.itemsize for x in arrays)
    assert report["disk_ratio"] == report["disk_bytes"] / report["array_bytes"]
    assert report["arrays"] == len(arrays)
    for name in ("call", "save", "save_cpu", "restore"):
        assert report[f"{name}_seconds"] > 0


def test_what_it_saves_is_the_whole_state(experiment):
    bench = Bench(experiment)
    bench.checkpoints.close()
    saved = jax.tree.leaves(to_items(bench.state))
    assert {id(x) for x in saved} == {id(x) for x in jax.tree.leaves(bench.state)}


def test_shares_are_of_a_hundred_steps_whatever_the_window():
    figures = times([Round(2.0, 2.5, 0.1, 1.0, 1.0, 1.0)] * 3, steps=10)
    assert figures["step_seconds"] == 0.2
    assert figures["stall_share"] == pytest.approx(0.5 / (100 * 0.2))
    assert figures["call_share"] == pytest.approx(0.1 / (100 * 0.2))


def test_bytes_are_counted_in_subfolders_too(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"1")
    (tmp_path / "a" / "b" / "two").write_bytes(b"22")
    assert folder_bytes(epath.Path(tmp_path)) == 3


def test_the_command_prints_a_table_and_leaves_no_checkpoints(tmp_path):
    folder, figures = tmp_path / "new", tmp_path / "figures.json"
    done = run_python(
        "-m",
        "sret_jax.tools.benchmark",
        "checkpoint",
        "--steps=2",
        "--rounds=1",
        f"--folder={folder}",
        f"--json={figures}",
        "--config.batch_size=8",
        *TINY_FLAGS,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(figures.read_text())
    assert report["step_seconds"] > 0
    assert report["batch_size"] == 8 and report["steps"] == 2
    assert "sret_t" in done.stdout and "of 100 steps: the goal of less than 5%" in done.stdout
    assert f"takes {report['disk_ratio']:.3f} times the bytes of its arrays" in done.stdout
    assert not folder.exists()


def test_a_folder_that_exists_is_not_deleted_and_numbers_are_checked(tmp_path):
    existing, printed = tmp_path / "existing", tmp_path / "printed"
    existing.mkdir()
    printed.mkdir()
    mistakes = {
        f"--folder={existing}": f"--folder={existing} exists",
        "--steps=0": "--steps=0 must be at least 1",
        "--config.nope=1": "unknown config field 'nope'",
    }
    commands = [["sret_jax.tools.benchmark", "checkpoint", flag] for flag in mistakes]
    for done, sentence in zip(run_commands(commands, printed), mistakes.values(), strict=True):
        assert done.returncode == 2 and sentence in done.stderr
    assert existing.exists()
