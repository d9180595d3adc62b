"""The checkpoint benchmark runs, and its figures follow from its measurements."""

import json

import jax
import pytest
from etils import epath

from sret_jax.benchmarks import checkpoint_benchmark
from sret_jax.benchmarks.checkpoint_benchmark import (
    Bench,
    Round,
    benchmark_checkpoint,
    folder_bytes,
    measure,
    times,
)
from sret_jax.training.experiment import open_experiment
from sret_jax.training.state import to_items
from tests.conftest import TINY_FLAGS, make_synthetic_config, run_commands, run_python


def test_the_figures_are_those_of_the_checkpoint_on_disk_which_is_deleted_at_the_end(
    tmp_path, monkeypatch, capsys
):
    folder, file = tmp_path / "new", tmp_path / "figures.json"
    seen = {}

    def measure_and_look(experiment, steps, rounds):
        report = measure(experiment, steps, rounds)
        newest = max((folder / "checkpoints").iterdir(), key=lambda path: int(path.name))
        seen["bytes"] = sum(p.stat().st_size for p in newest.rglob("*") if p.is_file())
        seen["arrays"] = jax.tree.leaves(to_items(experiment.abstract_state))
        return report

    monkeypatch.setattr(checkpoint_benchmark, "measure", measure_and_look)
    config = make_synthetic_config()
    benchmark_checkpoint(config, epath.Path(folder), steps=2, rounds=1, json_file=epath.Path(file))
    assert not folder.exists()

    report = json.loads(file.read_text())
    arrays = seen["arrays"]
    assert report["disk_bytes"] == seen["bytes"]
    assert report["array_bytes"] == sum(x.size * x.dtype.itemsize for x in arrays)
    assert report["disk_ratio"] == report["disk_bytes"] / report["array_bytes"]
    assert report["arrays"] == len(arrays)
    assert report["batch_size"] == config.batch_size and report["steps"] == 2
    for name in ("step", "call", "save", "save_cpu", "restore"):
        assert report[f"{name}_seconds"] > 0
    printed = capsys.readouterr().out
    assert "of 100 steps: the goal of less than 5%" in printed
    assert f"takes {report['disk_ratio']:.3f} times the bytes of its arrays" in printed


def test_what_it_saves_is_the_whole_state(tmp_path):
    bench = Bench(open_experiment(make_synthetic_config(), epath.Path(tmp_path)))
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


@pytest.mark.slow  # compiles for one device what the test above compiles for eight
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
