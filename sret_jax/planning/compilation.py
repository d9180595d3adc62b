"""Compiles a train step, for devices that need not exist here, and counts what it needs."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from sret_jax.errors import UserError
from sret_jax.models.flops import jaxpr_macs, model_macs
from sret_jax.parallel.host import machine_memory
from sret_jax.parallel.mesh import with_shardings
from sret_jax.planning.chips import GIB
from sret_jax.planning.traffic import Collective, Program
from sret_jax.training.experiment import Computation

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device. A donated argument shares its memory with the result, and counts once.

    Attributes:
      arguments: the state, the batch and the teacher.
      results: results that do not reuse a donated argument.
      temporaries: mostly activations and gradients.
      code: the program itself.
    """

    arguments: int
    results: int
    temporaries: int
    code: int

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.arguments + self.results + self.temporaries + self.code


@dataclasses.dataclass(frozen=True)
class Compilation:
    """Figures of a compiled step. Bytes are per device and step.

    Attributes:
      model_title: name of the model in words.
      devices: number of devices that the step was compiled for.
      batch_size: global batch size.
      seconds: time to trace, lower and compile.
      macs: multiply-accumulates of the whole step on all devices, from the jaxpr.
      model_macs: multiply-accumulates of the model's forward pass for one image.
      memory: memory on one device.
      bytes_accessed: bytes of operands and results of every instruction, as XLA counts them, except
        that loop bodies count once per iteration. On-chip memory is included.
      hbm_bytes: the part of bytes_accessed in the device's main memory.
      collectives: collectives by kind and number of devices.
      loops_counted_once: number of loops of unknown length, such as mixup's draw from the Beta
        distribution.
    """

    model_title: str
    devices: int
    batch_size: int
    seconds: float
    macs: int
    model_macs: int
    memory: Memory
    bytes_accessed: int
    hbm_bytes: int
    collectives: list[Collective]
    loops_counted_once: int

    @property
    def images_per_device(self) -> float:
        """Images per device in one step."""
        return self.batch_size / self.devices

    @property
    def forward_passes(self) -> float:
        """The step's multiply-accumulates divided by a forward pass's; plain training has three."""
        return self.macs / (self.batch_size * self.model_macs)

    @property
    def bytes_per_image(self) -> float:
        """Bytes accessed per image."""
        return self.bytes_accessed / self.images_per_device


class DoesNotFit(UserError):
    """The compiler found that the step needs more memory than a device has.

    Attributes:
      needed: bytes needed on one device.
      shortage: a sentence about the missing memory.
    """

    def __init__(self, needed: int, available: int, batch_size: int):
        self.needed = needed
        self.shortage = shortage(needed, available)
        super().__init__(
            f"a batch of {batch_size:,} does not fit: {self.shortage}; give a smaller "
            "--config.batch_size"
        )


def shortage(needed: int, available: int) -> str:
    """Describes how much memory a device lacks."""
    return (
        f"a device needs {gib(needed)}, {gib(needed - available)} more than the "
        f"{gib(available)} there are"
    )


def gib(size: float) -> str:
    """Formats bytes in GiB, or in MiB below a hundredth of a GiB."""
    if abs(size) < GIB / 100:
        return f"{math.ceil(size / 2**20 * 100) / 100:,.2f} MiB"
    return f"{size / GIB:,.2f} GiB"


def compile_step(computation: Computation, loops: int | None = None) -> Compilation:
    """Compiles a train step of a run exactly as the train loop does, and counts.

    Args:
      computation: an `Experiment`, or the result of `build_computation` for other devices.
      loops: loops of the step; may be left out if all steps have the same.

    Raises:
      DoesNotFit: the step does not fit in the memory of its devices.
      UserError: `loops` is left out, but steps differ.
    """
    start = time.perf_counter()
    loops = loops or computation.only_loops()
    traced = computation.trace_train_step(loops)
    macs = jaxpr_macs(traced.jaxpr.jaxpr)
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error, computation) from error
    seconds = time.perf_counter() - start
    program = Program(compiled.as_text())
    return Compilation(
        model_title=computation.model_title,
        devices=computation.mesh.size,
        batch_size=computation.config.batch_size,
        seconds=seconds,
        macs=macs,
        model_macs=model_macs(computation.model.clone(loops=loops)),
        memory=_memory(compiled),
        bytes_accessed=bytes_accessed(compiled, program),
        hbm_bytes=program.main_memory_bytes(),
        collectives=program.collectives(),
        loops_counted_once=program.loops_counted_once(),
    )


def bytes_accessed(compiled: jax.stages.Compiled, program: Program) -> int:
    """XLA's own figure for one device, plus the further iterations of loops, which it omits."""
    costs: Any = compiled.cost_analysis()
    return int(costs["bytes accessed"]) + program.repeated_bytes()


def available_memory(device: jax.Device) -> int | None:
    """Bytes of main memory that a program can use; None if neither the device nor XLA reports it.

    CPU devices divide the machine's memory. A TPU offers slightly less than its published memory,
    because XLA reserves some; XLA reports the rest when it is asked to compile a program that is
    too large for any device.
    """
    if device.platform == "cpu":
        return machine_memory() // jax.local_device_count("cpu")
    if device.platform != "tpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    sharding = jax.sharding.SingleDeviceSharding(device)
    petabyte = jax.ShapeDtypeStruct((2**48,), "float32", sharding=sharding)
    try:
        jax.jit(lambda x: x + 1).lower(petabyte).compile()
    except jax.errors.JaxRuntimeError as error:
        found = _memory_of_error(str(error))
        return found and found[1]
    return None


def state_bytes(computation: Computation) -> int:
    """Bytes of the state and the teacher on one device: what a step needs at least."""
    arrays = [with_shardings(computation.abstract_state, computation.shardings)]
    if computation.teacher:
        arrays.append(computation.teacher.abstract_variables)
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(arrays)
    )


def _memory(compiled: jax.stages.Compiled) -> Memory:
    found: Any = compiled.memory_analysis()
    return Memory(
        arguments=found.argument_size_in_bytes,
        results=found.output_size_in_bytes - found.alias_size_in_bytes,
        temporaries=found.temp_size_in_bytes,
        code=found.generated_code_size_in_bytes,
    )


def _explained(error: Exception, computation: Computation) -> Exception:
    """Converts the error to DoesNotFit if the compiler reports too little memory."""
    found = _memory_of_error(str(error))
    if not found:
        return error
    needed, available = found
    if "HLO temporaries" in str(error):
        needed += state_bytes(computation)
    return DoesNotFit(needed, available, computation.config.batch_size)


def _memory_of_error(text: str) -> tuple[int, int] | None:
    """(needed, available) bytes, if the compiler reports too little memory."""
    size = r"([\d.]+)([KMGTP]?)"
    for form in (rf"Used {size} of {size} hbm", rf"\({size}\) exceeds available HBM \({size}\)"):
        if match := re.search(form, text):
            needed = float(match[1]) * UNITS[match[2]]
            return int(needed), int(float(match[3]) * UNITS[match[4]])
    return None
