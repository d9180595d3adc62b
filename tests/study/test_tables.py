"""The tables of a study: means, spreads, paired differences, and what is missing or differs."""

import json
import math
import subprocess
import sys

import pytest

from sret_jax.config_files import get_config
from sret_jax.study.records import Record
from sret_jax.study.tables import compare
from sret_jax.tools.study import main
from tests.conftest import ROOT, refusal
from tests.study.tiny import write_study

MACHINE = dict(processor="A CPU", cores=1, runs_at_once=2, jax="0.10.2")


@pytest.fixture
def results(tmp_path):
    """The evidence of three arms: 40, 50, 60%; then 1, 2, 3 points better; then 5 worse."""
    config = write_study(tmp_path)
    accuracies = {"once": (40, 50, 60), "twice": (41, 52, 63), "thrice": (35, 45.1, 54.9)}
    for arm, values in accuracies.items():
        for seed, top1 in enumerate(values):
            write_record(config, tmp_path / "results", arm, seed, top1)
    return tmp_path / "results"


def write_record(config, results, arm, seed, top1):
    folder = results / arm / str(seed)
    folder.mkdir(parents=True)
    settings = get_config(f"{config}:{arm}")
    settings.seed = seed
    (folder / "config.json").write_text(json.dumps(settings.to_dict()))
    result = {
        **dict(arm=arm, seed=seed, eval={"top1": 0.99}, eval_ema={"top1": top1 / 100}),
        **dict(parameters=12_345, macs=6_700_000, compile_seconds=9.0),
        **dict(
            wall_seconds=1800, devices="1 x cpu", machine=MACHINE, data="cifar10 in a class folder"
        ),
        "images": {"train": {"images": 10_000}, "eval": {"images": 500}},
    }
    (folder / "result.json").write_text(json.dumps(result))


def table(results, capsys, *arguments):
    main([f"--config={results.parent / 'tiny.py'}", f"--results={results}", "--table", *arguments])
    return capsys.readouterr().out


def test_a_table_has_means_spreads_and_paired_differences_with_their_verdict(results, capsys):
    printed = table(results, capsys)
    for row in (
        "| **`once`** | 12,345 | 6.70 | - | 3 | 50.00 ± 10.00 |  |  |",
        "| `twice` | 12,345 | 6.70 | - | 3 | 52.00 ± 11.00 | +2.00 (-0.48 to +4.48, n = 3) | "
        "no difference seen |",
        "| `thrice` | 12,345 | 6.70 | - | 3 | 45.00 ± 9.95 | -5.00 (-5.25 to -4.75, n = 3) | "
        "worse |",
    ):
        assert row in printed
    what = "**Miniature: cifar10 in a class folder, 16 pixels, small models.**"
    assert f"### Recursion helps\n\n{what} The paper: about 2%.\n\n| arm |" in printed
    assert f"{what} There are 10,000 training and 500 test images." in printed
    assert (
        "9 runs, 4.5 hours in all: 2 runs at once, each on 1 core of A CPU, jax 0.10.2." in printed
    )
    assert "| `taught` | - | - | - | - | - | - | not trained |" in printed
    assert "other settings" not in printed


