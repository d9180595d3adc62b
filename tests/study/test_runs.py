"""Runs of a study: what they train, that they go on after an interruption, and their evidence."""

import json
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from sret_jax.study.design import Place, Study
from sret_jax.study.evidence import thinned
from sret_jax.study.runs import labels_command, train_command, train_runs
from sret_jax.tools.study import main
from tests.conftest import FAST_COMPILE, ROOT, refusal
from tests.study.tiny import write_images, write_study


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The tiny study; the paths of its runs are relative to its folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)
    return Study.read(str(write_study(tmp_path)))


@pytest.fixture
def place(tmp_path):
    return Place("runs/tiny", {"data.name": str(write_images(tmp_path))})


def test_all_arms_come_with_seed_0_first_and_a_teacher_has_one_seed(study):
    assert study.select(["labels"]) == ["once", "taught", "stored", "teacher"]
    assert study.select(["taught", "loops"]) == ["once", "taught", "twice", "thrice", "teacher"]
    assert study.select([]) == list(study.arms)
    runs = study.runs(["once", "teacher"], 3)
    assert runs == [("once", 0), ("teacher", 0), ("once", 1), ("once", 2)]


def test_a_run_s_command_has_only_settings_that_its_config_lacks(study):
    usual = Place("runs/tiny", {})
    config = f"--config={study.config}"
    assert train_command(study, usual, "taught", 1) == [
        *(f"{config}:taught", "--config.seed=1", "--workdir=runs/tiny/taught/1")
    ]
    elsewhere = Place("x", {"data.name": "images"})
    assert train_command(study, elsewhere, "stored", 0) == [
        *(f"{config}:stored", "--config.seed=0", "--config.data.name=images"),
        *("--config.data.soft_labels=x/labels", "--workdir=x/stored/0"),
    ]
    assert "--config.teacher=x/teacher/0" in train_command(study, elsewhere, "taught", 0)
    assert labels_command(study, elsewhere, "stored") == [
        *("generate", f"{config}:stored", "--config.data.name=images"),
        *("--teacher=x/teacher/0", "--crops=2", "--keep=full", "--out=x/labels"),
    ]


def test_a_run_leaves_evidence_without_paths_and_is_not_trained_again(
    study, place, tmp_path, capsys
):
    results = epath.Path(tmp_path / "results")
    assert train_runs(study, place, [("once", 0)], results, 1) == ([], False)
    said = capsys.readouterr().out
    assert "1 runs: 0 finished before, 1 to train.\n1 at once, each on " in said
    assert "once/0: top-1 " in said and "; 1 of 1 runs done, about 0s left" in said
    folder = results / "once" / "0"
    assert {file.name for file in folder.iterdir()} == {
        *("config.json", "result.json", "metrics.jsonl")
    }
    assert not [file.name for file in folder.iterdir() if str(tmp_path) in file.read_text()]
    result = json.loads((folder / "result.json").read_text())
    assert result["data"] == "cifar10 in a class folder" and result["step"] == 4
    assert result["images"]["train"]["images"] == 16 and result["parameters"] > 1000
    assert result["macs"] > 10_000 and result["step_seconds"] > 0
    assert result["wall_seconds"] > result["compile_seconds"] + result["train_seconds"]
    assert result["machine"]["jax"] and result["machine"]["runs_at_once"] == 1

    (folder / "result.json").unlink()  # is written again from the workdir
    assert train_runs(study, place, [("once", 0)], results, 1) == ([], False)
    assert capsys.readouterr().out == "1 runs: 1 finished before, 0 to train.\n"
    assert json.loads((folder / "result.json").read_text()) == result

    for file in pathlib.Path("runs/tiny/once/0").rglob("*.json"):  # the machine was lost
        file.unlink()
    assert train_runs(study, place, [("once", 0)], results, 1) == ([], False)
    assert capsys.readouterr().out == "1 runs: 1 finished before, 0 to train.\n"


def test_a_run_that_was_begun_with_other_settings_is_refused(study, place, tmp_path, capsys):
    begun = pathlib.Path(place.workdir("once", 2))
    begun.mkdir(parents=True)
    settings = place.config(study, "once", 2)
    settings.optim.lr_per_512 = 0.5
    (begun / "config.json").write_text(json.dumps(settings.to_dict()))
    arguments = (f"--config={study.config}", f"--data={place.data['data.name']}", "--arms=once")
    sentence = refusal(capsys, main, *arguments)
    assert "once/2 (optim.lr_per_512 was 0.5, is 0.0005); remove these folders" in sentence


def test_unknown_arms_and_no_seeds_are_one_sentence(study, capsys):
    arguments = [f"--config={study.config}", "--arms=onse"]
    assert "unknown arm or claim 'onse'; did you mean 'once'?" in refusal(capsys, main, *arguments)
    assert "--seeds=0" in refusal(capsys, main, f"--config={study.config}", "--seeds=0")


def test_metrics_are_thinned_but_keep_evaluations_and_the_last_report():
    lines = [{"step": s, "loss": 1 / s, "bad_images": 0.0} for s in range(1, 101)]
    lines.append({"step": 100, "eval/top1": 0.123456789, "eval/top5": 1.0})
    kept = thinned(lines)
    assert kept[-2:] == [{"step": 100, "loss": 0.01}, {"step": 100, "eval/top1": 0.123457}]
    assert len(kept) == 35 and thinned([]) == []


@pytest.mark.slow  # starts ten processes
def test_a_study_goes_on_after_an_interruption_and_past_a_run_that_fails(study, place, tmp_path):
    """Labels are stored once their teacher is trained; what fails ends nothing else."""
    arguments = ("--arms=labels", "--seeds=1", "--jobs=2", f"--data={place.data['data.name']}")
    command = [sys.executable, "-m", "sret_jax.tools.study", f"--config={study.config}", *arguments]
    log = pathlib.Path(place.workdir("once", 0)) / "log.txt"
    started = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    while not (log.exists() and "Compiling" in log.read_text()):
        time.sleep(0.05)
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    said, _ = started.communicate()
    assert started.returncode == 75 and "Stopped as asked; the same command continues." in said

    config = pathlib.Path(study.config)  # asks for more crops than are stored
    config.write_text(config.read_text().replace('crops_per_image": 2', 'crops_per_image": 4'))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "labels of stored: stored in " in done.stdout
    assert "1 runs failed: stored/0" in done.stdout
    assert "stored/0: FAILED with status 2: Error: " in done.stdout
    folder = tmp_path / "results" / "tiny"
    assert {file.parent.parent.name for file in folder.glob("*/0/result.json")} == {
        *("once", "taught", "teacher")
    }


@pytest.mark.slow  # compiles six programs
def test_train_steps_are_timed_once_for_each_baseline(study, capsys):
    arguments = (f"--config={study.config}", "--times")
    main(arguments)
    assert capsys.readouterr().out == "Timed: once, twice, thrice\n"
    times = json.loads(pathlib.Path("results/tiny/times.json").read_text())["once"]
    assert times["arms"]["once"]["relative"] == {"median": 1.0, "least": 1.0, "largest": 1.0}
    assert times["arms"]["thrice"]["seconds"]["least"] > 0
    main(arguments)
    assert capsys.readouterr().out == ""
