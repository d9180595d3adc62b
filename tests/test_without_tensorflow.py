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


@pytest.fixture(scope="module")
def commands_done(tmp_path_factory):
    """Commands where importing TensorFlow fails and is recorded, also in workers."""
    folder = tmp_path_factory.mktemp("run")
    record, shadow = folder / "imported", folder / "shadow" / "tensorflow"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").write_text(SHADOW.format(record=str(record)))
    Image.fromarray(load_sample_image("flower.jpg")).save(folder / "flower.jpg")
    run = folder / "workdir"
    train = ["main.py", f"--workdir={run}", *TINY_FLAGS, "--config.stop_at_step=2"]
    commands = [
        [*train, "--config.data.workers=1"],
        ["main.py", f"--workdir={run}", "--mode=eval"],
        ["sret_jax.tools.predict", f"--checkpoint={run}", str(folder / "flower.jpg")],
        ["sret_jax.tools.export", f"--checkpoint={run}", str(folder / "exported")],
        ["sret_jax.tools.show_batch", *TINY_FLAGS, f"--workdir={run}"],
    ]
    printed = folder / "printed"
    printed.mkdir()
    # On as many devices as in other tests, whose compiled programs it finds in the cache.
    done = run_commands(commands, printed, devices=8, path=[folder / "shadow"])
    return run, record, done


def test_digits_are_prepared_trained_on_evaluated_predicted_and_exported(commands_done):
    run, record, done = commands_done
    for command in done:
        assert command.returncode == 0, (command.args, command.stdout, command.stderr)
    assert not record.exists(), "TensorFlow was imported"
    assert json.loads((run / "result.json").read_text())["step"] == 2
    assert list((run / "tensorboard").iterdir())


def test_the_commands_print_nothing_of_libraries(commands_done):
    for command in commands_done[2]:
        for line in (command.stdout + command.stderr).splitlines():
            assert "absl" not in line and "oneDNN" not in line and "Gloo" not in line
