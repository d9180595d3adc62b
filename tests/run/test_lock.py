import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from etils import epath

from sret_jax.errors import UserError
from sret_jax.run.lock import OWNER_FILE, Note, locked
from tests.conftest import ROOT

FAST = dict(beat_seconds=0.3, silent_seconds=3.0)  # slow machines must keep up
HOLD = """
import contextlib, sys, time
from etils import epath
from sret_jax.run import lock

workdir, kind = epath.Path(sys.argv[1]), sys.argv[2]
note = lock.Note(workdir, beat_seconds=0.3, silent_seconds=3.0)
with lock.locked(workdir) if kind == "flock" else note as held:
    print("held", flush=True)
    for _ in range(600):
        time.sleep(0.1)
        held.check()
"""


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


@pytest.fixture
def holder(workdir):
    """Starts another process that holds the workdir."""
    processes = []

    def start(kind):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(workdir), kind],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_a_second_run_is_refused_and_told_whose_the_workdir_is(workdir, holder):
    process = holder("flock")
    owner = f"in use by process {process.pid} on {socket.gethostname()} .since 2"
    with pytest.raises(UserError, match=owner), locked(workdir):
        pass


def test_a_killed_run_leaves_no_lock(workdir, holder):
    process = holder("flock")
    process.kill()
    process.wait()
    for _ in range(2):
        with locked(workdir) as lock:
            lock.check()


def test_a_note_that_beats_is_a_living_run(workdir, holder):
    process = holder("note")
    with (
        pytest.raises(UserError, match=f"in use by process {process.pid} on"),
        Note(workdir, **FAST),
    ):
        pass


def test_the_note_of_a_killed_process_of_this_host_stands_in_nobody_s_way(workdir, holder):
    process = holder("note")
    process.kill()
    process.wait()
    start = time.monotonic()
    with Note(workdir, **FAST):
        assert time.monotonic() - start < FAST["silent_seconds"]
        assert json.loads((workdir / OWNER_FILE).read_text())["process"] == os.getpid()
    assert not (workdir / OWNER_FILE).exists()


def test_a_silent_note_of_another_host_is_taken_over_with_a_message(workdir, capfd):
    owner = {"host": "elsewhere", "process": 1, "since": "yesterday", "token": "t"}
    (workdir / OWNER_FILE).write_text(json.dumps(owner))
    with Note(workdir, **FAST) as note:
        note.check()
    output = capfd.readouterr().out
    assert "process 1 on elsewhere (since yesterday)" in output and "taking over" in output


def test_a_run_that_was_suspended_and_taken_over_finds_out(workdir, holder):
    process = holder("note")
    process.send_signal(signal.SIGSTOP)
    with Note(workdir, **FAST):
        process.send_signal(signal.SIGCONT)
        assert process.wait(timeout=60) == 1  # its check() raises
        owner = json.loads((workdir / OWNER_FILE).read_text())
        assert owner["process"] == os.getpid(), "it must leave the new owner's note"


def test_however_a_run_ends_it_takes_its_name_away(workdir):
    with pytest.raises(RuntimeError), locked(workdir):
        assert (workdir / OWNER_FILE).exists()
        raise RuntimeError
    assert not (workdir / OWNER_FILE).exists()
