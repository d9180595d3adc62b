"""Starts the processes of a run on this machine, and restarts all of them when one fails.

python -m sret_jax.tools.launch --processes=4 main.py --config=sret_s --workdir=DIR
python -m sret_jax.tools.launch main.py ...    (on every host of a TPU pod or cluster)

It exits with the status of the run: 0 done, 2 bad input, 75 stopped by SIGTERM or Ctrl-C with a
checkpoint saved. After any other status it restarts all processes.
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from sret_jax.cli import Parser, clear_errors
from sret_jax.errors import UserError
from sret_jax.exit_status import BAD_INPUT, HUNG, PREEMPTED
from sret_jax.parallel.processes import POLL_SECONDS, adopt_orphans, die_with_parent, end_group

MARGIN = 10  # seconds after peer_timeout by which JAX has ended the peers of a dead process
LEFTOVER_SECONDS = 10  # time for loader workers and the like to end after their process
LONG_RUN = 600  # after so many seconds earlier failures no longer count

ABORTED, KILLED, TERMINATED, INTERRUPTED = (
    128 + s for s in (signal.SIGABRT, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
)
COMMANDS = ("train", "eval")  # of the package, beside a script
FINAL = (0, BAD_INPUT, PREEMPTED)
SIGNALS = {128 + s: s.name for s in signal.Signals}
MEANINGS = {
    1: "an error",
    BAD_INPUT: "bad input",
    PREEMPTED: "asked to stop, checkpoint saved",
    HUNG: "it hung",
    ABORTED: "JAX does so when another process fails or is silent",
    KILLED: "out of memory, perhaps",
}


@dataclasses.dataclass(frozen=True)
class Job:
    """The command to run, and how to run it.

    Attributes:
      command: "train", "eval" or a script such as main.py, and its arguments.
      processes: number of processes; a single one looks for a cluster itself.
      restarts: how often all processes may be restarted after a failure.
      start_timeout: seconds within which all processes must have joined.
      peer_timeout: seconds without a heartbeat after which a process counts as dead.
    """

    command: Sequence[str]
    processes: int
    restarts: int
    start_timeout: int
    peer_timeout: int

    def check(self) -> None:
        """Raises UserError if a value is invalid."""
        least = {"processes": 1, "restarts": 0, "start_timeout": 1, "peer_timeout": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value < bound:
                raise UserError(f"--{name}={value} must be at least {bound}")
        if not self.command:
            raise UserError("no script is given; name it after the launcher's flags, as in main.py")
        if self.command[0] not in COMMANDS and not pathlib.Path(self.command[0]).is_file():
            raise UserError(f"there is no script {self.command[0]!r}; give main.py and its flags")

    def command_lines(self) -> list[list[str]]:
        """The command line of each process; several processes meet at a free local port."""
        script, *args = self.command
        start = ["-m", "sret_jax", script] if script in COMMANDS else [script]
        flags = [f"--start_timeout={self.start_timeout}", f"--peer_timeout={self.peer_timeout}"]
        if self.processes == 1:
            return [[sys.executable, *start, *flags, *args]]
        flags += [f"--coordinator=localhost:{_free_port()}", f"--processes={self.processes}"]
        return [
            [sys.executable, *start, *flags, f"--process_id={i}", *args]
            for i in range(self.processes)
        ]


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


class Process:
    """One process of a run, together with the processes that it starts.

    Attributes:
      name: name of the process in messages.
      status: exit status, or 128 + the number of the signal that ended it; 0 while it runs.
      missing: whether it had to be killed because it continued when others had ended.
    """

    def __init__(self, name: str, command: list[str], prefix: str):
        self.name = name
        self.status = 0
        self.missing = False
        self._popen = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if prefix else None,
            stderr=subprocess.STDOUT if prefix else None,
            start_new_session=True,  # so that Ctrl-C reaches only the launcher
            preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )
        self._reader = threading.Thread(target=self._pass_on, args=(prefix,), daemon=True)

    def pass_on_output(self) -> None:
        """Copies its output to stderr with the prefix before each line, if there is a prefix."""
        self._reader.start()

    def _pass_on(self, prefix: str) -> None:
        if self._popen.stdout:
            with self._popen.stdout as lines:
                for line in lines:
                    write(f"{prefix}{line.decode(errors='replace')}")

    def has_ended(self) -> bool:
        """Whether the process has ended; then `status` is known."""
        code = self._popen.poll()
        if code is not None:
            self.status = code if code >= 0 else 128 - code
        return code is not None

    def signal(self, number: signal.Signals) -> None:
        """Sends the process a signal if it still runs."""
        self._popen.send_signal(number)

    def clean_up(self) -> None:
        """Ends the process and all that it started, and waits until none is left."""
        self.signal(signal.SIGKILL)
        self._popen.wait()
        end_group(self._popen.pid, LEFTOVER_SECONDS)
        self._reader.join(LEFTOVER_SECONDS)

    def __str__(self) -> str:
        if self.missing:
            return f"{self.name} hung or was stopped: it continued when another had ended"
        name = SIGNALS.get(self.status)
        how = f"was ended by {name}" if name else f"ended with exit status {self.status}"
        meaning = MEANINGS.get(self.status)
        return f"{self.name} {how}" + (f" ({meaning})" if meaning else "")


class StopRequest:
    """What SIGTERM, Ctrl-C and a closed terminal have requested so far.

    Attributes:
      made: whether to save a checkpoint and end.
      at_once: whether to end without saving (a second Ctrl-C).
    """

    def __init__(self) -> None:
        self.made = self.at_once = False
        signal.signal(signal.SIGTERM, self._take)
        signal.signal(signal.SIGINT, self._take)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup sets SIG_IGN
            signal.signal(signal.SIGHUP, self._take)

    def _take(self, number: int, frame: object) -> None:
        del frame
        self.at_once |= self.made and number == signal.SIGINT
        self.made = True


class Run:
    """All processes of a job, from their start until none is left."""

    def __init__(self, job: Job):
        self._patience = job.peer_timeout + MARGIN
        self._ended: list[Process] = []  # in the order in which they ended
        self._processes: list[Process] = []
        for i, command in enumerate(job.command_lines()):
            name = f"process {i}" if job.processes > 1 else job.command[0]
            self._processes.append(Process(name, command, prefix=f"[{i}] " if i else ""))
        for process in self._processes:  # only now: forking a process with threads is unsafe
            process.pass_on_output()

    def wait(self, stop: StopRequest) -> None:
        """Waits until all have ended; kills those that run on for too long after the first end."""
        deadline = math.inf
        asked = False
        while running := self._still_running():
            if stop.made and not asked:
                asked = True
                say("stopping once a checkpoint is saved; Ctrl-C again kills the run at once")
                for process in running:
                    process.signal(signal.SIGTERM)
            if self._ended and deadline == math.inf:
                deadline = time.monotonic() + self._patience
                self._report_failure()
            if stop.at_once:
                for process in running:
                    process.signal(signal.SIGKILL)
            elif time.monotonic() > deadline:
                self._kill_missing([process for process in running if not process.missing])
            time.sleep(POLL_SECONDS)

    def _still_running(self) -> list[Process]:
        running = [process for process in self._processes if process not in self._ended]
        ended = [process for process in running if process.has_ended()]
        self._ended += ended
        return [process for process in running if process not in ended]

    def _report_failure(self) -> None:
        culprit = self.culprit()
        if culprit and culprit.status not in FINAL:
            say(f"{culprit}; the others have {self._patience} s to end by themselves")

    def _kill_missing(self, processes: list[Process]) -> None:
        for process in processes:
            say(f"{process.name} did not end within {self._patience} s and is killed")
            process.missing = True
            process.signal(signal.SIGKILL)

    def clean_up(self) -> None:
        """Ends whatever is left of the processes."""
        for process in self._processes:
            process.clean_up()

    def culprit(self) -> Process | None:
        """The process whose failure made the others fail; None if none has failed."""
        failed = [process for process in self._ended if process.status]
        return min(failed, key=_doubt, default=None)


def _doubt(process: Process) -> int:
    """How likely a process's end is only a consequence of another's; 0 is the least likely.

    A process that had to be killed ranks before the errors and aborts by which its peers end.
    """
    if process.status in FINAL:
        return 0
    if process.missing:
        return 2
    if process.status == ABORTED:
        return 4
    return 1 if process.status in SIGNALS else 3


def supervise(job: Job) -> int:
    """Runs a job to its end, including restarts, and returns its exit status."""
    stop = StopRequest()
    adopt_orphans()
    failures = 0
    while True:
        started = time.monotonic()
        run = Run(job)
        try:
            run.wait(stop)
        finally:
            run.clean_up()
        culprit = run.culprit()
        status = culprit.status if culprit else 0
        if stop.made:
            return _status_when_stopped(stop, status)
        if status in FINAL:
            return status
        failures = failures + 1 if time.monotonic() - started < LONG_RUN else 1
        if failures > job.restarts:
            say(f"{culprit}; no restarts are left (of {job.restarts})")
            return status
        say(f"{culprit}; starting again (restart {failures} of {job.restarts})")


def _status_when_stopped(stop: StopRequest, status: int) -> int:
    if stop.at_once:
        return INTERRUPTED
    # Before training begins nothing handles the signal, and there is nothing to save.
    return PREEMPTED if status == TERMINATED else status


def say(sentence: str) -> None:
    """Prints a sentence of the launcher below the progress line of a terminal."""
    start = "\n" if sys.stderr.isatty() else ""
    write(f"{start}Launcher: {sentence}.\n")


def write(text: str) -> None:
    """Writes to stderr; if that is closed, as by Ctrl-C of `| tee`, the run must not end."""
    with contextlib.suppress(OSError):
        print(text, end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("launch", __doc__)
    parser.add_argument("--processes", type=int, default=1, help="number to start; default: 1")
    parser.add_argument(
        "--restarts", type=int, default=3, help="restarts after failures, at most; default: 3"
    )
    parser.add_argument("--start_timeout", type=int, default=300, help="see main.py")
    parser.add_argument("--peer_timeout", type=int, default=100, help="see main.py")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="main.py and its flags")
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(f"the launcher has no flag {unknown[0]}; flags of main.py go after main.py")
    job = Job(**vars(args))
    with clear_errors():
        job.check()
    sys.exit(supervise(job))


if __name__ == "__main__":
    main()
