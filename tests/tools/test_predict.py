"""The command's predictions, the files it writes, and the input it refuses."""

import csv
import io
import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

import sret_jax
from sret_jax.data.views.images import EvalTransform
from sret_jax.tools import predict
from sret_jax.tools.prediction_sheet import draw_image
from tests.conftest import refusal


@pytest.fixture
def folder(tmp_path):
    """A folder with two scans, a photograph in a subfolder, and files that are not images."""
    root = tmp_path / "images"
    (root / "below").mkdir(parents=True)
    for i in (1, 0):
        scan = load_digits().images[i] * 15
        Image.fromarray(scan.astype(np.uint8)).save(root / f"scan{i}.png")
    Image.fromarray(load_sample_image("flower.jpg")).save(root / "below" / "flower.jpg")
    (root / "notes.txt").write_text("no image")
    return root


def run(*args):
    predict.main([str(a) for a in args])


def fails(capsys, *args):
    return refusal(capsys, predict.main, *args)


def test_a_folder_is_predicted_in_order_as_the_run_evaluates(saved_run, folder, tmp_path, capsys):
    files = [tmp_path / name for name in ("out.json", "out.csv", "sheet.png")]
    flags = [f"--{kind}={file}" for kind, file in zip(("json", "csv", "sheet"), files, strict=True)]
    run(f"--checkpoint={saved_run}", folder, *flags)
    paths = [folder / "below" / "flower.jpg", folder / "scan0.png", folder / "scan1.png"]
    expected = sret_jax.predict(*sret_jax.load(saved_run), paths, test_crop=0.8)

    rows = json.loads(files[0].read_text())
    assert [row["image"] for row in rows] == list(map(str, paths))
    for row, probabilities in zip(rows, expected, strict=True):
        assert [one["label"] for one in row["top"]] == list(np.argsort(-probabilities)[:5])
        shown = [one["probability"] for one in row["top"]]
        np.testing.assert_allclose(shown, np.sort(probabilities)[:-6:-1], rtol=1e-6)
        assert all(one["class"] == f"digit {one['label']}" for one in row["top"])

    with files[1].open(newline="") as f:
        table = list(csv.DictReader(f))
    assert [line["image"] for line in table] == list(map(str, paths))
    assert table[2]["class_1"] == rows[2]["top"][0]["class"] and not table[2]["error"]
    assert float(table[2]["probability_5"]) == pytest.approx(rows[2]["top"][4]["probability"])

    out = capsys.readouterr().out
    assert f"{paths[1]}: {100 * expected[1].max():.1f}% digit {expected[1].argmax()}, " in out
    sheet = np.asarray(Image.open(files[2]).convert("RGB"))
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 100  # more than bars and text


def test_the_sheet_shows_the_own_pixels_of_an_image_that_evaluation_enlarges():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 10, 3), np.uint8)
    for side, shown in ((32, pixels), (4, None)):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        view = EvalTransform(side, 0.5)
        axes = Figure().subplots()
        draw_image(axes, file.getvalue(), view)
        expected = view(file.getvalue()) if shown is None else shown
        np.testing.assert_array_equal(axes.images[0].get_array(), expected)
        if shown is not None:  # the central half of 8 pixels
            assert (axes.get_xlim(), axes.get_ylim()) == ((2.5, 6.5), (5.5, 1.5))


def test_unreadable_images_are_named_and_the_others_predicted(saved_run, folder, tmp_path, capsys):
    (folder / "broken.png").write_bytes(b"no image")
    out, sheet = tmp_path / "out.json", tmp_path / "sheet.png"
    flags = (f"--json={out}", f"--csv={tmp_path / 'out.csv'}", f"--sheet={sheet}")
    error = fails(capsys, f"--checkpoint={saved_run}", folder, *flags)
    assert f"1 of 4 images cannot be read: {folder / 'broken.png'} (no readable JPEG" in error
    rows = {row["image"]: row for row in json.loads(out.read_text())}
    assert "no readable JPEG" in rows.pop(str(folder / "broken.png"))["error"]
    assert len(rows) == 3 and all(len(row["top"]) == 5 for row in rows.values())
    with (tmp_path / "out.csv").open(newline="") as f:
        errors = [line["error"] for line in csv.DictReader(f)]
    assert [bool(error) for error in errors] == [False, True, False, False]
    assert sheet.exists()


def test_the_average_and_names_from_a_file_are_taken_when_asked_for(saved_run, folder, tmp_path):
    names, out = tmp_path / "names.txt", tmp_path / "out.json"
    names.write_text("".join(f"class {i}\n" for i in range(10)))
    scan = folder / "scan0.png"
    run(f"--checkpoint={saved_run}", scan, "--ema", f"--classes={names}", f"--json={out}")
    (row,) = json.loads(out.read_text())
    average = sret_jax.predict(*sret_jax.load(saved_run, ema=True), [scan], test_crop=0.8)[0]
    assert row["top"][0]["class"] == f"class {average.argmax()}"
    assert row["top"][0]["probability"] == pytest.approx(average.max())


def test_with_a_rule_the_loops_of_each_image_and_their_cost_are_said(
    saved_run, folder, tmp_path, capsys
):
    files = [tmp_path / name for name in ("out.json", "out.csv")]
    flags = [f"--{kind}={file}" for kind, file in zip(("json", "csv"), files, strict=True)]
    run(f"--checkpoint={saved_run}", folder, "--exit=stable", *flags)
    assert [row["loops"] for row in json.loads(files[0].read_text())] == [2, 2, 2]
    with files[1].open(newline="") as f:
        assert [line["loops"] for line in csv.DictReader(f)] == ["2", "2", "2"]
    said = capsys.readouterr().out.splitlines()
    assert sum(line.endswith(" (after 2 loops)") for line in said) == 3
    assert any("Images left after 2.00 of 2 loops on average, at " in line for line in said)


def test_what_cannot_be_predicted_is_a_sentence(saved_run, folder, tmp_path, capsys):
    scan, checkpoint = folder / "scan0.png", f"--checkpoint={saved_run}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "two.txt").write_text("a\nb\n")
    none = tmp_path / "none"
    assert f"there is no file or folder {none}; give a run" in fails(
        capsys, f"--checkpoint={none}", scan
    )
    assert f"there is no file or folder {none}.pth; give" in fails(
        capsys, f"--checkpoint={none}.pth", scan
    )
    assert f"there is no image or folder {none}" in fails(capsys, checkpoint, scan, none)
    assert "empty holds no images" in fails(capsys, checkpoint, tmp_path / "empty")
    classes = f"--classes={tmp_path / 'two.txt'}"
    rule = "--exit=confidence:2"
    assert "a confidence is a probability" in fails(capsys, checkpoint, scan, rule)
    assert "two.txt has 2 names, but" in fails(capsys, checkpoint, scan, classes)
    assert "none cannot be read" in fails(capsys, checkpoint, scan, f"--classes={none}")
    assert "cannot be written" in fails(capsys, checkpoint, scan, f"--json={none}/out.json")
    assert "cannot be written" in fails(capsys, checkpoint, scan, f"--sheet={none}/sheet.png")
