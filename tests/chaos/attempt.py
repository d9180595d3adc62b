"""One start of a training run that will be broken, and what it leaves behind."""

import contextlib
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable

from sret_jax.checkpoints.manager import CHECKPOINTS
from sret_jax.errors import UserError

SETTINGS = (  # a run of half a minute that saves, evaluates and reports all the time
    "--config.epochs=2",
    "--config.log_every_steps=1",
    "--config.eval_every_epochs=0.25",
    "--config.checkpoint.every_epochs=0.25",
    "--config.data.workers=1",
    "--config.watchdog.least_seconds=5",
    "--config.watchdog.stop_seconds=40",
)
EVAL_STEPS = 6  # between evaluations, with these settings
LONGEST = 300.0  # seconds that an attempt may take
CLEAN_SECONDS = 10.0  # in which everything that a process started must be gone
MARK = "SRET_CHAOS_ATTEMPT"  # in the environment of all that an attempt starts
SHARED_MEMORY = pathlib.Path("/dev/shm")


class Attempt:
    """A started run of main.py, its output read as it comes."""

    def __init__(self, workdir: pathlib.Path, flags: list[str], log: pathlib.Path):
        self.workdir = workdir
        self.checkpoints = workdir / CHECKPOINTS
        self.lines: list[str] = []
        self._mark = f"{MARK}={os.urandom(8).hex()}"
        self._shared_before = set(SHARED_MEMORY.glob("psm_*"))
        command = [sys.executable, "main.py", f"--workdir={workdir}", *SETTINGS, *flags]
        self.process = subprocess.Popen(
            command,
            env=os.environ | dict([self._mark.split("=")]),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.log = log
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self) -> int:
        """Its exit status, a signal's negative."""
        try:
            status = self.process.wait(LONGEST)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise UserError(f"a run did not end in {LONGEST:.0f} s; see {self.log}") from None
        self._reader.join(CLEAN_SECONDS)
        return status

    def happens(self, condition: Callable[[], object]) -> bool:
        """Waits for a condition; false if the run ends first."""
        while self.process.poll() is None:
            if condition():
                return True
            time.sleep(0.001)
        return False

    def steps(self) -> list[int]:
        """Those it has reported."""
        found = (re.match(r"step ([\d,]+)/", line) for line in list(self.lines))
        return [int(m[1].replace(",", "")) for m in found if m]

    def resumed_at(self) -> int:
        """The step it resumed at, 0 if it started anew."""
        found = (re.search(r"^Resuming .* at step ([\d,]+)", line) for line in self.lines)
        return next((int(m[1].replace(",", "")) for m in found if m), 0)

    def half_written(self) -> list[pathlib.Path]:
        """Checkpoints that are being saved."""
        return list(self.checkpoints.glob("*.orbax-checkpoint-tmp"))

    def workers(self) -> list[int]:
        """Its loader's processes."""
        return [pid for pid in self._family() if b"spawn_main" in read(f"/proc/{pid}/cmdline")]

    def leftovers(self) -> list[str]:
        """What it has left behind: processes, and shared memory that no process uses."""
        deadline = time.monotonic() + CLEAN_SECONDS
        shared = set(SHARED_MEMORY.glob("psm_*")) - self._shared_before
        while family := self._family():
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        while shared := {path for path in shared if path.exists() and not is_mapped(path)}:
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        return [f"process {pid}" for pid in family] + sorted(map(str, shared))

    def _family(self) -> list[int]:
        """Every process that it started and that still is."""
        pids = (int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*"))
        return [
            pid
            for pid in pids
            if pid != self.process.pid and self._mark.encode() in read(f"/proc/{pid}/environ")
        ]

    def _read(self) -> None:
        assert self.process.stdout
        with self.log.open("w") as log:
            for line in self.process.stdout:
                self.lines.append(line.rstrip())
                log.write(line)
                log.flush()


def is_mapped(shared: pathlib.Path) -> bool:
    """Whether any process uses a piece of shared memory."""
    maps = pathlib.Path("/proc").glob("[0-9]*/maps")
    return any(str(shared).encode() in read(path) for path in maps)


def read(file: str | pathlib.Path) -> bytes:
    """What a file of /proc holds; nothing if its process is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(file).read_bytes()
    return b""
