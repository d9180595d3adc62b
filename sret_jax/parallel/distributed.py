"""Start-up of several processes."""

import jax


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
    """
    try:
        jax.distributed.initialize(coordinator, processes, process_id)
    except ValueError as e:
        no_cluster = "coordinator_address should be defined" in str(e)
        if coordinator is not None or not no_cluster:
            raise
