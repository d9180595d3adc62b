"""The exported model runs where this package is not installed."""

import importlib.util
import io
import json
import shutil
import subprocess
import sys
import venv

import jax
import numpy as np
import pytest
from PIL import ExifTags, Image
from sklearn.datasets import load_sample_image

import sret_jax
from sret_jax.data.views.images import EvalTransform
from sret_jax.models.apply import evaluation_logits, exit_signals, exited_logits, normalise
from sret_jax.models.halting import ExitRule
from sret_jax.tools import export
from sret_jax.tools.trained import Trained
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
    model, variables = sret_jax.load(saved_run)
    expected = evaluation_logits(model, variables, normalise(model, images))
    with np.load(tmp_path / "logits.npz") as logits:
        for batch in (1, 3):
            np.testing.assert_allclose(logits[str(batch)], expected[:batch], atol=1e-4)


def test_the_script_beside_it_says_what_predict_says(exported, saved_run, tmp_path):
    photograph = tmp_path / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(photograph)
    said = isolated(tmp_path, exported / "run.py", photograph).splitlines()
    model, variables = sret_jax.load(saved_run)
    (probabilities,) = sret_jax.predict(model, variables, [photograph], test_crop=0.8)
    best = np.argsort(-probabilities)[:5]
    expected = ", ".join(f"{100 * probabilities[i]:.1f}% digit {i}" for i in best)
    assert said == [f"{photograph}: {expected}"]


