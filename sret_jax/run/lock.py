"""Allows one run per workdir: a second run is refused, a killed run does not block the next."""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from typing import IO, Any

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import is_remote, write_json

LOCK_FILE, OWNER_FILE = ".lock", "owner.json"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 40.0


class Lock:
    """The right to write to a workdir."""

    def check(self) -> None:
        """Raises UserError if another run has taken over the workdir."""


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[Lock]:
    """Keeps other runs out of a workdir within the context.

    On a file system, the lock is `flock` on WORKDIR/.lock, which the kernel releases however this
    process ends; WORKDIR/owner.json names the owner. In buckets, and on file systems without locks,
    owner.json is the lock. Its owner renews it every 10 s; if it does not change for 40 s, its run
    is dead and is taken over.

    Raises:
      UserError: another run holds the lock; the message names its host, process and start.
    """
    if is_remote(workdir):
        with Note(workdir) as note:
            yield note
        return
    with (workdir / LOCK_FILE).open("a") as file:
        if not _flock(file, workdir):
            with Note(workdir) as note:
                yield note
            return
        with contextlib.suppress(UserError):  # e.g. a full disk; the lock holds without owner.json
            write_json(workdir / OWNER_FILE, _owner())
        try:
            yield Lock()
        finally:
            with contextlib.suppress(OSError):
                (workdir / OWNER_FILE).unlink(missing_ok=True)


@contextlib.contextmanager
def removed_if_unused(workdir: epath.Path) -> Iterator[None]:
    """Removes a local workdir that the context created and in which nothing but .lock remains."""
    unwanted = not is_remote(workdir) and not workdir.exists()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if unwanted and [file.name for file in workdir.iterdir()] in ([], [LOCK_FILE]):
                (workdir / LOCK_FILE).unlink(missing_ok=True)
                workdir.rmdir()


class Note(contextlib.AbstractContextManager, Lock):
    """A lock by owner.json alone, which is renewed while its process lives."""

    def __init__(
        self,
        workdir: epath.Path,
        beat_seconds: float = BEAT_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
    ):
        self._workdir = workdir
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._owner = {**_owner(), "token": os.urandom(8).hex()}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._usurper: dict[str, Any] | None = None

    def __enter__(self) -> "Note":
        self._wait_for_silence()
        self._write()
        time.sleep(self._beat_seconds / 10)
        self._look()  # if two start at once, the later writer wins
        self.check()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # an error of the run itself is more important
            self._look()
            if self._usurper is None:
                (self._workdir / OWNER_FILE).unlink(missing_ok=True)

    def check(self) -> None:
        if self._usurper is not None:
            raise _in_use(self._workdir, self._usurper)

    def _wait_for_silence(self) -> None:
        """Returns once the existing owner.json has not changed for `silent_seconds`."""
        first = _read_owner(self._workdir)
        if not first or _is_dead_here(first):
            return
        print(
            f"{self._workdir / OWNER_FILE} names {_described(first)}; waiting up to "
            f"{self._silent_seconds:.0f} s to see whether that run is alive.",
            flush=True,
        )
        deadline = time.monotonic() + self._silent_seconds
        while time.monotonic() < deadline:
            time.sleep(self._beat_seconds / 10)
            now = _read_owner(self._workdir)
            if not now:
                return
            if now != first:
                raise _in_use(self._workdir, now)
        print("It is silent; taking over.", flush=True)

    def _keep(self) -> None:
        while not self._ended.wait(self._beat_seconds):
            # A bucket that is briefly unreachable must not end the run.
            with contextlib.suppress(Exception):
                self._look()
                if self._usurper is not None:
                    return
                self._write()

    def _look(self) -> None:
        note = _read_owner(self._workdir)
        if note and note.get("token") != self._owner["token"]:
            self._usurper = note

    def _write(self) -> None:
        write_json(self._workdir / OWNER_FILE, {**self._owner, "beat": time.time()})


def _flock(file: IO[Any], workdir: epath.Path) -> bool:
    """Locks a file; False if the file system (network or FUSE) has no locks."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(workdir, _read_owner(workdir)) from None
    except OSError:
        return False
    return True


def _owner() -> dict[str, Any]:
    since = datetime.now().astimezone().isoformat(timespec="seconds")
    return {"host": socket.gethostname(), "process": os.getpid(), "since": since}


def _read_owner(workdir: epath.Path) -> dict[str, Any]:
    """The contents of owner.json; empty if it is missing or was cut off."""
    with contextlib.suppress(FileNotFoundError, ValueError):
        owner = json.loads((workdir / OWNER_FILE).read_text())
        if isinstance(owner, dict):
            return owner
    return {}


def _is_dead_here(owner: dict[str, Any]) -> bool:
    """Whether the owner was a process of this host that has ended."""
    process = owner.get("process")
    if owner.get("host") != socket.gethostname() or not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _described(owner: dict[str, Any]) -> str:
    known = {"process": "unknown", "host": "unknown", "since": "unknown", **owner}
    return f"process {known['process']} on {known['host']} (since {known['since']})"


def _in_use(workdir: epath.Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"the workdir {workdir} is in use by {_described(owner)}; wait for that run, stop it, or "
        "give another --workdir"
    )
