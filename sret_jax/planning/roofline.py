"""The time of a step at a chip's published peaks: an estimate, not a measurement."""

import dataclasses

from sret_jax.planning.chips import Chip
from sret_jax.planning.compilation import Compilation

# Bytes that each of n devices sends in a ring, as a multiple of the collective's larger side.
SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
}
FORMULA = (
    "step = max(compute, memory) + communication; compute = FLOPs / (chips * peak FLOP/s), "
    "memory = HBM bytes of a chip / HBM bandwidth, communication = bytes a chip sends / "
    "ICI bandwidth, of which an all-reduce of b bytes among n sends 2 (n - 1) / n * b, and "
    "all-gather, reduce-scatter and all-to-all (n - 1) / n * b"
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step.

    Computation and memory traffic are assumed to overlap. Communication is assumed to overlap with
    neither, because gradients are reduced once, after the last one is computed.

    Attributes:
      compute: time of all matrix products at the chip's bfloat16 peak.
      memory: time of all main-memory traffic at peak bandwidth.
      communication: time of all collectives over all links together.
    """

    compute: float
    memory: float
    communication: float

    @property
    def step(self) -> float:
        """The time of the whole step, by FORMULA."""
        return max(self.compute, self.memory) + self.communication

    @property
    def bound(self) -> str:
        """The name of the largest part."""
        parts = dataclasses.asdict(self)
        return max(parts, key=lambda name: parts[name])


def roofline(compilation: Compilation, chip: Chip) -> Roofline:
    """The roofline of a compiled step on chips of that kind."""
    devices = compilation.devices
    sent = sum(
        c.bytes * (SENT[c.kind](c.devices or devices) if c.kind in SENT else 1)
        for c in compilation.collectives
    )
    return Roofline(
        compute=2 * compilation.macs / devices / (chip.flops / chip.devices),
        memory=compilation.hbm_bytes / (chip.hbm_bandwidth / chip.devices),
        communication=sent / (chip.ici_bandwidth / chip.devices),
    )