def run_script(exported):
    """The run.py of an export, imported as a module."""
    spec = importlib.util.spec_from_file_location("run", exported / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FLOWER = Image.fromarray(load_sample_image("flower.jpg")).resize((64, 43))
GREY = np.asarray(FLOWER.convert("L"))
FRAMES = dict(save_all=True, append_images=[FLOWER.rotate(180)])


def exif(orientation):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = orientation
    return tags


KINDS = {
    "jpeg": (FLOWER, "JPEG", {}),
    "progressive jpeg": (FLOWER, "JPEG", dict(progressive=True)),
    "greyscale jpeg": (FLOWER.convert("L"), "JPEG", {}),
    "cmyk jpeg": (FLOWER.convert("CMYK"), "JPEG", {}),
    **{f"jpeg turned {i}": (FLOWER, "JPEG", dict(exif=exif(i))) for i in range(2, 10)},
    "png": (FLOWER, "PNG", {}),
    "png turned": (FLOWER, "PNG", dict(exif=exif(6))),
    "one bit png": (FLOWER.convert("1"), "PNG", {}),
    "palette png": (FLOWER.convert("P"), "PNG", {}),
    "palette png with transparency": (
        FLOWER.convert("P"),
        "PNG",
        dict(transparency=bytes(range(256))),
    ),
    "png with one transparent colour": (FLOWER, "PNG", dict(transparency=(0, 0, 0))),
    "png with transparency": (FLOWER.convert("RGBA").rotate(20), "PNG", {}),
    "greyscale png with transparency": (FLOWER.convert("LA").rotate(20), "PNG", {}),
    "16-bit png": (Image.fromarray(GREY.astype(np.uint16) * 256 + 17), "PNG", {}),
    "gif": (FLOWER, "GIF", {}),
    "gif with transparency": (FLOWER.convert("P"), "GIF", dict(transparency=3)),
    "moving gif": (FLOWER, "GIF", FRAMES),
    "webp": (FLOWER, "WEBP", {}),
    "webp with transparency": (FLOWER.convert("RGBA").rotate(20), "WEBP", {}),
    "moving webp": (FLOWER, "WEBP", FRAMES),
    "bmp": (FLOWER, "BMP", {}),
    "greyscale bmp": (FLOWER.convert("L"), "BMP", {}),
    "wide png": (FLOWER.resize((900, 21)), "PNG", {}),
    "tall png": (FLOWER.resize((3, 400)), "PNG", {}),
}


def test_the_script_sees_every_kind_of_image_as_evaluation_does(exported):
    run, view = run_script(exported), EvalTransform(16, 0.8)
    for kind, (image, form, settings) in KINDS.items():
        file = io.BytesIO()
        image.save(file, form, **settings)
        expected = view(file.getvalue())
        np.testing.assert_array_equal(run.preprocess(Image.open(file)), expected, kind)
        assert expected.std() > 10, kind  # no white or black square


def test_the_script_without_images_says_how_it_is_used(exported, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(exported).main()
    assert stop.value.code == 2
    assert "usage: run.py [-h] IMAGE [IMAGE ...]" in capsys.readouterr().err


def test_a_model_that_jax_cannot_read_is_a_sentence_with_both_versions(exported, tmp_path):
    folder = tmp_path / "out"
    shutil.copytree(exported, folder)
    (folder / "requirements.txt").write_text("jax==99.1.2\nnumpy\n")
    model = (folder / "model.stablehlo").read_bytes()
    later = model.replace(b"ML\xefR", b"MLxR")  # what MLIR's bytecode begins with
    assert later != model
    (folder / "model.stablehlo").write_bytes(later)
    done = subprocess.run(
        [sys.executable, folder / "run.py", "x.jpg"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    sentence = done.stderr.splitlines()[-1]  # after what the parser itself prints
    assert sentence.startswith("Error: model.stablehlo was written by jax 99.1.2, and jax ")
    assert f"jax {jax.__version__} here cannot read it" in sentence
    assert sentence.endswith(f"pip install -r {folder / 'requirements.txt'}")


@pytest.mark.slow  # installs jax
def test_a_new_environment_with_what_the_readme_names_runs_it(exported, saved_run, tmp_path):
    photograph = tmp_path / "flower.jpg"
    Image.fromarray(load_sample_image("flower.jpg")).save(photograph)
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    commands = [line.strip() for line in (exported / "README.md").read_text().splitlines()]
    install = next(line for line in commands if line.startswith("pip install")).split()
    subprocess.run([python, "-m", *install], cwd=exported, check=True)
    done = subprocess.run(
        [python, "run.py", photograph], cwd=exported, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model, variables = sret_jax.load(saved_run)
    (probabilities,) = sret_jax.predict(model, variables, [photograph], test_crop=0.8)
    assert f"% digit {np.argmax(probabilities)}," in done.stdout


def test_labels_and_preprocessing_lie_beside_it(exported):
    assert json.loads((exported / "labels.json").read_text())[3] == "digit 3"
    spec = json.loads((exported / "preprocess.json").read_text())
    assert (spec["resize_shorter_side"], spec["center_crop"]) == (20, 16)
    assert (spec["dtype"], spec["layout"], spec["output"]) == ("uint8", "NHWC", "logits")
    assert "(b, 16, 16, 3)" in (exported / "README.md").read_text()
    assert sorted(path.name for path in exported.parent.iterdir()) == ["out"]


def test_an_exported_model_of_another_size_sees_the_evaluation_view_of_that_size():
    model = sret_jax.create_model("sret_t", image_size=384, groups=None)
    spec = export.preprocessing(Trained(model, {}, [], test_crop=0.875, variant="sret_t"))
    assert (spec["resize_shorter_side"], spec["center_crop"]) == (438, 384)


def test_an_exported_model_of_exits_says_the_loops_of_each_image(
    saved_run, tmp_path, monkeypatch, capsys
):
    model, variables = sret_jax.load(saved_run)
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    pixels = normalise(model, images)
    first = jax.jit(exit_signals, static_argnums=0)(model, variables, pixels).entropy[0]
    rule = ExitRule("entropy", float(np.sort(first)[1:3].mean()))  # two of four leave at once
    export.main(
        [
            f"--checkpoint={saved_run}",
            f"--exit={rule.kind}:{rule.threshold!r}",
            str(tmp_path / "out"),
        ]
    )
    run = run_script(tmp_path / "out")
    logits, loops = run.load()(images)
    expected, of_rule = exited_logits(model, variables, pixels, rule)
    assert sorted(loops.tolist()) == [1, 1, 2, 2] and loops.tolist() == of_rule.tolist()
    np.testing.assert_allclose(logits, expected, atol=1e-4)
    scan = tmp_path / "scan.png"
    Image.fromarray(images[0]).save(scan)
    monkeypatch.setattr(sys, "argv", ["run.py", str(scan)])
    run.main()
    count = run.load()(run.preprocess(Image.open(scan))[None])[1][0]
    after = {1: "(after 1 loop)", 2: "(after 2 loops)"}[int(count)]
    assert capsys.readouterr().out.strip().endswith(after)
    assert (
        json.loads((tmp_path / "out" / "preprocess.json").read_text())["output"]
        == "(logits, loops)"
    )
    assert "by the rule entropy:" in " ".join((tmp_path / "out" / "README.md").read_text().split())


def test_what_cannot_be_exported_is_a_sentence(exported, saved_run, tmp_path, capsys):
    for args, sentence in (
        ((f"--checkpoint={saved_run}", exported), "exists already; give another OUT or remove it"),
        ((f"--checkpoint={tmp_path / 'none'}", tmp_path / "out"), "there is no"),
        ((f"--checkpoint={saved_run}", "--classes=none", tmp_path / "out"), "cannot be read"),
        ((f"--checkpoint={saved_run}", "--exit=entropy:9", tmp_path / "out"), "at most log 10"),
    ):
        assert sentence in refusal(capsys, export.main, *args)
    assert not (tmp_path / "out").exists()
