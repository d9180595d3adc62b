import pathlib
import shutil

import pytest

from sret_jax.data.sources.image_files import images_in
from sret_jax.data.sources.source import open_source
from sret_jax.errors import UserError
from tests.archives import encode, photographs


def make(root, *files):
    """Creates empty files at paths below `root`."""
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")
    return str(root)


def opened(root, split, classes=None):
    return open_source(str(root), split, None, classes)


def names(source):
    return [pathlib.Path(source.record_name(i)).name for i in range(len(source))]


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_format_that_can_be_read_counts_in_any_case(split, tmp_path):
    read = ["1.jpg", "2.JPEG", "3.jpe", "4.JFIF", "5.png", "6.Gif", "7.webp", "8.BMP"]
    others = ["a.heic", "b.HEIC", "c.HEIC", "d.tif", "e.Tif", "notes"]
    make(tmp_path, *(f"{split}/{name}/{file}" for name in "ab" for file in read + others))
    source = opened(tmp_path, split)
    assert sorted(names(source)) == sorted(2 * read)
    (remark,) = source.remarks
    assert remark.startswith(f"{tmp_path}/{split}: files that are not read (.jpg, ")
    assert remark.endswith(": 6 .heic; 4 .tif; 2 without a suffix.")
    found = images_in(tmp_path)
    assert len(found.files) == 16 and found.passed_over == {".heic": 6, ".tif": 4, "": 2}


def test_what_systems_leave_behind_is_passed_over_in_silence(tmp_path):
    make(
        tmp_path,
        *("train/cat/1.jpg", "train/dog/2.jpg", "__MACOSX/train/cat/._1.jpg", "Thumbs.db"),
        *("train/@eaDir/1.jpg", "train/cat/.ipynb_checkpoints/1-checkpoint.jpg", "train/.DS_Store"),
        *("train/cat/@eaDir/1.jpg/thumb.jpg", "train/dog/Thumbs.db", "train/lost+found/3.jpg"),
    )
    for split in ("train", "all"):
        source = opened(tmp_path, split)
        assert (source.class_names, len(source), source.remarks) == (["cat", "dog"], 2, [])


def test_a_folder_without_splits_is_one_split_that_can_be_sliced(tmp_path):
    root = make(tmp_path, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(5)))
    assert len(opened(root, "train")) == len(opened(root, "all")) == 10
    train, test = opened(root, "train[:80%]"), opened(root, "train[80%:]", ["cat", "dog"])
    assert (len(train), len(test), train.class_names) == (8, 2, ["cat", "dog"])
    with pytest.raises(UserError, match=r"no folder 'val': its folders \('cat', 'dog'\) hold im"):
        opened(root, "val")
    with pytest.raises(UserError, match=r"--config.data.eval_split='train\[80%:\]'"):
        opened(root, "val")


def test_a_folder_of_the_training_split_alone_is_to_be_sliced(tmp_path):
    root = make(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg")
    with pytest.raises(UserError, match=r"no folder 'val' but 'train'; slice it, .*train\[:80%\]'"):
        opened(root, "val")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            ["val/1.jpg", "val/2.jpg"],
            r"/val holds 2 images but no folder for each class; sort the",
        ),
        (["val/notes.txt"], r"/val holds no images \(.jpg, .*\) but 1 .txt files; lay it out as"),
        (["val/cat/1.heic"], r"/val holds no images \(.jpg, .*\) but 1 .heic files; lay it out as"),
    ],
)
def test_a_split_without_images_in_class_folders_is_explained(files, message, tmp_path):
    root = make(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", *files)
    with pytest.raises(UserError, match=message):
        opened(root, "val", ["cat", "dog"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["1.jpg"], "holds images but no folders; lay it out as"),
        ([".hidden"], "holds no folders of images; lay it out as"),
    ],
)
def test_a_folder_without_folders_is_explained(files, message, tmp_path):
    with pytest.raises(UserError, match=message):
        opened(make(tmp_path, *files), "train")


def test_a_folder_unpacked_into_one_of_its_own_name_is_read(tmp_path):
    root = make(
        tmp_path / "intel",
        *(f"intel/seg_{s}/seg_{s}/{name}/1.jpg" for s in ("train", "test") for name in "ab"),
    )
    assert opened(root, "seg_train").class_names == ["a", "b"]
    assert len(opened(root, "seg_test", ["a", "b"])) == 2


def test_test_images_in_one_folder_are_no_class(tmp_path):
    root = make(tmp_path, "train/n01/images/1.JPEG", "train/n02/images/2.JPEG", "val/images/3.JPEG")
    classes = opened(root, "train").class_names
    assert classes == ["n01", "n02"]
    with pytest.raises(UserError, match=r"'images'; the training data have 'n01', 'n02'; .* sort"):
        opened(root, "val", classes)


def test_images_beside_the_class_folders_are_counted(tmp_path):
    root = make(tmp_path, "train/cat/1.jpg", "train/dog/2.jpg", "train/3.jpg", "train/4.png")
    source = opened(root, "train")
    assert names(source) == ["1.jpg", "2.jpg"]
    assert source.remarks == [
        f"{root}/train: 2 images are outside the class folders and are left out."
    ]


