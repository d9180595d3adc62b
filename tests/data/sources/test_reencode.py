"""A smaller copy of a prepared data set trains like the data set itself."""

import io
import json
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from sret_jax.data.sources import reencode
from sret_jax.data.sources.source import find_builder, open_source
from sret_jax.data.views.images import decode
from sret_jax.tools import prepare
from tests import archives
from tests.conftest import ROOT, run_python
from tests.tools.test_prepare import fails

COMMAND = ("-m", "sret_jax.tools.prepare")
MAX_SIDE = 128
SMALL, BROKEN, TURNED = "00000002", "00000003", "00000004"


def copy(data_dir, copy_to, name="digits", **settings):
    options = [f"--{option}={value}" for option, value in settings.items()]
    prepare.main([name, f"--data_dir={data_dir}", f"--copy_to={copy_to}", *options])


def turned_photograph() -> bytes:
    """A photograph from a camera that was held sideways."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    archives.photographs(1, seed=5)[0].save(file, "JPEG", exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A data_dir of an ImageNet with a small, a broken and a turned image."""
    folder = epath.Path(tmp_path_factory.mktemp("imagenet"))
    small = archives.photographs(1, seed=4)[0].resize((MAX_SIDE, 90))
    archives.write_imagenet(
        pathlib.Path(folder / "archives"),
        **{
            f"ILSVRC2012_val_{SMALL}.JPEG": archives.encode(small),
            f"ILSVRC2012_val_{BROKEN}.JPEG": turned_photograph()[:3000],
            f"ILSVRC2012_val_{TURNED}.JPEG": turned_photograph(),
        },
    )
    data = folder / "data"
    prepare.prepare(find_builder("imagenet2012", data), folder / "archives")
    return data


@pytest.fixture(scope="module")
def smaller(imagenet):
    """The data_dir of the smaller copy, made by the command."""
    folder = imagenet.parent / "smaller"
    done = run_python(
        *COMMAND,
        "imagenet2012",
        f"--data_dir={imagenet}",
        f"--max_side={MAX_SIDE}",
        f"--copy_to={folder}",
    )
    assert done.returncode == 0, done.stderr
    assert "Images: 26 shrunk, 1 copied, 1 unreadable and copied too" in done.stdout
    assert f"Ready: imagenet2012/5.1.0 in {folder}" in done.stdout
    return folder


def pairs(imagenet, smaller):
    """Name, bytes and bytes in the copy of every image."""
    for split in ("train", "validation"):
        before = open_source("imagenet2012", split, imagenet)
        after = open_source("imagenet2012", split, smaller)
        assert len(before) == len(after)
        for i in range(len(before)):
            yield before.record_name(i), before[i]["image"], after[i]["image"]


def test_the_copy_has_the_same_records_in_the_same_order(imagenet, smaller):
    for split in ("train", "validation"):
        before = open_source("imagenet2012", split, imagenet)
        after = open_source("imagenet2012", split, smaller)
        assert after.class_names == before.class_names
        assert [(after.record_name(i), after[i]["label"]) for i in range(len(after))] == [
            (before.record_name(i), before[i]["label"]) for i in range(len(before))
        ]


def test_a_large_image_shows_the_same_on_fewer_pixels(imagenet, smaller):
    for name, before, after in pairs(imagenet, smaller):
        if SMALL in name or BROKEN in name:
            continue
        stored = Image.open(io.BytesIO(after))
        assert (stored.format, stored.mode) == ("JPEG", "RGB")
        assert not stored.getexif()
        assert max(stored.size) == MAX_SIDE
        original = decode(before)
        assert stored.width / stored.height == pytest.approx(
            original.width / original.height, rel=0.01
        )
        expected = original.resize(stored.size, Image.Resampling.BICUBIC)
        difference = np.asarray(stored, float) - np.asarray(expected, float)
        assert np.abs(difference).mean() < 6, name


def test_small_and_unreadable_images_are_copied_byte_for_byte(imagenet, smaller):
    kept = [
        name.split("_")[-1] for name, before, after in pairs(imagenet, smaller) if before == after
    ]
    assert sorted(kept) == [f"{SMALL}.JPEG", f"{BROKEN}.JPEG"]


def test_tfds_knows_the_copy_by_its_format_and_size(smaller):
    builder = tfds.builder("imagenet2012", data_dir=smaller)
    assert builder.info.file_format.value == "array_record"
    for split in builder.info.splits.values():
        size = sum(path.stat().length for path in split.filepaths)
        assert 0 < split.num_bytes <= size
        assert split.num_bytes == pytest.approx(size, abs=2**17)  # ArrayRecord pads its blocks


def test_a_lower_quality_takes_less_space(imagenet):
    folder = imagenet.parent
    copy(imagenet, folder / "low", "imagenet2012", max_side=MAX_SIDE, quality=20)
    copy(imagenet, folder / "high", "imagenet2012", max_side=MAX_SIDE, quality=95)
    low, high = (
        tfds.builder("imagenet2012", data_dir=folder / name).info.dataset_size
        for name in ("low", "high")
    )
    assert low < high / 2


def test_tfrecord_data_are_copied_as_array_record(tmp_path, digits_dir):
    find_builder("digits", digits_dir)  # registers the data set
    tfds.builder("digits", data_dir=tmp_path, file_format="tfrecord").download_and_prepare()
    copy(tmp_path, tmp_path / "smaller", max_side=4)
    before = open_source("digits", "train", digits_dir)
    after = open_source("digits", "train", epath.Path(tmp_path / "smaller"))
    assert len(after) == len(before)
    for i in range(0, len(after), 100):
        assert after[i]["label"] == before[i]["label"]
        assert decode(after[i]["image"]).size == (4, 4)


