"""How far a long piece of work is, in a terminal and elsewhere."""

import os
import pty
import struct
import subprocess
import sys
from fcntl import ioctl
from termios import TIOCSWINSZ

import pytest

from sret_jax import terminal
from sret_jax.run.progress import ProgressLine
from sret_jax.terminal import Progress, fitted
from sret_jax.text import duration
from tests.conftest import ROOT

REPORT = {
    "skipped_steps": 0.0,
    "loss": 0.5153,
    "top1": 0.996,
    "images_per_second": 1269.4,
    "wait_share": 0.11,
    "lr": 1.87e-3,
}


@pytest.fixture
def errors(monkeypatch):
    """Makes stderr a terminal of so many columns, or a pipe; returns a function that reads it."""
    opened = []

    def redirect(columns=None):
        reader, writer = pty.openpty() if columns else os.pipe()
        if columns:
            ioctl(writer, TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        stream = os.fdopen(writer, "w")
        opened.append((reader, stream))
        monkeypatch.setattr(sys, "stderr", stream)
        return lambda: os.read(reader, 65536).decode()  # waits until there is something

    yield redirect
    for reader, stream in opened:
        stream.close()
        os.close(reader)


@pytest.mark.parametrize(
    ("columns", "last"), [(41, "loss 0.515"), (80, "25s left"), (200, "lr 1.87e-03")]
)
def test_the_progress_line_fits_its_terminal_and_drops_what_matters_least(columns, last, errors):
    read = errors(columns)
    ProgressLine(1348, 22.5, enabled=True).show(1012, REPORT, 25.0)
    control, line = read().split("\033[K")
    assert control == "\r" and "\n" not in line
    assert line.startswith("step 1,012/1,348  epoch 45.0") and line.endswith(last)
    assert len(line) < columns


def test_without_a_terminal_the_progress_line_is_whole_and_plain(capsys):
    ProgressLine(1348, 22.5, enabled=True).show(1012, REPORT | {"skipped_steps": 2.0}, 25.0)
    out, err = capsys.readouterr()
    assert not err and "\r" not in out and "\033" not in out
    assert "  2 steps not finite, skipped  " in out and "waiting for data 11%" in out


def test_a_line_of_one_long_field_is_cut():
    assert fitted(["Compiling" * 20], 80) == ("Compiling" * 20)[:79]


def test_progress_counts_from_what_was_done_before():
    progress = Progress("Storing labels", 1000, "images", done=500)
    progress.add(100)
    assert progress.fields(10.0) == [
        "Storing labels  60%",
        "[############........]",
        "600/1,000 images",
        "40s left",
        "10 images/s",
    ]
    progress.add(500)  # more than there are, as in a padded batch
    assert progress.fields(20.0)[:3] == [
        "Storing labels 100%",
        f"[{'#' * 20}]",
        "1,000/1,000 images",
    ]
    assert Progress("Compiling").fields(65.0) == ["Compiling: 1m05s"]


def test_progress_is_one_row_of_a_terminal_that_is_empty_afterwards(monkeypatch, errors):
    monkeypatch.setattr(terminal, "LIVE_SECONDS", 0.01)
    read = errors(columns=80)
    with Progress("Evaluating", 3, "batches") as progress:
        counted = progress.counted(range(3))
        assert next(counted) == 0
        shown = read()
        monkeypatch.setattr(terminal, "LIVE_SECONDS", 1e6)
        assert list(counted) == [1, 2]
    shown += read()
    assert shown.startswith("\r\033[KEvaluating   0%") and shown.endswith("\r\033[K")
    assert "\n" not in shown


def test_progress_is_plain_lines_where_there_is_no_terminal(monkeypatch, errors):
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.01)
    read = errors()
    with Progress("Evaluating", 3, "batches"):
        assert read().startswith("Evaluating   0%  [....................]  0/3 batches\n")


OUTLASTS = """
import pathlib, sys
from sret_jax.terminal import outlast_readers
outlast_readers()
for stream in (sys.stdout, sys.stderr):
    print(100_000 * "step", file=stream, flush=True)
pathlib.Path(sys.argv[1]).write_text("saved")
"""


def test_a_process_outlasts_the_readers_of_its_output(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-c", OUTLASTS, str(tmp_path / "checkpoint")]
    status = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer).returncode
    os.close(writer)
    assert status == 0 and (tmp_path / "checkpoint").read_text() == "saved"


def test_durations_leave_out_what_is_zero_in_front():
    assert [duration(s) for s in (0.4, 5, 65, 3725.0)] == ["0s", "5s", "1m05s", "1h02m"]
