"""The picture of the loss around trained weights."""

import json
import shutil

import matplotlib
import numpy as np
import pytest
from etils import epath
from PIL import Image

from sret_jax.evaluation.checkpoint_evaluation import evaluate_weights
from sret_jax.settings.saved_config import CONFIG_FILE, load_config
from sret_jax.tools import landscape
from tests.conftest import refusal


@pytest.fixture
def workdir(saved_run, digits_dir, tmp_path):
    """A run on sixty digits."""
    folder = epath.Path(shutil.copytree(saved_run, tmp_path / "run"))
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["data"] |= {"data_dir": str(digits_dir), "train_split": "train[:60]"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    return folder


def test_the_middle_is_the_evaluated_loss_and_the_picture_can_be_drawn_anew(workdir, capsys):
    step = workdir / "checkpoints" / "7"
    landscape.main([str(workdir), str(step), "--points=3", "--images=100"])
    assert "principal curvatures" in capsys.readouterr().out
    whole, of_step = json.loads((workdir / "landscape.json").read_text())
    assert whole == of_step and whole["images"] == 60 and whole["coordinates"] == [-1, 0, 1]
    config = load_config(workdir)
    config.data.eval_split, config.eval_batch_size = config.data.train_split, 64
    evaluated = evaluate_weights(config, workdir).results["eval"]["loss"]
    losses = np.array(whole["losses"])
    assert losses[1][1] == whole["loss"] == pytest.approx(evaluated, rel=1e-5)
    assert np.abs(losses - losses[1][1])[[0, 0, 0, 1], [0, 1, 2, 0]].min() > 1e-4

    picture = workdir / "landscape.png"
    first = picture.read_bytes()
    picture.unlink()
    landscape.main([f"--redraw={workdir / 'landscape.json'}"])
    assert picture.read_bytes() == first


def test_all_surfaces_have_the_same_colours(tmp_path):
    def flat(loss):
        return {
            **dict(
                run="run", step=1, ema=False, seed=0, images=9, digest="", coordinates=[-1, 0, 1]
            ),
            **dict(losses=[[loss] * 3] * 3, loss=loss, curvatures=None, curvature_step=1),
        }

    file = epath.Path(tmp_path / "drawn.png")
    landscape.draw([flat(0.1), flat(8.0)], file)
    pixels = np.asarray(Image.open(file).convert("RGB"), int)
    colours = [pixels[pixels.shape[0] // 2 + 30, int(x * pixels.shape[1])] for x in (0.2, 0.6)]
    for colour, end in zip(colours, (0.0, 1.0), strict=True):
        expected = 255 * np.array(matplotlib.colormaps["viridis"](end)[:3])
        assert np.abs(colour - expected).max() < 30


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give one RUN or more, or else --redraw=FILE.json"),
        (["{}", "--points=20"], "--points=20 must be odd and at least 3"),
        (["{}", "--images=0"], "--images=0 must be at least 1"),
        (["{}", "--seed=-1"], "--seed=-1 must be in 0 .."),
        (["{}"], "holds no config.json of a run; give the workdir of one"),
        (["--redraw={}/none.json"], "none.json cannot be drawn"),
    ],
)
def test_what_cannot_be_drawn_ends_in_a_sentence(arguments, sentence, tmp_path, capsys):
    arguments = [argument.format(tmp_path) for argument in arguments]
    assert sentence in refusal(capsys, landscape.main, *arguments)
