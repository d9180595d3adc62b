"""The exported model, run where this package is not."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

import sret_jax
from sret_jax.tools import export
from sret_jax.tools.trained import Trained
from sret_jax.training.predict import logits_of
from tests.conftest import refusal

# Isolated Python sees neither the working folder nor PYTHONPATH.
STRANGER = """
import importlib.util, sys
import jax, numpy
from jax import export

assert importlib.util.find_spec("sret_jax") is None and importlib.util.find_spec("configs") is None
folder, images, out = sys.argv[1:]
exported = export.deserialize(bytearray(open(folder + "/model.stablehlo", "rb").read()))
print(exported.platforms)
images = numpy.load(images)
numpy.savez(out, **{str(b): exported.call(images[:b]) for b in (1, 3)})
assert not any(name.split(".")[0] in ("sret_jax", "flax") for name in sys.modules)
"""


def isolated(folder, *args):
    done = subprocess.run(
        [sys.executable, "-I", *map(str, args)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def exported(saved_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "new" / "out"
    export.main([f"--checkpoint={saved_run}", str(folder)])
    return folder


def test_another_process_without_this_package_gets_the_same_logits(exported, saved_run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    files = (exported, tmp_path / "images.npy", tmp_path / "logits.npz")
    (tmp_path / "stranger.py").write_text(STRANGER)
    platforms = isolated(tmp_path, tmp_path / "stranger.py", *files)
    assert platforms.strip() == "('cpu', 'cuda', 'tpu')"
    expected = logits_of(*sret_jax.load(saved_run), images)
    with np.load(tmp_path / "logits.npz") as logits:
        for batch in (1, 3):
            np.testing.assert_allclose(logits[str(batch)], expected[:batch], atol=1e-5)


def test_the_script_beside_it_says_what_predict_says(exported, saved_run, tmp_path):
    photograph = tmp_path / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(photograph)
    said = isolated(tmp_path, exported / "run.py", photograph).splitlines()
    model, variables = sret_jax.load(saved_run)
    (probabilities,) = sret_jax.predict(model, variables, [photograph], test_crop=0.8)
    best = np.argsort(-probabilities)[:5]
    expected = ", ".join(f"{100 * probabilities[i]:.1f}% digit {i}" for i in best)
    assert said == [f"{photograph}: {expected}"]


def test_labels_and_preprocessing_lie_beside_it(exported):
    assert json.loads((exported / "labels.json").read_text())[3] == "digit 3"
    spec = json.loads((exported / "preprocess.json").read_text())
    assert (spec["resize_shorter_side"], spec["center_crop"]) == (20, 16)
    assert (spec["dtype"], spec["layout"], spec["output"]) == ("uint8", "NHWC", "logits")
    assert "(b, 16, 16, 3)" in (exported / "README.md").read_text()
    assert sorted(path.name for path in exported.parent.iterdir()) == ["out"]


def test_an_exported_model_of_another_size_sees_the_evaluation_view_of_that_size():
    model = sret_jax.create_model("sret_t", image_size=384, groups=None)
    spec = export.preprocessing(Trained(model, {}, [], test_crop=0.875))
    assert (spec["resize_shorter_side"], spec["center_crop"]) == (438, 384)


def test_what_cannot_be_exported_is_a_sentence(exported, saved_run, tmp_path, capsys):
    for args, sentence in (
        ((f"--checkpoint={saved_run}", exported), "exists already; give another OUT or remove it"),
        ((f"--checkpoint={tmp_path / 'none'}", tmp_path / "out"), "there is no"),
        ((f"--checkpoint={saved_run}", "--classes=none", tmp_path / "out"), "cannot be read"),
    ):
        assert sentence in refusal(capsys, export.main, *args)
    assert not (tmp_path / "out").exists()
