import os
import pathlib
import shutil
import socket

import numpy as np
import pytest
from etils import epath
from sklearn.datasets import load_digits

from sret_jax.data import order
from sret_jax.data.sources.source import open_source
from sret_jax.data.views.images import EvalTransform, decode
from sret_jax.errors import UserError
from tests.archives import encode, photographs


def test_the_embedded_digits_are_scikit_learns_split_by_index(digits_dir):
    scans = load_digits()
    train = open_source("digits", "train", digits_dir)
    test = open_source("digits", "test", digits_dir)
    assert (len(train), len(test)) == (1438, 359)
    assert test.class_names == [str(i) for i in range(10)]
    for k in (0, 7, 358):
        record = test[k]
        assert record["label"] == scans.target[5 * k + 4]
        expected = np.round(scans.images[5 * k + 4] * 255 / 16)
        assert np.array_equal(np.asarray(decode(record["image"]))[:, :, 0], expected)


def test_a_damaged_record_is_named_with_the_fix(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "data")
    (shard,) = (tmp_path / "data").rglob("digits-test.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    source = open_source("digits", "test", epath.Path(tmp_path / "data"))
    with pytest.raises(UserError, match=r"record 358 of digits/1.0.0 test is damaged \(.*\); prep"):
        source[358]


def test_tfds_slicing_chooses_a_part(digits_dir):
    assert len(open_source("digits", "train[:50%]", digits_dir)) == 719
    part = open_source("digits", "train[10:20]", digits_dir)
    whole = open_source("digits", "train", digits_dir)
    assert [part[i] for i in range(10)] == [whole[10 + i] for i in range(10)]


def test_a_folder_of_class_folders_reads_as_tfds_image_folder_does(folder):
    import tensorflow_datasets as tfds

    source = open_source(str(folder), "train", None)
    theirs = tfds.ImageFolder(str(folder))
    assert source.class_names == theirs.info.features["label"].names == ["ape", "cat", "ünder"]
    assert len(source) == theirs.info.splits["train"].num_examples == 12
    assert [source[i]["label"] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert decode(source[0]["image"]).mode == "RGB"
    assert source.record_name(4).endswith("train/cat/0.JPG")
    assert len(open_source(str(folder), "val", None)) == 6


def test_what_is_missing_is_named_with_the_fix(folder, tmp_path, digits_dir):
    data_dir = epath.Path(tmp_path) / "tfds"
    cases = [
        (("digitz", "train", data_dir), "unknown data set 'digitz'; did you mean 'digits'"),
        (("mnist", "train", data_dir), "mnist is not prepared .*tools.prepare mnist --data_dir="),
        (("imagenet2012", "train", data_dir), "tools.prepare imagenet2012 .*--archives=DIR"),
        (("digits", "tset", digits_dir), "has no split 'tset'; it has: train, test"),
        (("/no/such/folder", "train", None), "the data folder /no/such/folder does not exist"),
        (
            (str(folder), "test", None),
            "has no folder 'test' but 'train', 'val'; set config.data.train_split and .* or make",
        ),
        (("digits/big", "train", digits_dir), "TFDS cannot open 'digits/big'"),
        (("digits", "train[5:3]", digits_dir), "has no split"),
        (("digits", "all[0]", digits_dir), r"has no split 'all\[0\]'; it has: train, test"),
        ((str(folder), "all[0]", None), r"cannot read the split 'all\[0\]'"),
        ((str(folder), "train[:x%]", None), r"cannot read the split 'train\[:x%\]'"),
        ((str(folder), "train[:0]", None), "is empty"),
        (("foo://bucket/images", "train", None), "there is no storage 'foo://'"),
    ]
    for arguments, message in cases:
        with pytest.raises(UserError, match=message):
            open_source(*arguments)


def samples(source):
    transform = EvalTransform(8, 1.0)
    return order.Samples(order.padded(source, 1), transform, 8, seed=0, replace=False)


def test_what_is_no_readable_file_counts_as_an_unreadable_image(folder):
    cats = folder / "train" / "cat"
    (cats / "dangling.jpg").symlink_to("nowhere.jpg")
    (cats / "itself.jpg").symlink_to("itself.jpg")
    (cats / "device.jpg").symlink_to("/dev/zero")
    os.mkfifo(cats / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(cats / "socket.jpg"))
    with (cats / "sparse.jpg").open("wb") as file:
        file.truncate(1 << 40)
    (cats / "vanished.jpg").write_bytes(encode(photographs(1, seed=0)[0]))
    (cats / "linked.jpg").symlink_to("0.JPG")
    source = open_source(str(folder), "train", None)
    (cats / "vanished.jpg").unlink()
    stream = samples(source)
    bad = [pathlib.Path(source.record_name(i)).name for i in range(len(source)) if stream[i]["bad"]]
    kinds = ("dangling", "device", "itself", "pipe", "socket", "sparse", "vanished")
    assert bad == [f"{kind}.jpg" for kind in kinds]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_unreadable_image_and_a_folder_is_refused(folder):
    (folder / "train" / "ape" / "0.JPG").chmod(0)
    assert samples(open_source(str(folder), "train", None))[0]["bad"]
    (folder / "train" / "ape").chmod(0)
    with pytest.raises(UserError, match=r"train/ape cannot be listed \(Permission denied\); fix"):
        open_source(str(folder), "train", None)
    (folder / "train" / "ape").chmod(0o700)


def test_names_that_are_no_text_are_shown_escaped(folder):
    name = os.fsdecode(b"caf\xe9")
    (folder / "train" / name).mkdir()
    (folder / "train" / name / f"{name}.jpg").write_bytes(b"")
    source = open_source(str(folder), "train", None)
    assert source.class_names[1] == r"caf\xe9"
    names = [source.record_name(i) for i in range(len(source))]
    assert any(name.endswith(r"caf\xe9/caf\xe9.jpg") for name in names)
    assert all(name.encode() for name in names)


def test_digits_keep_their_identity_whatever_encodes_them(digits_dir):
    for split, size in (("train", "224.20 KiB"), ("test", "55.96 KiB")):
        source = open_source("digits", split, digits_dir)
        assert next(source.identities()) == f"digits/1.0.0 {split} of {size} bytes 0"
