"""Starts the processes of a run, exchanges values between them, and stops all of them together."""

import contextlib
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax._src import distributed as jax_distributed
from jax._src.clusters import k8s_cluster
from jax.experimental import multihost_utils

from sret_jax import exit_status
from sret_jax.errors import UserError
from sret_jax.terminal import outlasting

START_TIMEOUT, PEER_TIMEOUT = 300, 100  # seconds
WAIT_SECONDS = 3.0  # after this time a waiting process prints which processes it waits for
GRACE_SECONDS = 60  # JAX would abort the process this long after start_timeout
POD_INDEX = "JOB_COMPLETION_INDEX"  # environment variable in pods of an indexed Kubernetes job


class AgreedError(UserError):
    """A UserError of one process that every process raises."""


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """If the enclosed code raises UserError in one process, every process raises; also a barrier.

    Raises:
      AgreedError: some process met a UserError. In that process the message is the error's, in
        the others it names the process.
    """
    error: UserError | None = None
    try:
        yield
    except AgreedError:
        raise
    except UserError as e:
        error = e
    failed = np.flatnonzero(gather(error is not None))
    if error is not None:
        raise AgreedError(str(error)) from error
    if failed.size:
        raise _other_stopped(int(failed[0]))


def _other_stopped(process: int) -> AgreedError:
    return AgreedError(f"process {process} stopped at bad input; its own output says which")


def attempt(action: Callable[[], object]) -> Exception | None:
    """Calls `action` in every process; also a barrier.

    Returns:
      The error of this process, or one that says that another process failed; None if none did.

    Raises:
      AgreedError: the error of some process was a UserError.
    """
    error: Exception | None = None
    try:
        action()
    except AgreedError:
        raise
    except Exception as e:  # libraries may raise anything
        error = e
    outcomes = gather(0 if error is None else 2 if isinstance(error, UserError) else 1)
    if isinstance(error, UserError):
        raise AgreedError(str(error)) from error
    if 2 in outcomes:
        raise _other_stopped(int(np.argmax(outcomes)))
    if outcomes.any():
        return error or RuntimeError(f"process {int(np.argmax(outcomes))} failed")
    return None


def gather(value: int) -> np.ndarray:
    """Returns the values of all processes, (processes,); also a barrier."""
    return np.atleast_1d(multihost_utils.process_allgather(value))


def gather_all(values: Sequence[int]) -> list[int]:
    """Returns the non-negative whole numbers of all processes in one list; also a barrier."""
    longest = int(np.max(multihost_utils.process_allgather(len(values))))
    if not longest:
        return []
    padded = np.full(longest, -1)
    padded[: len(values)] = values
    everyone = np.ravel(multihost_utils.process_allgather(padded))
    return everyone[everyone >= 0].tolist()


def gather_texts(text: str) -> list[str]:
    """Returns the texts of all processes; also a barrier."""
    content = np.frombuffer(text.encode(), np.uint8)
    sizes = gather(len(content))
    padded = np.zeros(max(sizes), np.uint8)
    padded[: len(content)] = content
    everyone = np.reshape(multihost_utils.process_allgather(padded), (len(sizes), -1))
    return [row[:size].tobytes().decode() for row, size in zip(everyone, sizes, strict=True)]


def is_leader() -> bool:
    """Whether this is the process that writes and prints for all."""
    return jax.process_index() == 0


