import json
import sys

import fsspec
import pytest
from etils import epath
from etils.epath import gpath
from fsspec.implementations.memory import MemoryFileSystem

from sret_jax.errors import UserError
from sret_jax.files import (
    GrowingFile,
    absolute,
    is_remote,
    write_json,
    write_text,
    written_whole,
)
from sret_jax.run.crash import write_crash_report
from sret_jax.run.lock import OWNER_FILE, Note
from sret_jax.run.metrics_file import JsonlWriter, read_metrics
from sret_jax.run.rollback import Rollbacks
from sret_jax.tools import convert


class Bucket(MemoryFileSystem):
    """An object store in memory, under the names of Google's."""

    store = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("gs://"))


@pytest.fixture
def bucket(monkeypatch):
    """A folder gs://bucket/run that is served by fsspec from memory."""
    monkeypatch.setenv("EPATH_USE_TF", "0")
    gpath._is_tf_installed.cache_clear()
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    yield epath.Path("gs://bucket/run")
    monkeypatch.undo()
    gpath._is_tf_installed.cache_clear()


def test_a_bucket_s_path_is_absolute_as_it_is(bucket):
    assert is_remote(bucket) and absolute(str(bucket)) == bucket
    assert str(absolute(bucket) / "checkpoints" / "5") == f"{bucket}/checkpoints/5"


def test_a_bucket_that_cannot_be_reached_is_a_sentence(bucket, monkeypatch, capsys):
    def fail(*arguments, **settings):
        raise ConnectionError("no route to host\nand a second line")

    monkeypatch.setattr(Bucket, "exists", fail)
    with pytest.raises(SystemExit) as stopped:
        convert.main(["SReT_T.pth", str(bucket)])
    assert stopped.value.code == 2
    sentence = f"Error: {bucket} cannot be reached (no route to host); correct the path, or check"
    assert capsys.readouterr().err.startswith(sentence)


def test_other_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert absolute("runs/x") == epath.Path(tmp_path) / "runs" / "x"
    assert "~" not in str(absolute("~/runs"))


def test_what_a_run_writes_itself_works_in_a_bucket(bucket):
    write_json(bucket / "config.json", {"seed": 0})
    assert json.loads((bucket / "config.json").read_text()) == {"seed": 0}
    assert [path.name for path in bucket.iterdir()] == ["config.json"]

    Rollbacks(((1, 4),)).write(bucket)
    assert Rollbacks.read(bucket) == Rollbacks(((1, 4),))

    for last_step, step in ((0, 1), (1, 2), (1, 2)):  # the second line is written twice
        writer = JsonlWriter(bucket, last_step=last_step)
        writer.write_scalars(step, {"loss": step})
        writer.close()
    assert [line["step"] for line in read_metrics(bucket)] == [1, 2]

    report = write_crash_report(bucket, RuntimeError("oh"), {"step": 3})
    assert json.loads(report.read_text())["error"] == "RuntimeError: oh"


def test_a_workdir_in_a_bucket_is_locked_by_a_note(bucket):
    fast = dict(beat_seconds=0.05, silent_seconds=0.3)
    with Note(bucket, **fast) as note:
        note.check()
        with pytest.raises(UserError, match="gs://bucket/run is in use by"), Note(bucket, **fast):
            pass
    assert not (bucket / OWNER_FILE).exists()


def test_a_file_that_cannot_be_written_is_a_sentence_and_leaves_the_old_one(tmp_path):
    path = epath.Path(tmp_path / "there" / "x.json")
    with pytest.raises(UserError, match=r"x.json cannot be written \(No such file or directory\)"):
        write_text(path, "text")


def test_a_file_that_is_not_written_whole_leaves_the_old_one(tmp_path):
    path = epath.Path(tmp_path / "x.json")
    write_text(path, "old")
    with pytest.raises(KeyboardInterrupt), written_whole(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_of_two_writers_of_one_file_at_once_the_last_to_end_wins(tmp_path):
    path = epath.Path(tmp_path / "x.json")
    with written_whole(path) as slow:
        slow.write("slow, ")
        write_text(path, "quick")
        assert path.read_text() == "quick"
        slow.write("but whole")
    assert path.read_text() == "slow, but whole"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.json"]


def test_a_growing_file_is_appended_to_and_not_written_again(tmp_path):
    path = epath.Path(tmp_path / "x.jsonl")
    path.write_text("old\n")
    file = GrowingFile(path, b"old\n")
    same = (tmp_path / "x.jsonl").stat().st_ino
    for line in (b"one\n", b"two\n"):
        file.write(line)
        file.flush()
    assert path.read_text() == "old\none\ntwo\n"
    assert (tmp_path / "x.jsonl").stat().st_ino == same


@pytest.mark.parametrize("found", [None, b"", b"other", b"old\no"])
def test_a_growing_file_that_is_not_as_it_was_left_becomes_whole(tmp_path, found):
    path = epath.Path(tmp_path / "x.jsonl")
    path.write_text("old\n")
    file = GrowingFile(path, b"old\n")
    path.unlink() if found is None else path.write_bytes(found)
    file.write(b"new\n")
    file.flush()
    assert path.read_text() == "old\nnew\n"


def test_what_cannot_be_appended_is_a_sentence_and_is_kept_for_the_next_flush(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    file = GrowingFile(epath.Path(folder / "x.jsonl"))
    file.flush()
    folder.rename(tmp_path / "away")
    file.write(b"one\n")
    with pytest.raises(UserError, match="x.jsonl cannot be written"):
        file.flush()
    (tmp_path / "away").rename(folder)
    file.flush()
    assert (folder / "x.jsonl").read_text() == "one\n"


def test_a_bucket_without_its_reader_is_a_sentence(monkeypatch):
    for name in ("gcsfs", "tensorflow"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"gs://bucket/run is in a bucket.*pip install gcsfs"):
        absolute("gs://bucket/run")
