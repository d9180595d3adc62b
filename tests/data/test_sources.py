import os
import pathlib
import shutil
import socket

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from sret_jax.data import order, sources
from sret_jax.data.images import EvalTransform, decode
from sret_jax.errors import UserError
from tests.archives import encode, photographs


def test_the_embedded_digits_are_scikit_learns_split_by_index(digits_dir):
    scans = load_digits()
    train = sources.open_source("digits", "train", digits_dir)
    test = sources.open_source("digits", "test", digits_dir)
    assert (len(train), len(test)) == (1438, 359)
    assert test.class_names == [str(i) for i in range(10)]
    for k in (0, 7, 358):
        record = test[k]
        assert record["label"] == scans.target[5 * k + 4]
        expected = np.round(scans.images[5 * k + 4] * 255 / 16)
        assert np.array_equal(np.asarray(decode(record["image"]))[:, :, 0], expected)


def test_a_damaged_record_is_named_with_the_mend(digits_dir, tmp_path):
    shutil.copytree(digits_dir, tmp_path / "data")
    (shard,) = (tmp_path / "data").rglob("digits-test.array_record*")
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))
    source = sources.open_source("digits", "test", epath.Path(tmp_path / "data"))
    with pytest.raises(UserError, match=r"record 358 of digits/1.0.0 test is damaged \(.*\); prep"):
        source[358]


def test_tfds_slicing_chooses_a_part(digits_dir):
    assert len(sources.open_source("digits", "train[:50%]", digits_dir)) == 719
    part = sources.open_source("digits", "train[10:20]", digits_dir)
    whole = sources.open_source("digits", "train", digits_dir)
    assert [part[i] for i in range(10)] == [whole[10 + i] for i in range(10)]


@pytest.fixture
def folder(tmp_path):
    for split, per_class in (("train", 4), ("val", 2)):
        for name in ("cat", "ape", "ünder"):
            (tmp_path / split / name).mkdir(parents=True)
            for i, photo in enumerate(photographs(per_class, seed=len(name))):
                suffix, form = (".png", "PNG") if i == 1 else (".JPG", "JPEG")
                (tmp_path / split / name / f"{i}{suffix}").write_bytes(encode(photo, form))
    return tmp_path


def test_a_folder_of_class_folders_reads_as_tfds_image_folder_does(folder):
    import tensorflow_datasets as tfds

    source = sources.open_source(str(folder), "train", None)
    theirs = tfds.ImageFolder(str(folder))
    assert source.class_names == theirs.info.features["label"].names == ["ape", "cat", "ünder"]
    assert len(source) == theirs.info.splits["train"].num_examples == 12
    assert [source[i]["label"] for i in range(12)] == [0] * 4 + [1] * 4 + [2] * 4
    assert decode(source[0]["image"]).mode == "RGB"
    assert source.record_name(4).endswith("train/cat/0.JPG")
    assert len(sources.open_source(str(folder), "val", None)) == 6


def test_hidden_files_are_passed_over(folder):
    (folder / "train" / "cat" / ".hidden.jpg").write_bytes(b"")
    (folder / "train" / ".DS_Store").write_bytes(b"")
    assert len(sources.open_source(str(folder), "train", None)) == 12


def test_images_in_subfolders_belong_to_their_class(folder):
    (folder / "train" / "cat" / "ginger" / "old").mkdir(parents=True)
    (folder / "train" / "cat" / ".cache").mkdir()
    photo = encode(photographs(1, seed=0)[0])
    (folder / "train" / "cat" / "ginger" / "old" / "tom.jpeg").write_bytes(photo)
    (folder / "train" / "cat" / ".cache" / "thumb.jpg").write_bytes(photo)
    (folder / "train" / "cat" / "notes.txt").write_bytes(b"")
    source = sources.open_source(str(folder), "train", None)
    nested = [i for i in range(len(source)) if source.record_name(i).endswith("tom.jpeg")]
    assert len(source) == 13 and [source[i]["label"] for i in nested] == [1]


def test_a_class_without_images_is_named(folder):
    (folder / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"no images .* of the class 'dog' in its split 'train'; "):
        sources.open_source(str(folder), "train", None)
    assert len(sources.open_source(str(folder), "val", None)) == 6


def test_classes_come_from_the_splits_that_are_used(folder):
    (folder / "docs" / "figures").mkdir(parents=True)
    (folder / "docs" / "figures" / "plot.png").write_bytes(b"")
    names = ["ape", "cat", "ünder"]
    assert sources.open_source(str(folder), "train", None).class_names == names
    assert sources.open_source(str(folder), "train+val", None).class_names == names
    assert sources.open_source(str(folder), "all", None).class_names == [
        "ape",
        "cat",
        "figures",
        "ünder",
    ]


def test_a_split_is_labelled_by_the_names_it_is_opened_with(folder, digits_dir):
    shutil.rmtree(folder / "val" / "ape")
    given = ["ünder", "yak", "cat"]
    source = sources.open_source(str(folder), "val", None, given)
    assert [source[i]["label"] for i in range(len(source))] == [2, 2, 0, 0]
    assert source.class_names == given and source.classes_here == ["cat", "ünder"]

    backwards = [str(digit) for digit in reversed(range(10))]
    plain = sources.open_source("digits", "test", digits_dir)
    renamed = sources.open_source("digits", "test", digits_dir, ["none", *backwards])
    assert [renamed[i]["label"] for i in range(9)] == [10 - plain[i]["label"] for i in range(9)]
    assert renamed.classes_here == plain.class_names and renamed.class_names[0] == "none"


