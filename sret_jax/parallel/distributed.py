"""Start-up of several processes, and how they agree to stop."""

import contextlib
import pathlib
import socket
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from sret_jax.errors import UserError

START_TIMEOUT, PEER_TIMEOUT = 300, 100  # seconds


class AgreedError(UserError):
    """A UserError of some process that every process raises."""


@contextlib.contextmanager
def agreed() -> Iterator[None]:
    """Lets every process stop when the enclosed code finds bad input in any; also a barrier.

    Raises:
      AgreedError: in the process that met a UserError its sentence, elsewhere who met one.
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
    """Acts in every process; also a barrier.

    Returns:
      What went wrong here or, in other words, elsewhere; None if nothing did.

    Raises:
      AgreedError: in some process it was a UserError.
    """
    error: Exception | None = None
    try:
        action()
    except AgreedError:
        raise
    except Exception as e:  # whatever libraries raise
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
    """The value of every process, (processes,); also a barrier."""
    return np.atleast_1d(multihost_utils.process_allgather(value))


def gather_all(values: Sequence[int]) -> list[int]:
    """The whole numbers of all processes, none of them negative, in one list; also a barrier."""
    longest = int(np.max(multihost_utils.process_allgather(len(values))))
    if not longest:
        return []
    padded = np.full(longest, -1)
    padded[: len(values)] = values
    everyone = np.ravel(multihost_utils.process_allgather(padded))
    return everyone[everyone >= 0].tolist()


def host_count() -> int:
    """Machines that this run's processes are on; also a barrier."""
    boot = pathlib.Path("/proc/sys/kernel/random/boot_id")  # containers of one machine share it
    name = boot.read_text() if boot.exists() else socket.gethostname()
    return len(np.unique(gather(zlib.crc32(name.encode()) >> 1)))  # a positive int32


def is_leader() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout: int = START_TIMEOUT,
    peer_timeout: int = PEER_TIMEOUT,
) -> None:
    """Joins the other processes of this run; does nothing where there are none.

    With no arguments, JAX looks for a cluster it knows (TPU pod slice, SLURM, Open MPI,
    Kubernetes). With all three, it joins `processes` processes at `coordinator`. A process that
    waits for the others in vain, or finds later that one is gone, is aborted by JAX itself.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process_id: which one this is, from 0.
      start_timeout: seconds to wait for the others to join.
      peer_timeout: seconds without a heartbeat after which a process counts as dead, and as long
        again to wait for the others at the end.

    Raises:
      UserError: some but not all of the three are given, or a number is out of range.
    """
    given = [value is not None for value in (coordinator, processes, process_id)]
    if any(given) != all(given):
        raise UserError(
            f"--coordinator={coordinator}, --processes={processes} and --process_id={process_id} "
            "go together; give all three or none"
        )
    if processes is not None and process_id is not None and not 0 <= process_id < processes:
        raise UserError(
            f"--process_id={process_id} is out of range; use 0 to {processes - 1} "
            f"for --processes={processes}"
        )
    for name, value in (("start_timeout", start_timeout), ("peer_timeout", peer_timeout)):
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1 second")
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=peer_timeout,
            shutdown_timeout_seconds=peer_timeout,
        )
    except ValueError as e:
        no_cluster = "coordinator_address should be defined" in str(e)
        if coordinator is not None or not no_cluster:
            raise
