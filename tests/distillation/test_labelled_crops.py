"""The stream of stored labels: crop and label at every position, on any hosts and workers."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from configs import quickstart
from sret_jax.data import order
from sret_jax.data.loader import train_transform
from sret_jax.data.sources.source import open_source
from sret_jax.data.views.crops import draw_views, replay_views
from sret_jax.distillation.label_manifest import CropLaw, DataFacts, Manifest, TeacherFacts
from sret_jax.distillation.label_writing import most_probable, pack, write_store
from sret_jax.distillation.soft_labels import open_soft_labels
from sret_jax.distillation.stored_labels import check_same_data
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.training.batches import train_loader, train_samples
from tests.data.test_loader import INTERLEAVED, Host, sharding
from tests.data.test_order import WithBadRecords

SIZE, CROPS, PER_READ, BATCH = 16, 3, 2, 32
BAD = 7  # the record whose labels are missing


def recipe(folder, seed=3, workers=0):
    config = quickstart.get_config()
    config.seed = seed
    config.model.image_size = SIZE
    config.augment.flip = 0.5
    config.data.update(soft_labels=str(folder), crops_per_image=PER_READ, workers=workers)
    return config


@pytest.fixture(scope="module")
def digits(digits_dir):
    return open_source("digits", "train[:200]", digits_dir)


@pytest.fixture(scope="module")
def folder(digits, tmp_path_factory):
    """A store of random labels."""
    folder = absolute(tmp_path_factory.mktemp("labels") / "store")
    config = recipe(folder)
    transform = train_transform(config.augment, SIZE)
    manifest = Manifest(
        data=DataFacts.of(digits, "digits", "train[:200]"),
        teacher=TeacherFacts("nowhere", None, None),
        law=CropLaw(SIZE, seed=0),
        temperature=1.0,
        keep="topk4",
        crops=CROPS,
    )

    def records(numbers):
        for number in numbers:
            if number == BAD:
                yield b""
                continue
            data = digits[number]["image"]
            crops, _ = draw_views(data, transform, CROPS, seed=0, record=number)
            labels = np.random.default_rng(number).dirichlet(np.full(10, 0.3), CROPS)
            yield pack(manifest, crops, *most_probable(manifest, labels))

    assert write_store(folder, manifest, records, hosts=1, host=0)
    return folder


def rows(digits, folder, positions):
    """The rows at given positions, computed one by one from the definition."""
    labels = open_soft_labels(folder)
    stream = order.shuffled(digits, seed=3)
    for position in positions:
        image, place = divmod(position, PER_READ)
        record = int(stream[image]["record"])
        shown = record
        while shown == BAD:
            image += 1
            shown = int(stream[image]["record"])
        crop = (position // PER_READ // 200 * PER_READ + place) % CROPS
        stored = labels[shown][[crop]]
        yield {
            "image": replay_views(digits[shown]["image"], stored, SIZE)[0],
            "label": digits[shown]["label"],
            "soft": stored["soft"][0],
            "soft_classes": stored["soft_classes"][0],
            "record": record,
            "bad": record == BAD,
        }


def global_batch(digits, folder, hosts, workers, step):
    """The rows of a batch that several hosts load together, with their devices interleaved."""
    whole = sharding([jax.devices()[i] for i in INTERLEAVED])
    parts = {}
    for host in range(hosts):
        mine = Host(whole, jax.devices()[host::hosts])
        config = recipe(folder, workers=workers)
        labels = open_soft_labels(folder)
        loader = train_loader(
            digits, config, SIZE, BATCH, mine, start_step=step, soft_labels=labels
        )
        parts |= loader.next_parts()
        loader.close()
    in_order = [parts[device] for device in whole.mesh.devices.ravel()]
    return {name: np.concatenate([part[name] for part in in_order]) for name in in_order[0]}


@pytest.mark.parametrize(
    ("hosts", "workers", "step"), [(1, 0, 0), (2, 0, 13), (4, 0, 40), (1, 2, 12)]
)
def test_every_position_has_its_crop_and_label_on_any_hosts_and_workers(
    hosts, workers, step, digits, folder
):
    batch = global_batch(digits, folder, hosts, workers, step)
    positions = range(step * BATCH, (step + 1) * BATCH)
    for i, expected in enumerate(rows(digits, folder, positions)):
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name][i], value, err_msg=f"row {i} {name}")


def test_all_crops_are_shown_before_one_returns(digits, folder):
    labels = open_soft_labels(folder)
    samples = train_samples(digits, recipe(folder), SIZE, labels)
    shown = {}
    for element in range(3 * 200):  # three passes: every image six times
        row = samples[element]
        for record, soft in zip(row["record"].tolist(), row["soft"], strict=True):
            if record != BAD:
                (crop,) = np.flatnonzero((labels[record]["soft"] == soft).all(axis=1))
                shown.setdefault(record, []).append(int(crop))
    assert len(shown) == 199
    assert all(sorted(crops) == [0, 0, 1, 1, 2, 2] for crops in shown.values())


def test_an_image_that_has_become_unreadable_shows_the_next_one_and_its_labels(digits, folder):
    stream = order.shuffled(digits, seed=3)
    broken, next_one = (int(stream[i]["record"]) for i in (4, 5))
    labels = open_soft_labels(folder)
    samples = train_samples(WithBadRecords(digits, [broken]), recipe(folder), SIZE, labels)
    rows = samples[4]
    assert rows["bad"].all() and (rows["record"] == broken).all()
    np.testing.assert_array_equal(rows["soft"], samples[5]["soft"])
    assert (rows["label"] == digits[next_one]["label"]).all()


def test_a_damaged_label_is_named_with_its_file(digits, folder, tmp_path):
    copy = absolute(tmp_path / "copy")
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (shard,) = copy.glob("*.array_record")
    content = bytearray(shard.read_bytes())
    content[5000] ^= 0xFF
    shard.write_bytes(bytes(content))
    labels = open_soft_labels(copy)
    with pytest.raises(UserError, match=r"labels of image \d+ in .*00000-of-00001.* are damaged"):
        for record in range(len(labels)):
            labels[record]


def test_a_missing_or_truncated_shard_is_refused(folder, tmp_path):
    copy = absolute(tmp_path / "copy")
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    (shard,) = copy.glob("*.array_record")
    size = shard.stat().length
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"has {size - 1:,} bytes, expected {size:,} bytes; remove"):
        open_soft_labels(copy)
    shard.unlink()
    with pytest.raises(UserError, match=f"is missing, expected {size:,} bytes"):
        open_soft_labels(copy)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 1}', '{"format": 9, "data": {}}'])
def test_a_manifest_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged \(.*\); fix it, or make"):
        open_soft_labels(absolute(tmp_path))


def test_a_manifest_says_what_was_stored(folder):
    manifest = open_soft_labels(folder).manifest
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest and manifest.data.class_names == tuple("0123456789")
    before = manifest.to_json()
    del before["data"]["class_names"]  # as stores were written that did not keep them
    assert Manifest.from_json(before).data.digest == manifest.data.digest
    full = dataclasses.replace(manifest, keep="full")
    assert full.layout.itemsize == 8 + 1 + 2 * 10
    assert manifest.layout.itemsize == 8 + 1 + 4 * (2 + 2)


def test_labels_of_other_classes_are_refused_with_the_first_that_differs(digits, folder):
    labels, config = open_soft_labels(folder), recipe(folder)
    config.data.update(name="digits", train_split="train[:200]")
    check_same_data(labels, digits, config)
    other = copy.copy(digits)
    other.class_names = [*"0123", "for", *"56789"]
    with pytest.raises(UserError, match="of other classes: class 4 is '4' there and 'for' in the"):
        check_same_data(labels, other, config)


def test_a_batch_that_splits_the_crops_of_an_image_is_refused(digits, folder):
    config = recipe(folder)
    with pytest.raises(UserError, match=r"8 devices, .* config.data.crops_per_image=2 .*; use 32"):
        train_loader(digits, config, SIZE, 24, sharding(jax.devices()), start_step=0)