def say(sentence: str) -> None:
    """Prints a sentence once for all processes; an empty one is not printed."""
    if sentence and is_leader():
        print(sentence, flush=True)


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = START_TIMEOUT,
    peer_timeout: int = PEER_TIMEOUT,
) -> None:
    """Joins the other processes of this run; does nothing if there are none.

    Without arguments, JAX looks for a cluster that it knows (TPU pod slice, SLURM, Open MPI,
    Kubernetes). With processes=1 it does not look. With all three arguments, this process joins
    `processes` processes at `coordinator`. A process that waits for others says so, and ends with
    status 76 if they do not come. JAX aborts a process whose peers are lost later.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: number of processes.
      process_id: number of this process, from 0.
      start_timeout: seconds to wait for the others to join.
      peer_timeout: seconds without a heartbeat after which a process counts as dead. At the end,
        the processes wait as long again for each other.

    Raises:
      UserError: some but not all of the three are given, a number is out of range, or JAX cannot
        find the other pods of a Kubernetes job.
    """
    for name, value in (("start_timeout", start_timeout), ("peer_timeout", peer_timeout)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1 second")
    if (coordinator, processes, process_id) == (None, 1, None):
        return
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) != all(given):
        raise UserError(
            f"--coordinator={coordinator}, --processes={processes} and --process_id={process_id} "
            "go together; give all three, none, or --processes=1 alone for one process"
        )
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise UserError(
            f"--process_id={process_id} is out of range; use 0 to {processes - 1} "
            f"for --processes={processes}"
        )
    try:
        with _within(start_timeout), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="\\s*Kubernetes environment detected")
            jax.distributed.initialize(
                coordinator,
                processes,
                process_id,
                initialization_timeout=start_timeout + GRACE_SECONDS,
                heartbeat_timeout_seconds=peer_timeout,
                shutdown_timeout_seconds=peer_timeout,
            )
    except Exception as e:
        if coordinator is not None:
            raise
        if _is_from_kubernetes(e):
            _run_alone_in_pod(e)
        elif not (isinstance(e, ValueError) and "coordinator_address should be defined" in str(e)):
            raise
        elif POD_INDEX in os.environ:
            print(
                f"This is pod {os.environ[POD_INDEX]} of an indexed Kubernetes job, and it runs "
                'alone; to join the others it needs pip install "jax[k8s]", or --coordinator, '
                "--processes and --process_id.",
                flush=True,
            )


def silence_gloo() -> None:
    """Discards what C++ code prints on stdout, in a run of several processes on CPUs.

    Gloo, which connects them, prints a line for each connection. Python's own output still
    arrives. Only for a process that does nothing but this run.
    """
    if jax.process_count() == 1 or jax.default_backend() != "cpu":
        return
    sys.stdout.flush()
    stdout = sys.stdout.fileno()
    sys.stdout = outlasting(sys.stdout, os.dup(stdout))
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stdout)
    os.close(nothing)


@contextlib.contextmanager
def _within(start_timeout: int) -> Iterator[None]:
    """Prints whom the enclosed start waits for, and ends the process if it waits too long."""
    started = threading.Event()

    def watch() -> None:
        if started.wait(min(WAIT_SECONDS, start_timeout)):
            return
        me, others = _who_waits_for_whom()
        print(
            f"{me.capitalize()} waits up to {start_timeout} s for {others}; {_alone()}.", flush=True
        )
        if not started.wait(start_timeout - WAIT_SECONDS):
            me, others = _who_waits_for_whom()
            print(
                f"Error: {me} waited {start_timeout} s for {others}, and not all came; look at "
                f"what they print; {_alone()}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(exit_status.HUNG)  # the main thread is waiting in C++ code

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        started.set()


def _who_waits_for_whom() -> tuple[str, str]:
    """Names for this process and for those it waits for, as far as JAX knows them."""
    state = jax_distributed.global_state
    if not state.coordinator_address or not state.num_processes:
        return "this process", "the names of the other processes of this run"
    others = f"the other {state.num_processes - 1} of this run at {state.coordinator_address}"
    return f"process {state.process_id}", others


def _alone() -> str:
    start = "start all with srun, or, " if "SLURM_JOB_ID" in os.environ else ""
    return f"{start}to run as one process, give --processes=1 alone"


def _is_from_kubernetes(error: Exception) -> bool:
    """Whether JAX raised the error while it asked Kubernetes for the other processes."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(f.f_globals.get("__name__") == k8s_cluster.__name__ for f in frames)


def _run_alone_in_pod(error: Exception) -> None:
    """Prints that the run is one process; raises UserError if the job may have several pods."""
    index, reason = os.environ.get(POD_INDEX), " ".join(str(error).split())
    if index is not None:
        raise UserError(
            f"JAX cannot find the other pods of this Kubernetes job ({reason}); fix that, give "
            f"--coordinator, --processes and --process_id={index}, or, for this pod alone, "
            "--processes=1"
        ) from error
    print("This Kubernetes pod is in no indexed job and runs as one process.", flush=True)
