"""TensorFlow prepares data sets; nothing else imports it."""

import json

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.conftest import TINY_FLAGS, run_commands

SHADOW = """
import pathlib
with pathlib.Path({record!r}).open("a") as file:
    file.write("imported")
raise ImportError("TensorFlow is not to be imported")
"""


def commands_done(folder, *commands):
    """Commands where importing TensorFlow fails and is recorded, also in workers."""
    record, shadow = folder / "imported", folder / "shadow" / "tensorflow"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(SHADOW.format(record=str(record)))
    printed = folder / "printed"
    printed.mkdir()
    # On as many devices as in other tests, whose compiled programs it finds in the cache.
    done = run_commands(commands, printed, devices=8, path=[folder / "shadow"])
    for command in done:
        assert command.returncode == 0, (command.args, command.stdout, command.stderr)
        for line in (command.stdout + command.stderr).splitlines():
            assert "absl" not in line and "oneDNN" not in line and "Gloo" not in line
    assert not record.exists(), "TensorFlow was imported"


def train(run):
    return [
        *("main.py", f"--workdir={run}", *TINY_FLAGS),
        *("--config.stop_at_step=2", "--config.data.workers=1"),
    ]


def predict(run, folder):
    Image.fromarray(load_sample_image("flower.jpg")).save(folder / "flower.jpg")
    return ["sret_jax.tools.predict", f"--checkpoint={run}", str(folder / "flower.jpg")]


def test_digits_are_prepared_trained_on_evaluated_and_predicted(tmp_path):
    run = tmp_path / "workdir"
    commands_done(tmp_path, train(run), predict(run, tmp_path))
    result = json.loads((run / "result.json").read_text())
    assert result["step"] == 2
    assert list((run / "tensorboard").iterdir())


@pytest.mark.slow  # one more process for each command
def test_every_command_but_prepare_runs(tmp_path):
    run = tmp_path / "workdir"
    commands_done(
        tmp_path,
        train(run),
        ["main.py", f"--workdir={run}", "--mode=eval"],
        ["sret_jax.tools.export", f"--checkpoint={run}", str(tmp_path / "exported")],
        ["sret_jax.tools.show_batch", *TINY_FLAGS, f"--workdir={run}"],
    )
