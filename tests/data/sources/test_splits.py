import json
import shutil
import socket
import subprocess
import sys

import pytest
from etils import epath

from sret_jax.data.sources.splits import data_remarks, open_split, other_slices
from sret_jax.errors import UserError
from sret_jax.run.data_record import DATA_FILE, record_images
from sret_jax.run.resume import compare_config
from sret_jax.settings.saved_config import changed_settings, save_description
from sret_jax.training.experiment import open_experiment
from tests.conftest import ROOT


@pytest.fixture
def images(tmp_path):
    """Empty files: 4 training images and 2 test images of each of three classes."""
    root = tmp_path / "images"
    for split, count in (("train", 4), ("val", 2)):
        for name in ("ape", "cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                (root / split / name / f"{i}.jpg").write_bytes(b"")
    return root


@pytest.fixture
def config(tiny_config, images):
    tiny_config.batch_size = tiny_config.eval_batch_size = 16
    tiny_config.data.update(name=str(images), train_split="train", eval_split="val")
    return tiny_config


def opened(config):
    train = open_split(config, epath.Path("/"), config.data.train_split)
    return train, open_split(config, epath.Path("/"), config.data.eval_split, train.class_names)


def test_a_class_that_only_the_test_split_has_ends_the_run(config, images, tmp_path):
    (images / "val" / "dog").rename(images / "val" / "dogs")
    with pytest.raises(UserError, match=r"has a class that the training data lack, 'dogs'; the"):
        open_experiment(config, epath.Path(tmp_path / "run"))


def test_a_training_slice_of_one_class_ends_the_run(config, tmp_path):
    config.data.train_split = "train[:1]"
    with pytest.raises(UserError, match="has 1 class, but a classifier needs at least two"):
        open_experiment(config, epath.Path(tmp_path / "run"))


def test_the_start_says_what_is_doubtful_in_the_data(config, images):
    assert data_remarks(*opened(config)) == []
    shutil.rmtree(images / "val" / "ape")
    (images / "train" / "Dog ").mkdir()
    (images / "train" / "Dog " / "9.jpg").write_bytes(b"")
    (images / "train" / "cat" / "9.heic").write_bytes(b"")
    config.data.train_split = "train[:4]+val"
    remarks = data_remarks(*opened(config))
    assert remarks[0].startswith(f"{images}/train: files that are not read (.jpg, ")
    assert remarks[0].endswith(": 1 .heic.")
    assert remarks[1:] == [
        "The classes 'Dog ' and 'dog' differ only in case or blanks, and are two classes.",
        "There are no training images of 1 of the 4 classes: 'Dog '.",
        "There are no test images of 2 of the 4 classes: 'Dog ', 'ape'.",
        "4 of the 4 test images are training images too, so the test accuracy is not that of new "
        "images.",
    ]


def test_overlapping_slices_of_a_tfds_data_set_are_counted(tiny_config):
    tiny_config.data.update(train_split="train[:90%]", eval_split="train[80%:]")
    (remark,) = data_remarks(*opened(tiny_config))
    assert remark.startswith("144 of the 288 test images are training images too")
    tiny_config.data.update(train_split="train[:80%]")
    assert data_remarks(*opened(tiny_config)) == []


def test_images_added_or_renamed_between_two_starts_are_said(config, images, tmp_path):
    workdir = epath.Path(tmp_path)

    def start(resumes=True):
        return record_images(*opened(config), workdir, resumes=resumes)

    assert start(resumes=False) == start() == []
    assert json.loads((workdir / DATA_FILE).read_text())["train"]["images"] == 12
    (images / "train" / "cat" / "new.jpg").write_bytes(b"")
    (sentence,) = start()
    assert "training images have changed: 12 at the last start, 13 now. From here" in sentence
    assert start() == []
    (images / "val" / "cat" / "0.jpg").rename(images / "val" / "cat" / "5.jpg")
    (sentence,) = start()
    assert (
        "test images have changed: 6 as at the last start, but some are others or ren" in sentence
    )
    config.data.update(train_split="train[:50%]", eval_split="train[50%:]")
    assert "some test images have been trained on" in start()[2]
    (workdir / DATA_FILE).unlink()
    assert "no data.json of an earlier start" in start()[0]
    (workdir / DATA_FILE).write_text("{")
    assert "no data.json of an earlier start" in start()[0]


def test_a_run_keeps_the_slices_that_it_began_with(config, tmp_path):
    workdir = epath.Path(tmp_path / "run")
    config.data.update(train_split="train[:80%]", folder_slices="listed")
    experiment = open_experiment(config, workdir)
    save_description(config, experiment.train_source.class_names, None, workdir)
    assert compare_config(experiment, 1) == []
    config.data.folder_slices = "stratified"
    with pytest.raises(
        UserError, match=r"continue with --config.data.folder_slices=listed, or give"
    ):
        compare_config(experiment, 1)
    assert "(data.folder_slices: listed -> stratified)" in other_slices(
        config, changed_settings(config, workdir)
    )
    config.data.train_split = "train"
    assert other_slices(config, changed_settings(config, workdir)) == ""


OPEN = """
import sys
from etils import epath
from configs import finetune
from sret_jax.errors import UserError
from sret_jax.parallel import distributed
from sret_jax.data.sources.splits import open_split

port, rank, root = sys.argv[1:]
distributed.initialize(f"localhost:{port}", 2, int(rank))
config = finetune.get_config()
config.data.name = root
for split in ("train", "val"):
    try:
        print(len(open_split(config, epath.Path("/"), split)))
    except UserError as e:
        print(e)
"""


def test_processes_that_see_different_images_are_named(images, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    (copy / "val" / "cat").rename(copy / "val" / "cats")
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN, str(port), str(rank), str(root)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, root in enumerate((images, copy))
    ]
    for process in processes:
        train, val = process.communicate(timeout=120)[0].splitlines()[-2:]
        assert train == "12"
        assert "see different images in the split 'val' of " in val
        assert (
            f"process 1 on {socket.gethostname()} has the class 'cats' instead of the 'cat'" in val
        )
