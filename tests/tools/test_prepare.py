"""From ILSVRC-shaped archives to trained and evaluated models, with the published configs."""

import json
import signal
import subprocess
import sys
import tarfile
import time

import pytest
import tensorflow_datasets as tfds
from etils import epath

from sret_jax.data.sources.source import open_source
from sret_jax.data.views.images import decode
from sret_jax.tools import prepare
from tests import archives
from tests.conftest import ROOT, run_commands, run_python


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """A data_dir with the tiny ImageNet, which the command has prepared."""
    folder = tmp_path_factory.mktemp("imagenet")
    archives.write_imagenet(folder / "archives")
    done = run_python(
        "-m",
        "sret_jax.tools.prepare",
        "imagenet2012",
        f"--archives={folder / 'archives'}",
        f"--data_dir={folder / 'data'}",
        tensorflow=True,
    )
    assert done.returncode == 0, done.stderr
    assert "has 532,480 bytes, expected 147,897,477,120" in done.stdout
    assert "Ready: imagenet2012/" in done.stdout
    assert "Generating" in done.stderr  # progress
    return epath.Path(folder / "data")


def test_every_image_of_the_archives_is_there_and_decodes(imagenet):
    train = open_source("imagenet2012", "train", imagenet)
    validation = open_source("imagenet2012", "validation", imagenet)
    assert (len(train), len(validation)) == (18, 10)
    assert len(train.class_names) == 1000
    for source in (train, validation):
        assert all(decode(source[i]["image"]).mode == "RGB" for i in range(len(source)))
    names = {train.record_name(i).split()[-1] for i in range(18)}
    assert "n01440764_0.JPEG" in names
    labels = {train.record_name(i).split()[-1][:9]: train[i]["label"] for i in range(18)}
    assert labels == {s: train.class_names.index(s) for s in archives.SYNSETS}


def train_and_evaluate(imagenet, workdir, config, *flags):
    common = (
        f"--config={config}",
        f"--workdir={workdir}",
        f"--config.data.data_dir={imagenet}",
        "--config.model.dtype=float32",
        "--config.eval_batch_size=4",
        "--config.data.workers=1",
        *flags,
    )
    printed = workdir.parent / "printed"
    printed.mkdir()
    train = ["--config.batch_size=2", "--config.stop_at_step=2", "--config.log_every_steps=1"]
    (done,) = run_commands([["main.py", *common, *train]], printed)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((workdir / "result.json").read_text())
    assert result["step"] == 2
    assert 6 < result["eval"]["loss"] < 9  # ln 1000 = 6.9


def test_the_first_stage_of_sret_t_trains_and_evaluates_on_it_at_224_pixels(imagenet, tmp_path):
    model = dict(blocks="(1,)", groups="((8,2),)", heads="(2,)")
    flags = (f"--config.model.{name}={value}" for name, value in model.items())
    train_and_evaluate(imagenet, tmp_path / "run", "configs/sret_t.py", *flags)


@pytest.mark.slow  # each compiles a whole model twice
@pytest.mark.parametrize(
    "config", ["sret_t.py", "sret_lt.py:groups=16-14-1", "sret_s.py", "sret_s.py:unsliced"]
)
def test_the_whole_imagenet_configs_train_and_evaluate_too(imagenet, tmp_path, config):
    train_and_evaluate(imagenet, tmp_path / "run", f"configs/{config}")


