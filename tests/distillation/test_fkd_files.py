"""Published FKD files are imported; files of another form are refused."""

import os

import numpy as np
import pytest

from configs import quickstart
from sret_jax.data.sources.source import open_source
from sret_jax.data.views.crops import replay_views, to_pixels
from sret_jax.distillation.fkd_files import FkdFolder
from sret_jax.distillation.soft_labels import open_soft_labels
from sret_jax.distillation.soft_targets import marginal_smoothing
from sret_jax.errors import UserError
from sret_jax.files import absolute
from tests.archives import encode, photographs, write_imagenet
from tests.tools.test_soft_labels import command, fails

torch = pytest.importorskip("torch")

CLASSES, CROPS = ["cat", "dog", "emu"], 5
NAMES = ["one", "two.a"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of six photographs whose names repeat in every class."""
    root = tmp_path_factory.mktemp("images")
    photos = iter(photographs(6, seed=0))
    for name in CLASSES:
        for split in ("train", "test"):
            (root / split / name).mkdir(parents=True)
        for image in NAMES:
            (root / "train" / name / f"{image}.jpg").write_bytes(encode(next(photos)))
    return root


def fkd_content(seed, form="smoothed", as_tensors=False):
    """The content that FKD saves for an image: coordinates, flips, labels."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(0.3, 0.9, (CROPS, 2))
    coordinates = np.hstack([rng.uniform(0, 1 - size), size]).astype(np.float32)
    flips = rng.random(CROPS) < 0.5
    probabilities = rng.dirichlet(np.ones(3), CROPS).astype(np.float32)
    best = np.argsort(-probabilities, axis=1)[:, :2]
    values = np.take_along_axis(probabilities, best, axis=1)
    labels = {
        "smoothed": np.stack([best, values], axis=1).astype(np.float32),  # (K, 2, k)
        "best": np.stack([best[:, 0], values[:, 0]], axis=1).astype(np.float32),  # (K, 2)
        "hard": best[:, 0],
        "full": probabilities,
    }[form]
    content = [coordinates, flips, labels]
    return [torch.from_numpy(part) for part in content] if as_tensors else content


def save_all(folder, **form):
    """Saves files for all images, named as FKD names them."""
    for i, (name, image) in enumerate((n, i) for n in CLASSES for i in NAMES):
        path = folder / "imagenet" / "train" / name / f"{image}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(fkd_content(i, **form), path)
    return folder


def import_args(folder, images, out):
    config = ("--config=configs/quickstart.py", f"--config.data.name={images}")
    return ["import", folder, *config, "--config.model.image_size=32", f"--out={out}"]


@pytest.mark.parametrize("as_tensors", [False, True])
@pytest.mark.parametrize("form", ["smoothed", "best", "hard", "full"])
def test_every_form_of_label_is_taken_over(form, as_tensors, images, tmp_path):
    save_all(tmp_path / "fkd", form=form, as_tensors=as_tensors)
    command(*import_args(tmp_path / "fkd", images, tmp_path / "store"))
    labels = open_soft_labels(absolute(tmp_path / "store"))
    assert len(labels) == 6
    for record in range(6):
        coordinates, flips, published = fkd_content(record, form)
        stored = labels[record]
        np.testing.assert_array_equal(stored["flip"], flips)
        for box, (top, left, height, width) in zip(stored["box"], coordinates, strict=True):
            exact = np.array([left * 500, top * 400, (left + width) * 500, (top + height) * 400])
            assert np.abs(exact - to_pixels(box, 500, 400)).max() <= 0.51
        parts = [stored[name] for name in labels.manifest.row_labels]
        dense = np.asarray(marginal_smoothing(*[*parts, None][:2], 3))
        np.testing.assert_allclose(dense.sum(axis=1), 1, atol=1e-3)
        if form == "full":
            np.testing.assert_allclose(dense, published, atol=1e-3)
        elif form == "hard":
            np.testing.assert_array_equal(dense.argmax(axis=1), published)
            np.testing.assert_array_equal(dense.max(axis=1), 1)
        else:
            best = published[:, 0].reshape(CROPS, -1).astype(int)
            values = published[:, 1].reshape(CROPS, -1)
            np.testing.assert_allclose(np.take_along_axis(dense, best, 1), values, atol=1e-3)


def test_imported_crops_are_shown_and_the_store_can_be_inspected(images, tmp_path, capsys):
    save_all(tmp_path / "fkd")
    out = tmp_path / "store"
    command(*import_args(tmp_path / "fkd", images, out))
    labels = open_soft_labels(absolute(out))
    source = open_source(str(images), "train", None)
    assert replay_views(source[3]["image"], labels[3], 32).shape == (CROPS, 32, 32, 3)
    command("inspect", out)
    command("verify", out, "--config=configs/quickstart.py", f"--config.data.name={images}")
    said = capsys.readouterr().out
    assert "imported" in said and "topk2" in said and "Compared 30 crops of 6 images" in said


def test_imagenet_is_matched_by_the_names_tfds_keeps(tmp_path):
    import tensorflow_datasets as tfds

    from sret_jax.tools import prepare

    write_imagenet(tmp_path / "archives")
    arguments = f"--archives={tmp_path / 'archives'}", f"--data_dir={tmp_path / 'data'}"
    tfds.disable_progress_bar()
    prepare.main(["imagenet2012", *arguments])
    source = open_source("imagenet2012", "train", absolute(tmp_path / "data"))
    for record in range(len(source)):
        stem = source.file_name(record).removesuffix(".JPEG")
        path = tmp_path / "fkd" / stem.split("_")[0] / f"{stem}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        coordinates, flips, _ = fkd_content(record)
        torch.save([coordinates, flips, np.full(CROPS, record)], path)
    folder = FkdFolder(absolute(tmp_path / "fkd"), source)
    assert [folder[i].classes[0, 0] for i in range(len(source))] == list(range(len(source)))


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/sret_jax_owned",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (Malicious(), "is not a torch file of plain weights and was not loaded"),
        ([np.array([Malicious()], dtype=object)] * 3, "is not a torch file of plain weights"),
        ([np.zeros((5, 4)), np.zeros(5, bool)], "not enough values to unpack"),
        ({"model": torch.zeros(3)}, "not enough values to unpack"),
        ([np.zeros((5, 3)), np.zeros(5, bool), np.zeros((5, 2, 2))], r"shapes (5, 3), (5,)"),
        ([np.zeros((5, 4)), np.zeros(5, bool), np.zeros((5, 7))], "labels of shape (5, 7)"),
        ([np.zeros((5, 4)), np.zeros(5, bool), np.full((5, 2, 2), 3.0)], "outside 0 to 1"),
        ([np.full((5, 4), 2.0), np.zeros(5, bool), np.zeros((5, 2, 2))], "outside the image"),
        ([np.full((5, 4), np.nan), np.zeros(5, bool), np.zeros((5, 2, 2))], "outside the image"),
        ([np.zeros((5, 4)), np.zeros(5, bool), np.full(5, 3)], "classes outside 0 to 2"),
        ([np.zeros((3, 4)), np.zeros(3, bool), np.zeros((3, 2, 2))], "import files that are alike"),
    ],
)
def test_a_file_that_is_none_is_refused_and_runs_nothing(
    content, sentence, images, tmp_path, capsys
):
    save_all(tmp_path / "fkd")
    torch.save(content, tmp_path / "fkd" / "imagenet" / "train" / "dog" / "one.tar")
    error = fails(capsys, import_args(tmp_path / "fkd", images, tmp_path / "store"))
    assert sentence in error
    assert not os.path.exists("/tmp/sret_jax_owned")  # noqa: PTH110
    assert not list((tmp_path / "store").glob("labels-*"))


def test_images_without_a_file_are_named(images, tmp_path, capsys):
    save_all(tmp_path / "fkd")
    (tmp_path / "fkd" / "imagenet" / "train" / "emu" / "one.tar").unlink()
    error = fails(capsys, import_args(tmp_path / "fkd", images, tmp_path / "store"))
    assert "1 of 6 images have not one file" in error and "emu/one.jpg has 0" in error
    assert not (tmp_path / "store").exists()
    error = fails(capsys, import_args(tmp_path / "nothing", images, tmp_path / "store"))
    assert "holds no soft labels (.tar, .pt, .pth)" in error


def test_imported_labels_are_of_the_size_they_are_imported_for(images, tmp_path):
    from sret_jax.distillation.stored_labels import stored_labels

    save_all(tmp_path / "fkd")
    command(*import_args(tmp_path / "fkd", images, tmp_path / "store"))
    config = quickstart.get_config()
    config.data.soft_labels = str(tmp_path / "store")
    config.augment.crop_scale = (0.1, 0.2)  # the crops are not drawn
    assert stored_labels(config).manifest.crops == CROPS
    config.model.image_size = 64
    with pytest.raises(UserError, match="model.image_size=32, and this config has 64"):
        stored_labels(config)
