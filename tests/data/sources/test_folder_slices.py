import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sret_jax.data.sources.folder_slices import stratified_order
from sret_jax.data.sources.source import open_source
from sret_jax.distillation.label_manifest import DataFacts
from sret_jax.errors import UserError


def records(root, split, **options):
    """The contents of a folder's split: (file, label) of each image."""
    source = open_source(str(root), split, None, **options)
    return [(source.record_name(i), source[i]["label"]) for i in range(len(source))]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=12))
def test_every_prefix_has_its_share_of_each_class_to_less_than_an_image(counts):
    order = stratified_order(counts)
    so_far = np.cumsum(order[:, None] == np.arange(len(counts)), axis=0)  # (N, classes)
    shares = np.arange(1, len(order) + 1)[:, None] * np.array(counts) / len(order)
    assert np.array_equal(so_far[-1], counts)
    assert np.abs(so_far - shares).max() < 1


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
        assert len(open_source(str(ten_images), split, None)) > 0
    except UserError as e:
        assert str(e)


@given(st.integers(0, 100), st.integers(0, 100))
def test_complementary_slices_are_disjoint_and_together_whole(ten_images, first, last):
    first, last = sorted((first, last))
    whole = records(ten_images, "train")
    parts = []
    for part in (f"train[:{first}%]", f"train[{first}%:{last}%]", f"train[{last}%:]"):
        try:
            parts += records(ten_images, part)
        except UserError as e:
            assert "is empty" in str(e)
    assert sorted(parts) == sorted(whole)


@given(st.integers(-10, 10), st.integers(-10, 10))
def test_a_slice_has_as_many_images_as_that_of_a_list_in_the_same_order(ten_images, first, last):
    whole = records(ten_images, "train")
    try:
        part = records(ten_images, f"train[{first}:{last}]")
    except UserError:
        part = []
    assert len(part) == len(whole[first:last])
    assert part == [record for record in whole if record in part]
    labels = [label for _, label in part]
    assert abs(labels.count(0) - labels.count(1)) <= 2


def test_a_slice_does_not_depend_on_where_the_folder_lies_or_how_it_is_listed(tmp_path):
    files = [f"{name}/{i}.jpg" for name in "abc" for i in range(7)]
    taken = []
    for root, order in ((tmp_path / "one", files), (tmp_path / "other" / "two", files[::-1])):
        for file in order:
            (root / "train" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "train" / file).write_bytes(b"")
        taken.append([(f.removeprefix(str(root)), n) for f, n in records(root, "train[:30%]")])
    assert taken[0] == taken[1]
    # No later version may move an image from a training slice to a test slice.
    assert [file for file, _ in taken[0]] == [
        f"/train/{name}/{i}.jpg" for name in "abc" for i in (1, 4)
    ]


def test_folders_slice_as_tfds_does(folder):
    assert len(records(folder, "train[:50%]")) == 6
    assert len(records(folder, "train[-2:]")) == 2
    assert len(records(folder, "train+val[:1]")) == 13


def test_listed_slices_are_parts_of_the_list_and_stored_labels_of_them_are_of_other_images(folder):
    whole = records(folder, "train")
    assert records(folder, "train[:5]", folder_slices="listed") == whole[:5]
    assert records(folder, "train[:5]") != whole[:5]
    facts = [
        DataFacts.of(
            open_source(str(folder), "train[:5]", None, folder_slices=slices), "", ""
        ).digest
        for slices in ("listed", "stratified")
    ]
    assert facts[0] != facts[1]
    with pytest.raises(UserError, match="folder_slices='sorted' must be 'stratified' or 'listed'"):
        records(folder, "train", folder_slices="sorted")
