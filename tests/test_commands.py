"""The commands of the installed package: sret-jax COMMAND ARGUMENTS."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

import sret_jax
from sret_jax.__main__ import COMMANDS, EVAL, commands_help, main
from tests.conftest import FAST_COMPILE, ROOT, TINY_FLAGS, run_commands

PACKAGED = (
    "pyproject.toml",
    "requirements.txt",
    "README.md",
    "LICENSE",
    "configs",
    "results",
    "sret_jax",
)


def ended(capsys, monkeypatch, *arguments):
    """The output of a command, and its exit status."""
    monkeypatch.setattr(sys, "argv", ["sret-jax", *arguments])
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code or 0
    printed = capsys.readouterr()
    return status, printed.out + printed.err


def test_every_command_of_the_tools_is_listed_with_a_line():
    tools = (ROOT / "sret_jax" / "tools").glob("*.py")
    runnable = {f.stem for f in tools if "if __name__ ==" in f.read_text()} - {"exported"}
    assert set(COMMANDS) - {EVAL} == runnable
    listed = commands_help()
    for command in COMMANDS:
        assert re.search(rf"^  {command} +[A-Z].*\.$", listed, re.MULTILINE)


def test_a_mistake_is_one_sentence_and_the_help_calls_commands_as_they_were_called(
    capsys, monkeypatch
):
    assert ended(capsys, monkeypatch) == ended(capsys, monkeypatch, "--help")
    assert ended(capsys, monkeypatch, "--version") == (0, f"sret-jax {sret_jax.__version__}\n")
    status, said = ended(capsys, monkeypatch, "trian")
    assert status == 2 and "unknown command 'trian'; did you mean 'train'?" in said
    status, said = ended(capsys, monkeypatch, "convert", "a", "b", "--unslcd")
    assert status == 2 and "sret-jax convert: unknown flag '--unslcd'; did you mean" in said
    status, said = ended(capsys, monkeypatch, "plan", "--help")
    assert status == 0 and "sret-jax plan --config=sret_s --topology=v5e:16x16" in said
    assert "python -m" not in said and "main.py" not in said and "requirements-" not in said


@pytest.mark.parametrize(
    "command",
    [
        "-m sret_jax --help",
        "main.py --help",
        "-m sret_jax.tools.convert --help",
        "-m sret_jax.tools.models deit_tiny",
    ],
)
def test_a_command_ends_quietly_if_its_reader_has_left_as_head_does(command):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_training_and_evaluation_are_commands(tmp_path):
    (tmp_path / "printed").mkdir()
    commands = (
        ["sret_jax", "train", "--help"],
        ["sret_jax", "eval", f"--workdir={tmp_path}"],
        ["sret_jax", "train", "--config=nothing"],
    )
    told, nothing_there, no_config = run_commands(commands, tmp_path / "printed")
    assert told.returncode == 0 and "\nsret-jax train --config=sret_s" in told.stdout
    assert len(told.stdout.splitlines()) < 30 and "sret_lt, sret_s, sret_t:" in told.stdout
    assert nothing_there.returncode == 2 and "holds no checkpoints/" in nothing_there.stderr
    assert no_config.returncode == 2 and "unknown config 'nothing'" in no_config.stderr


@pytest.mark.slow  # builds the package and compiles a program, from another folder
def test_the_wheel_trains_and_evaluates_in_an_empty_folder(tmp_path, digits_dir):
    source, installed, empty = (tmp_path / name for name in ("source", "installed", "empty"))
    source.mkdir()
    empty.mkdir()
    for name in PACKAGED:  # elsewhere, as a build leaves folders behind
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name, **({"symlinks": True} if copy is shutil.copytree else {}))
    environment = {**os.environ, "XLA_FLAGS": FAST_COMPILE, "PYTHONPATH": str(installed)}

    def run(*command, folder=empty):
        done = subprocess.run(
            [str(word) for word in command],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    build = "from setuptools import build_meta; build_meta.build_sdist('.')"
    run(sys.executable, "-c", build, folder=source)
    (archive,) = source.glob("*.tar.gz")
    pip = (sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation")
    run(*pip, f"--target={installed}", archive)
    script = installed / "bin" / "sret-jax"
    data = f"--config.data.data_dir={digits_dir}"
    run(script, "train", *TINY_FLAGS, data, "--config.stop_at_step=2")
    run(script, "eval", "--workdir=runs/quickstart", "--json=evaluated.json")
    evaluated = json.loads((empty / "evaluated.json").read_text())
    trained = json.loads((empty / "runs" / "quickstart" / "result.json").read_text())
    assert evaluated["step"] == trained["step"] == 2 and evaluated["eval"] == trained["eval"]
    where = (
        "import sret_jax; print(sret_jax.__file__, sret_jax.get_config('finetune:sliced').epochs)"
    )
    assert run(sys.executable, "-c", where).startswith(str(installed))