@pytest.mark.parametrize(
    ("folders", "classes"),
    [
        ([str(i) for i in range(11)], [str(i) for i in range(11)]),
        (["00", "01", "02"], ["00", "01", "02"]),
        (["1", "2", "10"], ["1", "10", "2"]),  # not from 0 on
        (["0", "1", "10", "x"], ["0", "1", "10", "x"]),
    ],
)
def test_numbered_class_folders_are_labelled_by_their_number(folders, classes, tmp_path):
    root = make(tmp_path, *(f"train/{name}/{name}.jpg" for name in folders))
    source = opened(root, "train")
    assert source.class_names == classes
    for i, file in enumerate(names(source)):
        assert source[i]["label"] == classes.index(file.removesuffix(".jpg"))


def test_hidden_files_are_passed_over(folder):
    (folder / "train" / "cat" / ".hidden.jpg").write_bytes(b"")
    (folder / "train" / ".DS_Store").write_bytes(b"")
    assert len(open_source(str(folder), "train", None)) == 12


def test_images_in_subfolders_belong_to_their_class(folder):
    (folder / "train" / "cat" / "ginger" / "old").mkdir(parents=True)
    (folder / "train" / "cat" / ".cache").mkdir()
    photo = encode(photographs(1, seed=0)[0])
    (folder / "train" / "cat" / "ginger" / "old" / "tom.jpeg").write_bytes(photo)
    (folder / "train" / "cat" / ".cache" / "thumb.jpg").write_bytes(photo)
    (folder / "train" / "cat" / "notes.txt").write_bytes(b"")
    source = open_source(str(folder), "train", None)
    nested = [i for i in range(len(source)) if source.record_name(i).endswith("tom.jpeg")]
    assert len(source) == 13 and [source[i]["label"] for i in nested] == [1]


def test_a_class_without_images_is_named(folder):
    (folder / "train" / "dog").mkdir()
    with pytest.raises(UserError, match=r"no images .* of the class 'dog' in its split 'train'; "):
        open_source(str(folder), "train", None)
    assert len(open_source(str(folder), "val", None)) == 6


def test_classes_come_from_the_splits_that_are_used(folder):
    (folder / "docs" / "figures").mkdir(parents=True)
    (folder / "docs" / "figures" / "plot.png").write_bytes(b"")
    names = ["ape", "cat", "ünder"]
    assert open_source(str(folder), "train", None).class_names == names
    assert open_source(str(folder), "train+val", None).class_names == names
    assert open_source(str(folder), "all", None).class_names == [
        "ape",
        "cat",
        "figures",
        "ünder",
    ]


def test_a_split_is_labelled_by_the_names_it_is_opened_with(folder, digits_dir):
    shutil.rmtree(folder / "val" / "ape")
    given = ["ünder", "yak", "cat"]
    source = open_source(str(folder), "val", None, given)
    assert [source[i]["label"] for i in range(len(source))] == [2, 2, 0, 0]
    assert source.class_names == given and source.classes_here == ["cat", "ünder"]

    backwards = [str(digit) for digit in reversed(range(10))]
    plain = open_source("digits", "test", digits_dir)
    renamed = open_source("digits", "test", digits_dir, ["none", *backwards])
    assert [renamed[i]["label"] for i in range(9)] == [10 - plain[i]["label"] for i in range(9)]
    assert renamed.classes_here == plain.class_names and renamed.class_names[0] == "none"


def test_a_class_that_was_not_trained_on_is_named_with_its_likely_twin(folder, digits_dir):
    with pytest.raises(
        UserError, match=r"'val' of .* has a class that the training data lack, 'ape'"
    ):
        open_source(str(folder), "val", None, ["cat", "ünder"])
    with pytest.raises(UserError, match=r"lack, 'cat' \(perhaps 'cat' is 'Cat '\); the "):
        open_source(str(folder), "val", None, ["Cat ", "ape", "ünder"])
    with pytest.raises(
        UserError, match=r"'digits/1.0.0 test' has 2 classes that .*, '8', '9'; the"
    ):
        open_source("digits", "test", digits_dir, [str(digit) for digit in range(8)])


@pytest.mark.parametrize("target", ["..", ".", "../..", "../../..", "loop", "other"])
def test_links_that_lead_in_circles_are_refused(target, folder):
    cats = folder / "train" / "cat"
    (cats / "other").mkdir()
    (cats / "other" / "back").symlink_to("..")
    (cats / "loop").symlink_to(target)
    with pytest.raises(
        UserError, match=r"/cat/(loop|other/back|loop/back) leads to .*; remove the link"
    ):
        open_source(str(folder), "train", None)


def test_a_link_to_a_folder_elsewhere_is_followed(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "9.jpg").write_bytes(encode(photographs(1, seed=0)[0]))
    (folder / "train" / "cat" / "more").symlink_to(elsewhere)
    (folder / "train" / "cat" / "nothing").symlink_to("nothing")
    (folder / "val" / "elk").symlink_to("elk")
    (folder / "train" / "elk").symlink_to(elsewhere)
    assert len(open_source(str(folder), "train", None)) == 14


def test_a_file_named_as_a_class_of_another_split_is_passed_over(folder):
    (folder / "train" / "dog").mkdir()
    (folder / "train" / "dog" / "rex.jpg").write_bytes(b"")
    (folder / "val" / "dog").write_bytes(b"no folder")
    assert len(open_source(str(folder), "val", None)) == 6