def test_times_of_steps_are_those_of_the_baseline_and_multiples_of_it(results, capsys):
    spread = dict(median=2.0, least=1.5, largest=2.25)
    times = dict(seconds={**spread, "median": 0.0674}, relative=spread)
    arms = {
        "once": {**times, "settings": {"batch_size": 8, "model": {"loops": 1}}},
        "twice": {**times, "settings": {"batch_size": 8, "model": {"loops": 2}}},
    }
    timed = {"processor": "A CPU", "devices": "1 x cpu", "cores": 2, "load": 0.5, "arms": arms}
    (results / "times.json").write_text(json.dumps({"once": timed}))
    printed = table(results, capsys)
    assert "Train steps were timed on A CPU (2 cores, load 0.5)." in printed
    assert "| **`once`** | 12,345 | 6.70 | 67 ms | 3 |" in printed
    assert "| `twice` | 12,345 | 6.70 | 2.00 times (1.50 to 2.25) | 3 |" in printed
    assert "| `thrice` | 12,345 | 6.70 | - | 3 |" in printed
    arms["twice"]["settings"]["batch_size"] = 16  # before the config changed
    (results / "times.json").write_text(json.dumps({"once": timed}))
    assert "67 ms" not in table(results, capsys)
    (results / "times.json").write_text(json.dumps({"once": {"arms": {"once": {}}}}))
    arguments = [f"--config={results.parent / 'tiny.py'}", f"--results={results}", "--table"]
    assert "times.json is damaged" in refusal(capsys, main, *arguments)


def test_arms_are_paired_by_the_seeds_that_both_have(results, capsys):
    config = results.parent / "tiny.py"
    write_record(config, results, "taught", 1, 53)
    write_record(config, results, "taught", 7, 99)
    assert "+3.00 (one seed) | - |" in table(results, capsys)
    for file in (results / "taught" / "1").iterdir():
        file.unlink()
    assert "| 1 | 99.00 | - | - |" in table(results, capsys)


def test_equal_runs_show_no_difference():
    runs = {seed: Record("x", seed, {"eval_ema": {"top1": 0.5}}, {}) for seed in range(3)}
    difference = compare(runs, runs)
    assert difference[:3] == (0.0, 0.0, 0.0) and difference.verdict == "no difference seen"
    alone = compare(runs, {0: runs[0]})
    assert math.isnan(alone.low) and alone.verdict == "-"


def test_runs_whose_settings_the_config_has_no_more_are_named(results, capsys):
    file = results / "twice" / "2" / "config.json"
    settings = json.loads(file.read_text())
    settings["optim"]["lr_per_512"] = 0.5
    file.write_text(json.dumps(settings))
    printed = table(results, capsys)
    assert "**1 runs have other settings than " in printed
    assert "twice/2 (optim.lr_per_512 was 0.5, is 0.0005)." in printed


def test_damaged_evidence_and_a_config_that_is_no_study_are_one_sentence(results, capsys):
    (results / "once" / "0" / "result.json").write_text("{")
    arguments = [f"--config={results.parent / 'tiny.py'}", f"--results={results}", "--table"]
    assert "once/0 is damaged" in refusal(capsys, main, *arguments)
    sentence = refusal(capsys, main, "--config=quickstart", "--table")
    assert "'quickstart' has no ARMS and CLAIMS and CLASSES" in sentence


def test_documents_get_tables_between_their_markers_and_pictures(results, capsys):
    docs = results.parent / "docs"
    sentence = refusal(capsys, main, f"--config={results.parent / 'tiny.py'}", f"--docs={docs}")
    assert "tiny.md needs the lines '<!-- tables: written by tools.study -->'" in sentence
    docs.mkdir()
    text = (
        "Before.\n<!-- tables: written by tools.study -->\nstale\n<!-- end of tables -->\nAfter.\n"
    )
    (docs / "tiny.md").write_text(text)
    arguments = [f"--config={results.parent / 'tiny.py'}", f"--results={results}"]
    for _ in range(2):
        main([*arguments, f"--docs={docs}"])
        written = (docs / "tiny.md").read_text()
        assert written.startswith("Before.\n<!--") and written.endswith("-->\nAfter.\n")
        assert "stale" not in written and written.count("50.00 ± 10.00") == 2
    assert "| worse |\n\n![Recursion helps](tiny_loops.png)\n\n### Soft labels help" in written
    assert (docs / "tiny_loops.png").read_bytes().startswith(b"\x89PNG")
    assert {file.name for file in docs.iterdir()} == {"tiny.md", "tiny_loops.png"}


def test_the_tables_need_no_jax():
    program = "import sys, sret_jax.tools.study; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
