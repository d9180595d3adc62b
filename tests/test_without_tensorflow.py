"""Only the preparation of data needs TensorFlow; tests/conftest.py hides it from commands."""

import re

import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from tests.conftest import ROOT, TINY_FLAGS, run_commands, run_python


def test_tensorflow_is_hidden_from_the_commands_that_the_tests_run():
    assert "hidden" in run_python("-c", "import tensorflow").stderr


def test_no_file_imports_tensorflow():
    for file in (ROOT / "sret_jax").rglob("*.py"):
        assert not re.search(r"(import|from) tensorflow\b", file.read_text()), file


@pytest.mark.slow  # one more process for each command
def test_every_command_but_prepare_runs(tmp_path):
    run, photo = tmp_path / "run", tmp_path / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(photo)
    (tmp_path / "printed").mkdir()
    commands = [
        ["main.py", f"--workdir={run}", *TINY_FLAGS, "--config.stop_at_step=2"],
        ["main.py", f"--workdir={run}", "--mode=eval"],
        ["sret_jax.tools.predict", f"--checkpoint={run}", str(photo)],
        ["sret_jax.tools.export", f"--checkpoint={run}", str(tmp_path / "exported")],
        ["sret_jax.tools.show_batch", *TINY_FLAGS, f"--workdir={run}"],
    ]
    for done in run_commands(commands, tmp_path / "printed"):
        assert done.returncode == 0, (done.args, done.stdout, done.stderr)
        for line in (done.stdout + done.stderr).splitlines():
            assert "absl" not in line and "oneDNN" not in line and "Gloo" not in line
