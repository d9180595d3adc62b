"""Labels of a folder of images by a teacher that can be checked by hand."""

import resource

import numpy as np
import pytest

from configs import quickstart
from sret_jax.data.loader import train_transform
from sret_jax.data.sources.source import open_source
from sret_jax.distillation.label_generation import generate, verify
from sret_jax.distillation.label_manifest import Manifest, TeacherFacts
from sret_jax.distillation.label_writing import begin_store, write_shard
from sret_jax.distillation.soft_labels import finished_shards, open_soft_labels
from sret_jax.distillation.stored_labels import check_same_data, crop_law, data_facts, stored_labels
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.training.batches import train_samples
from tests.archives import encode, photographs

SIZE, BROKEN = 12, 4


class ColourTeacher:
    """p = the mean colour of an image, as fractions of red, green and blue."""

    image_size, fingerprint = SIZE, "colour"

    def __call__(self, images):
        colours = images.astype(np.float32).mean(axis=(1, 2)) + 1
        return colours / colours.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Nine photographs in three classes, JPEG and PNG; one is broken."""
    root = tmp_path_factory.mktemp("images")
    for i, photo in enumerate(photographs(9, seed=0)):
        form, folder = ("PNG", "JPEG")[i % 2], root / "train" / "abc"[i // 3]
        folder.mkdir(parents=True, exist_ok=True)
        data = encode(photo, form)
        (folder / f"{i}.{form.lower()}").write_bytes(data[:500] if i == BROKEN else data)
    config = quickstart.get_config()
    config.data.name = str(root)
    config.model.image_size = SIZE
    config.augment.flip = 0.5
    return config


def make_store(config, folder, crops, keep):
    source = open_source(config.data.name, "train", None)
    manifest = Manifest(
        data=data_facts(config, source),
        teacher=TeacherFacts("here", ColourTeacher.fingerprint, SIZE),
        law=crop_law(config),
        temperature=1.0,
        keep=keep,
        crops=crops,
    )
    transform = train_transform(config.augment, SIZE)
    assert generate(source, transform, ColourTeacher(), manifest, absolute(folder))
    return source, open_soft_labels(absolute(folder))


@pytest.mark.parametrize(("crops", "keep"), [(3, "full"), (3, "topk1"), (300, "full")])
def test_training_shows_every_crop_with_what_the_teacher_says_of_it(crops, keep, config, tmp_path):
    source, labels = make_store(config, tmp_path / "store", crops, keep)
    config = config.copy_and_resolve_references()
    config.data.update(soft_labels=str(tmp_path / "store"), crops_per_image=3)
    check_same_data(stored_labels(config), source, config)
    samples = train_samples(source, config, SIZE, labels)
    for element in range(18):
        rows = samples[element]
        exact = ColourTeacher()(rows["image"])
        if keep == "topk1":
            np.testing.assert_array_equal(rows["soft_classes"][:, 0], exact.argmax(axis=1))
            exact = exact.max(axis=1, keepdims=True)
        np.testing.assert_allclose(rows["soft"], exact, atol=5e-4)
        assert rows["bad"].all() == (rows["record"] == BROKEN).all()
    assert len(labels[BROKEN]) == 0 and len(labels[0]) == crops


def test_verify_compares_what_can_be_read(config, tmp_path):
    source, labels = make_store(config, tmp_path / "store", 4, "full")
    found = verify(labels, source, ColourTeacher(), 9)
    assert (found["images"], found["crops"]) == (8, 32)
    assert 0 < found["difference"] < 5e-4
    right = [labels[i]["soft"].argmax(axis=1) == source[i]["label"] for i in range(9)]
    assert found["accuracy"] == np.concatenate(right).mean()
    assert "difference" not in verify(labels, source, None, 9)


def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(config, tmp_path):
    _, labels = make_store(config, tmp_path / "store", 4, "full")
    folder, manifest = absolute(tmp_path / "other"), labels.manifest
    begin_store(folder, manifest)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))  # the same to a writer
    try:
        with pytest.raises(
            UserError, match=r"cannot be written \(.*\); fix .* finished shards are"
        ):
            write_shard(folder, manifest, 0, [bytes(5000)] * 9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not finished_shards(folder, manifest)
    assert [path.name for path in folder.iterdir()] == ["manifest.json"]