def as_left_by_an_interruption(target: epath.Path, lost: str) -> epath.Path:
    """Undoes the shard of the split `lost` in a finished copy, as if it had been interrupted."""
    partial = target.with_name("incomplete." + target.name)
    target.replace(partial)
    provenance = json.loads((partial / reencode.PROVENANCE).read_text())
    (shard,) = partial.glob(f"*-{lost}.array_record-*")
    shard.rename(shard.with_name("incomplete." + shard.name))
    del provenance["shards"][shard.name]
    (partial / reencode.PROVENANCE).write_text(json.dumps(provenance))
    return partial


def test_an_interrupted_copy_continues_with_the_shards_left(tmp_path, digits_dir, capsys):
    copy(digits_dir, tmp_path, max_side=4)
    totals = capsys.readouterr().out.splitlines()[-2]
    target = epath.Path(tmp_path) / "digits" / "1.0.0"
    partial = as_left_by_an_interruption(target, lost="test")
    (kept,) = partial.glob("*-train.array_record-*")
    written = kept.stat().mtime
    with pytest.raises(ValueError, match="is not prepared"):
        open_source("digits", "train", epath.Path(tmp_path))

    copy(digits_dir, tmp_path, max_side=4)
    assert capsys.readouterr().out.splitlines()[-2] == totals
    assert (target / kept.name).stat().mtime == written
    assert not list(target.glob("incomplete.*")) and not partial.exists()
    assert len(open_source("digits", "test", epath.Path(tmp_path))) == 359

    copy(digits_dir, tmp_path, max_side=4)  # a further call finds nothing to do
    assert "Re-encoding" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for the workers")
def test_a_killed_command_leaves_no_worker_and_starts_again(tmp_path, digits_dir):
    options = ("digits", f"--data_dir={digits_dir}", f"--copy_to={tmp_path}", "--max_side=4")
    process = subprocess.Popen([sys.executable, *COMMAND, *options], cwd=ROOT)
    deadline = time.time() + 60
    while not list(tmp_path.glob("digits/*/*.array_record-*")) and time.time() < deadline:
        time.sleep(0.001)
    workers = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    process.wait()
    assert workers
    while any(map(is_running, workers)) and time.time() < deadline:
        time.sleep(0.01)
    assert not any(map(is_running, workers))
    assert [p.name for p in (tmp_path / "digits").iterdir()] == ["incomplete.1.0.0"]

    copy(digits_dir, tmp_path, max_side=4)
    assert len(open_source("digits", "train", epath.Path(tmp_path))) == 1438


def is_running(pid: str) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")")[-1].split()[0] != "Z"
    except OSError:
        return False


def test_a_copy_begun_with_other_settings_is_refused(tmp_path, digits_dir, capsys):
    options = ("digits", f"--data_dir={digits_dir}", f"--copy_to={tmp_path}")
    copy(digits_dir, tmp_path, max_side=8, quality=80)
    begun = "was begun with --max_side=8 --quality=80; give the same"
    assert begun in fails(capsys, *options, "--max_side=8")
    assert begun in fails(capsys, *options, "--max_side=7", "--quality=80")
    as_left_by_an_interruption(epath.Path(tmp_path) / "digits" / "1.0.0", lost="train")
    assert begun in fails(capsys, *options, "--max_side=8", "--quality=81")


@pytest.mark.parametrize(
    "text", ["", '{"settings"', "[]", '{"settings": {"side": 8}, "shards": {}}']
)
def test_a_damaged_record_of_a_copy_is_refused(text, tmp_path, digits_dir, capsys):
    options = ("digits", f"--data_dir={digits_dir}", f"--copy_to={tmp_path}", "--max_side=8")
    partial = tmp_path / "digits" / "incomplete.1.0.0"
    partial.mkdir(parents=True)
    (partial / reencode.PROVENANCE).write_text(text)
    error = fails(capsys, *options)
    assert "reencoded.json is damaged (" in error and f"remove {partial} and make" in error


def test_a_preparation_is_never_overwritten(tmp_path, digits_dir, capsys):
    find_builder("digits", epath.Path(tmp_path)).download_and_prepare()
    options = ("digits", "--max_side=4", f"--data_dir={digits_dir}")
    assert "holds another preparation" in fails(capsys, *options, f"--copy_to={tmp_path}")
    for same in (digits_dir, digits_dir / ".." / digits_dir.name):
        error = fails(capsys, *options, f"--copy_to={same}")
        assert "contains the data set itself" in error


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--max_side=4"], "add --copy_to=DIR"),
        (["--max_side=0", "--copy_to=x"], "--max_side=0 must be at least 1 pixel"),
        (["--max_side=4", "--copy_to=x", "--quality=0"], "--quality=0 must be a JPEG quality"),
        (["--max_side=4", "--copy_to=x", "--quality=101"], "JPEG quality from 1 to 100"),
        (["--quality=90"], "add --max_side=PIXELS"),
        (["--copy_to=x"], "add --max_side=PIXELS"),
        (["--max_side=4", "--copy_to=x", "--convert"], "exclude each other"),
        (["--max_side=4", "--copy_to=x"], "is not prepared in"),
    ],
)
def test_what_cannot_be_copied_is_refused_in_a_sentence(options, sentence, tmp_path, capsys):
    assert sentence in fails(capsys, "digits", f"--data_dir={tmp_path}", *options)
    assert not list(tmp_path.iterdir())
