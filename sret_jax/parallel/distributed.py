"""Start-up of several processes."""

import jax

from sret_jax.errors import UserError


def initialize(
    coordinator: str | None = None, processes: int | None = None, process_id: int | None = None
) -> None:
    """Joins the other processes of this run; does nothing where there are none.

    With no arguments, JAX looks for a cluster it knows (TPU pod slice, SLURM, Open MPI,
    Kubernetes). With all three, it joins `processes` processes at `coordinator`.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      UserError: some but not all of the three are given, or the number is out of range.
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
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except ValueError as e:
        no_cluster = "coordinator_address should be defined" in str(e)
        if coordinator is not None or not no_cluster:
            raise
