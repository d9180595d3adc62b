"""Bytes that a train step moves per image, compiled for TPUs that need not exist here."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sret_jax.files import write_json
from sret_jax.models.kernel_use import KERNEL
from sret_jax.models.kernels.choice import IMPLEMENTATIONS
from sret_jax.planning.compilation import Compilation, compile_step
from sret_jax.planning.plan import computation_for
from sret_jax.planning.topology import open_topology
from sret_jax.terminal import Progress
from sret_jax.training.experiment import Computation

# GB per image; plain ViTs of the same FLOPs move more (v5e, bfloat16, 128 images per chip).
GOALS = {"sret_s": 0.50, "sret_t": 0.28}


def benchmark_bytes(
    config: ConfigDict, topology: str, *, json_file: epath.Path | None
) -> dict[str, Any]:
    """Compiles a config's train step and prints bytes and FLOPs per image, beside the goal.

    Args:
      config: from configs/common.py; no data set is read.
      topology: a name that `open_topology` takes.
      json_file: file that the figures are also written to.

    Raises:
      UserError: training would refuse the config, the topology is unknown, libtpu is missing, or
        memory does not suffice.
    """
    computation = computation_for(config, open_topology(topology).devices)
    found = _compile(computation, topology)
    name = found.model_title
    report = {
        "model": name,
        "attention": config.model.attention or IMPLEMENTATIONS[0],
        "mlp": config.model.mlp or IMPLEMENTATIONS[0],
        "kernels": _parts_in_kernels(computation),
        "topology": topology,
        "dtype": config.model.dtype,
        "batch_size": config.batch_size,
        "compile_seconds": found.seconds,
        "gigabytes_per_image": found.bytes_per_image / 1e9,
        "flops_per_image": 2 * found.macs / config.batch_size,
        "forward_passes": found.forward_passes,
        "goal_gigabytes_per_image": GOALS.get(name),
    }
    goal = f"; the goal is at most {GOALS[name]:.2f}" if name in GOALS else ""
    print(
        f"{name}, {config.model.dtype}, {found.images_per_device:g} images per device, compiled "
        f"for {topology} in {found.seconds:.0f} s: the train step accesses "
        f"{report['gigabytes_per_image']:.3f} GB per image{goal}. It takes "
        f"{report['flops_per_image'] / 1e9:.2f} GFLOPs per image, as many as "
        f"{found.forward_passes:.3f} forward passes."
    )
    if json_file:
        write_json(json_file, report)
    return report


def compile_for(config: ConfigDict, topology: str) -> Compilation:
    """Compiles the train step of a config, without any data, for a topology.

    Raises:
      UserError: training would refuse the config, the topology is unknown, libtpu is missing, or
        memory does not suffice.
    """
    return _compile(computation_for(config, open_topology(topology).devices), topology)


def _compile(computation: Computation, topology: str) -> Compilation:
    with Progress(f"Compiling {computation.model_title} for {topology}"):
        return compile_step(computation)


def _parts_in_kernels(computation: Computation) -> str:
    """Says how many parts of the step's models run as fused kernels: "all", "some" or "no"."""
    by_kernel = {use.by == KERNEL for use in computation.kernel_uses}
    if by_kernel == {True, False}:
        return "some"
    return "all" if by_kernel == {True} else "no"