def fails(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        prepare.main([str(a) for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert error[-1].startswith("Error: ")
    return error[-1]


def imagenet_error(capsys, tmp_path, archive_folder):
    return fails(
        capsys, "imagenet2012", f"--archives={archive_folder}", f"--data_dir={tmp_path / 'data'}"
    )


def test_archives_that_are_not_what_they_should_be_are_refused(tmp_path, capsys):
    folder = archives.write_imagenet(tmp_path / "good")
    train, validation = folder / "ILSVRC2012_img_train.tar", folder / "ILSVRC2012_img_val.tar"
    assert "needs --archives=DIR" in fails(capsys, "imagenet2012", f"--data_dir={tmp_path}")

    strange = archives.write_imagenet(tmp_path / "strange", **{"val/readme.txt": b"x"})
    error = imagenet_error(capsys, tmp_path, strange)
    assert "val/readme.txt" in error and "every label would shift" in error

    gap = archives.write_imagenet(tmp_path / "gap", **{"ILSVRC2012_val_00000012.JPEG": b"x"})
    assert "ILSVRC2012_val_00000012.JPEG where number 00000011" in imagenet_error(
        capsys, tmp_path, gap
    )

    train_bytes = train.read_bytes()
    train.write_bytes(b"not a tar" * 1000)
    assert "is not a readable tar archive" in imagenet_error(capsys, tmp_path, folder)
    train.write_bytes(validation.read_bytes())
    assert "expected n########.tar only" in imagenet_error(capsys, tmp_path, folder)
    train.write_bytes(train_bytes)
    validation.unlink()
    assert "ILSVRC2012_img_val.tar is missing" in imagenet_error(capsys, tmp_path, folder)
    assert not list((tmp_path / "data").glob("imagenet2012/*/*.array_record*"))


SPECIAL = {
    "link": dict(type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "hard link": dict(type=tarfile.LNKTYPE, linkname="ILSVRC2012_val_00000001.JPEG"),
    "device": dict(type=tarfile.CHRTYPE, devmajor=1, devminor=5),
    "pipe": dict(type=tarfile.FIFOTYPE),
    "folder": dict(type=tarfile.DIRTYPE),
    "sparse file": dict(pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.size": str(1 << 50)}),
}


def append(path, name, **header):
    info = tarfile.TarInfo(name)
    for key, value in header.items():
        setattr(info, key, value)
    with tarfile.open(path, "a", format=tarfile.PAX_FORMAT) as tar:
        tar.addfile(info)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["n01440765.tar", "ILSVRC2012_val_00000011.JPEG"])
def test_what_is_no_plain_file_in_an_archive_is_refused(name, kind, tmp_path, capsys):
    folder = archives.write_imagenet(tmp_path / "archives")
    append(
        folder / f"ILSVRC2012_img_{'train' if '.tar' in name else 'val'}.tar", name, **SPECIAL[kind]
    )
    error = imagenet_error(capsys, tmp_path, folder)
    assert f"holds {name}, expected plain files only" in error


@pytest.mark.parametrize("name", ["../n01440765.tar", "/n01440765.tar", "n01440765.tar/../x.tar"])
def test_names_that_leave_the_archive_are_refused(name, tmp_path, capsys):
    folder = archives.write_imagenet(tmp_path / "archives")
    append(folder / "ILSVRC2012_img_train.tar", name)
    assert f"holds {name}, expected n########.tar only" in imagenet_error(capsys, tmp_path, folder)


def test_names_links_and_devices_inside_a_class_reach_nothing_outside(tmp_path, capsys):
    folder = archives.write_imagenet(tmp_path / "archives")
    photo = archives.encode(archives.photographs(1, seed=0)[0])
    outside = {"../../../escaped.JPEG": photo, f"{tmp_path}/escaped.JPEG": photo}
    inner = folder / "n01440764.tar"
    archives.write_tar(inner, {"n01440764_0.JPEG": photo, **outside})
    for i, kind in enumerate(SPECIAL, start=1):
        if kind != "sparse file":
            append(inner, f"n01440764_{i}.JPEG", **SPECIAL[kind])
    content = inner.read_bytes()
    inner.unlink()
    archives.write_tar(folder / "ILSVRC2012_img_train.tar", {"n01440764.tar": content})
    args = ("imagenet2012", f"--archives={folder}", f"--data_dir={tmp_path / 'data'}")
    prepare.main(list(args))
    train = open_source("imagenet2012", "train", epath.Path(tmp_path / "data"))
    assert [train[i]["image"] for i in range(len(train))] == [photo]
    assert not list(tmp_path.parent.rglob("escaped*"))


def test_an_archive_damaged_inside_is_refused_with_a_sentence(tmp_path, capsys):
    folder = archives.write_imagenet(tmp_path / "archives")
    archives.write_tar(folder / "ILSVRC2012_img_train.tar", {"n01440764.tar": b"no tar" * 999})
    error = imagenet_error(capsys, tmp_path, folder)
    assert "an archive of imagenet2012 is damaged inside (" in error


def test_tfrecord_data_is_refused_with_the_command_that_converts_it(tmp_path, capsys):
    archives.write_imagenet(tmp_path / "archives")
    builder = tfds.builder("imagenet2012", data_dir=tmp_path / "data", file_format="tfrecord")
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(manual_dir=str(tmp_path / "archives"))
    )
    before = {
        bytes(x["image"]): int(x["label"])
        for x in tfds.as_numpy(
            builder.as_dataset(split="train", decoders={"image": tfds.decode.SkipDecoding()})
        )
    }
    data_dir = epath.Path(tmp_path / "data")
    with pytest.raises(ValueError, match="no random access; convert it with: ") as error:
        open_source("imagenet2012", "train", data_dir)
    assert "prepared in" in fails(capsys, "imagenet2012", f"--data_dir={data_dir}")
    command = str(error.value).split("convert it with: python -m sret_jax.tools.prepare ")[1]

    prepare.main(command.split())
    after = open_source("imagenet2012", "train", data_dir)
    assert {after[i]["image"]: after[i]["label"] for i in range(len(after))} == before
    capsys.readouterr()
    prepare.main(command.split())  # a second call finds nothing to do
    assert capsys.readouterr().out.startswith("Already there: imagenet2012/")


def test_nothing_prepared_is_nothing_to_convert(tmp_path, capsys):
    error = fails(capsys, "imagenet2012", f"--data_dir={tmp_path}", "--convert")
    assert "there is nothing to convert" in error


def test_a_preparation_killed_midway_starts_cleanly_again(tmp_path, capsys):
    archives.write_imagenet(tmp_path / "archives")
    args = (
        "imagenet2012",
        f"--archives={tmp_path / 'archives'}",
        f"--data_dir={tmp_path / 'data'}",
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "sret_jax.tools.prepare", *args],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = tmp_path / "data" / "imagenet2012"
    deadline = time.time() + 120
    while not list(folder.glob("incomplete.*")) and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob("incomplete.*")), "the kill came too late to test anything"

    prepare.main(list(args))
    assert "Ready" in capsys.readouterr().out
    assert [p.name for p in folder.iterdir()] == ["5.1.0"]
    assert len(open_source("imagenet2012", "train", epath.Path(tmp_path / "data"))) == 18


def test_without_tensorflow_what_needs_it_says_so_and_the_digits_are_prepared(tmp_path):
    prepare = ("-m", "sret_jax.tools.prepare", f"--data_dir={tmp_path}")
    done = run_python(*prepare, "cifar10")
    assert done.returncode == 2
    assert "preparing cifar10 needs TensorFlow" in done.stderr
    assert "pip install -r requirements-prepare.txt" in done.stderr
    assert "Ready: digits/1.0.0" in run_python(*prepare, "digits").stdout


def test_what_is_prepared_already_is_said_with_its_counts(digits_dir, capsys):
    prepare.main(["digits", f"--data_dir={digits_dir}"])
    assert capsys.readouterr().out == (
        f"Already there: digits/1.0.0 in {digits_dir}/digits/1.0.0; "
        "examples: 1,438 in train, 359 in test\n"
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cifarr10", "unknown data set 'cifarr10'; did you mean 'cifar10'?"),
        ("imagenet", "unknown data set 'imagenet'; did you mean 'imagenet2012'?"),
        ("ImageNet-1k", "unknown data set 'ImageNet-1k'; did you mean 'imagenet2012'?"),
        ("{}/photos", "folders need no preparing; train on it with --config.data.name={}/photos"),
        (
            "photos/cats",
            "folders need no preparing; train on it with --config.data.name=./photos/cats",
        ),
    ],
)
def test_names_that_tfds_does_not_have_are_answered_with_what_was_meant(
    name, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "tensorflow", None)  # nor the network
    (tmp_path / "photos" / "cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert sentence.format(tmp_path) in fails(capsys, name.format(tmp_path))