def test_a_class_that_was_not_trained_on_is_named_with_its_likely_twin(folder, digits_dir):
    with pytest.raises(UserError, match=r"val' of .* has the classes 'ape', which are not among"):
        sources.open_source(str(folder), "val", None, ["cat", "ünder"])
    with pytest.raises(UserError, match=r"\('Cat ', 'ape', 'ünder'\); 'cat' may be 'Cat '; rename"):
        sources.open_source(str(folder), "val", None, ["Cat ", "ape", "ünder"])
    with pytest.raises(UserError, match=r"'digits/1.0.0 test' has the classes '8'; '9', which"):
        sources.open_source("digits", "test", digits_dir, [str(digit) for digit in range(8)])


def test_folders_slice_as_tfds_does(folder):
    assert len(sources.open_source(str(folder), "train[:50%]", None)) == 6
    assert len(sources.open_source(str(folder), "train[-2:]", None)) == 2
    assert len(sources.open_source(str(folder), "train+val[:1]", None)) == 13


def test_what_is_missing_is_named_with_the_mend(folder, tmp_path, digits_dir):
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
            sources.open_source(*arguments)


SPLITS = st.sampled_from(
    ["train", "val", "all", "[", ":", "]", "%", "+", "-", "50", "1", "(", "abs"]
)


@pytest.fixture(scope="module")
def ten_images(tmp_path_factory):
    root = tmp_path_factory.mktemp("ten")
    for split, name in (("train", "a"), ("train", "b"), ("val", "a")):
        (root / split / name).mkdir(parents=True)
        for i in range(5):
            (root / split / name / f"{i}.jpg").write_bytes(b"")
    return root


@given(st.text(max_size=20) | st.lists(SPLITS, max_size=9).map("".join))
def test_whatever_the_split_it_is_a_part_or_one_sentence(ten_images, split):
    try:
        assert len(sources.open_source(str(ten_images), split, None)) > 0
    except UserError as e:
        assert str(e)


@given(st.integers(-10, 10), st.integers(-10, 10))
def test_a_slice_is_that_of_a_list(ten_images, first, last):
    whole = sources.open_source(str(ten_images), "train", None)
    expected = [whole.record_name(i) for i in range(10)][first:last]
    try:
        part = sources.open_source(str(ten_images), f"train[{first}:{last}]", None)
        names = [part.record_name(i) for i in range(len(part))]
    except UserError:
        names = []
    assert names == expected


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
    source = sources.open_source(str(folder), "train", None)
    (cats / "vanished.jpg").unlink()
    stream = samples(source)
    bad = [pathlib.Path(source.record_name(i)).name for i in range(len(source)) if stream[i]["bad"]]
    kinds = ("dangling", "device", "itself", "pipe", "socket", "sparse", "vanished")
    assert bad == [f"{kind}.jpg" for kind in kinds]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_an_unreadable_image_and_a_folder_is_refused(folder):
    (folder / "train" / "ape" / "0.JPG").chmod(0)
    assert samples(sources.open_source(str(folder), "train", None))[0]["bad"]
    (folder / "train" / "ape").chmod(0)
    with pytest.raises(UserError, match=r"train/ape cannot be listed \(Permission denied\); mend"):
        sources.open_source(str(folder), "train", None)
    (folder / "train" / "ape").chmod(0o700)


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../..", "loop", "other"])
def test_links_that_lead_in_circles_are_refused(target, folder):
    cats = folder / "train" / "cat"
    (cats / "other").mkdir()
    (cats / "other" / "back").symlink_to("..")
    (cats / "loop").symlink_to(target)
    with pytest.raises(
        UserError, match=r"/cat/(loop|other/back|loop/back) leads to .*; remove the link"
    ):
        sources.open_source(str(folder), "train", None)


def test_a_link_to_a_folder_elsewhere_is_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "9.jpg").write_bytes(encode(photographs(1, seed=0)[0]))
    (folder / "train" / "cat" / "more").symlink_to(elsewhere)
    (folder / "train" / "cat" / "nothing").symlink_to("nothing")
    (folder / "val" / "elk").symlink_to("elk")
    (folder / "train" / "elk").symlink_to(elsewhere)
    assert len(sources.open_source(str(folder), "train", None)) == 14


def test_a_file_named_as_a_class_of_another_split_is_passed_over(folder):
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "rex.jpg").write_bytes(b"")
    (folder / "val" / "dog").write_bytes(b"no folder")
    assert len(sources.open_source(str(folder), "val", None)) == 6


def test_names_that_are_no_text_are_shown_escaped(folder):
    name = os.fsdecode(b"caf\xe9")
    (folder / "train" / name).mkdir()
    (folder / "train" / name / f"{name}.jpg").write_bytes(b"")
    source = sources.open_source(str(folder), "train", None)
    assert source.class_names[1] == r"caf\xe9"
    names = [source.record_name(i) for i in range(len(source))]
    assert any(name.endswith(r"caf\xe9/caf\xe9.jpg") for name in names)
    assert all(name.encode() for name in names)
