"""Commands that run several at once, each in a process of its own on its own cores."""

import contextlib
import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

POLL_SECONDS = 0.2
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Task(NamedTuple):
    """A command.

    Attributes:
      name: name of the task.
      command: the program and its arguments.
      log: file that its output is appended to; its folder is made.
      needs: names of tasks that must have succeeded before.
    """

    name: str
    command: tuple[str, ...]
    log: pathlib.Path
    needs: tuple[str, ...] = ()


class Ended(NamedTuple):
    """A task that has ended.

    Attributes:
      task: the task.
      status: its exit status, or minus the number of the signal that ended it.
      seconds: wall time.
      cores: the cores that it was given; empty: all.
    """

    task: Task
    status: int
    seconds: float
    cores: tuple[int, ...]


class _Running(NamedTuple):
    task: Task
    process: subprocess.Popen
    slot: int
    start: float


class Stopped(Exception):
    """A signal asked to stop; all processes have ended."""


def shares(jobs: int) -> list[tuple[int, ...]]:
    """The cores for each of so many processes at once.

    Each process gets as many cores as every other; a remainder is left idle. If there are fewer
    cores than processes, several processes share one. Where the system cannot bind processes to
    cores, the shares are empty.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [()] * jobs
    cores = sorted(os.sched_getaffinity(0))
    each = max(1, len(cores) // jobs)
    return [
        tuple(cores[(job * each + place) % len(cores)] for place in range(each))
        for job in range(jobs)
    ]


def run_tasks(
    tasks: Sequence[Task],
    slots: Sequence[tuple[int, ...]],
    environment: Mapping[str, str],
    on_start: Callable[[Task], None],
    on_end: Callable[[Ended], None],
) -> list[Task]:
    """Runs tasks in their order, as soon as a slot is free and what they need has succeeded.

    SIGINT, SIGTERM and SIGHUP become SIGTERM for each process, which may save its work.

    Args:
      tasks: the tasks; what a task needs is among them.
      slots: the cores of each process that may run at once; empty: all cores.
      environment: environment variables of the processes.
      on_start: called with each task before it starts.
      on_end: called with each task that has ended.

    Returns:
      The tasks that were not started, because a task that they need has failed.

    Raises:
      Stopped: a signal came.
    """
    waiting, running = list(tasks), list[_Running]()
    succeeded: set[str] = set()
    free = list(range(len(slots)))[::-1]
    with _signals() as received:
        told = 0  # number of signals that were passed on
        try:
            while running or (waiting and not received):
                while free and not received and (task := _next(waiting, succeeded)):
                    waiting.remove(task)
                    slot = free.pop()
                    on_start(task)
                    process = _start(task, slots[slot], environment)
                    running.append(_Running(task, process, slot, time.monotonic()))
                if not running:
                    return waiting
                if len(received) > told:
                    told = len(received)
                    _terminate(running)
                time.sleep(POLL_SECONDS)
                for one in [one for one in running if one.process.poll() is not None]:
                    running.remove(one)
                    free.append(one.slot)
                    status = one.process.returncode
                    if status == 0:
                        succeeded.add(one.task.name)
                    seconds = time.monotonic() - one.start
                    on_end(Ended(one.task, status, seconds, slots[one.slot]))
        except BaseException:  # an error of on_end
            _terminate(running)
            raise
    if received:
        raise Stopped
    return waiting


def _next(waiting: Sequence[Task], succeeded: set[str]) -> Task | None:
    """The first task whose needs are met."""
    return next((task for task in waiting if succeeded.issuperset(task.needs)), None)


def _start(task: Task, cores: tuple[int, ...], environment: Mapping[str, str]) -> subprocess.Popen:
    """Starts a process on its cores, out of reach of the terminal's Ctrl-C."""
    task.log.parent.mkdir(parents=True, exist_ok=True)
    with task.log.open("ab") as log, _bound_to(cores):
        return subprocess.Popen(
            task.command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        )


@contextlib.contextmanager
def _bound_to(cores: tuple[int, ...]) -> Iterator[None]:
    """Binds this thread to cores, and with it the processes that it starts within the context."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _terminate(running: Sequence[_Running]) -> None:
    for one in running:
        one.process.terminate()


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects signals within the context instead of ending the process.

    A signal that is ignored, as nohup does with SIGHUP, stays ignored.
    """
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}
    caught = [number for number, handler in before.items() if handler != signal.SIG_IGN]
    for number in caught:
        signal.signal(number, lambda number, frame: received.append(number))
    try:
        yield received
    finally:
        for number in caught:
            signal.signal(number, before[number])
