"""The example of docs/your_block.md does what the document promises, as it stands there."""

import re
import sys

import numpy as np
import pytest
from etils import epath
from PIL import Image

import sret_jax
from sret_jax.models.flops import model_macs
from sret_jax.run.loop import train
from sret_jax.tools import predict
from tests.conftest import ROOT, config_given, refusal

STOP = "--config.stop_at_step={}"
TINY = ("--config.model.image_size=16", "--config.model.width=8", "--config.model.blocks=(1,)")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files of the document, in which commands are started."""
    text = (ROOT / "docs/your_block.md").read_text("utf-8")
    for name, code in re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", text, re.DOTALL):
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("my_block", None)


def run(workdir, *argv):
    """Trains as the command line does."""
    config, start = config_given(workdir, *argv)
    return train(config, workdir, start=start)


def test_a_block_of_ones_own_is_trained_counted_resumed_and_predicted(folder, digits_dir, capsys):
    workdir = epath.Path(folder / "run")
    given = ("--config=my_config.py", "--config.model.kernel_size=3", "--config.model.loops=3")
    given += ("--config.data.workers=0",)
    first = run(workdir, *given, *TINY, f"--config.data.data_dir={digits_dir}", STOP.format(1))
    printed = capsys.readouterr().out
    assert first["step"] == 1 and "after my_block:conv_tiny" in printed
    assert re.search(r"^1,[\d,]+ parameters, .* GMACs per 16x16 image", printed, re.MULTILINE)

    second = run(workdir, STOP.format(2))  # the workdir knows the rest
    assert second["step"] == 2 and "step 1" in capsys.readouterr().out
    model, variables = sret_jax.load(workdir)
    assert (model.kernel_size, model.loops, model.width) == (3, 3, 8)
    tokens, c = 16, 8
    block = 9 * c**2 + 2 * c * 2 * c  # the convolution, and the MLP with 2 c hidden units
    assert model_macs(model) == tokens * (48 * c + 3 * (block + 2 * c**2)) + 10 * c
    assert variables["params"]["stage0_block0"]["nll"]["norm"]["scale"].shape == (3, 8)

    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(folder / "black.png")
    predict.main([f"--checkpoint={workdir}", "black.png"])
    assert "black.png" in capsys.readouterr().out

    saved = workdir / "config.json"
    saved.write_text(saved.read_text().replace("my_block:", "lost_block:"))
    sentence = refusal(capsys, predict.main, f"--checkpoint={workdir}", "black.png")
    assert "there is no module 'lost_block' on Python's path" in sentence
