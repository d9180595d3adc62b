"""TPU chips as Google publishes them: memory, peak speed, and the slices on offer."""

import dataclasses
import difflib
import re

from sret_jax.errors import UserError, did_you_mean

GIB = 2**30
SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16")
BIG_CUBES = ("8x16x16", "16x16x16")


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of one kind of chip.

    Sources: https://docs.cloud.google.com/tpu/docs/NAME for v3, v4, v5e, v5p, v6e and tpu7x; for
    v2, and the links of v2 and v3, Jouppi et al., "A Domain-Specific Supercomputer for Training
    Deep Neural Networks", CACM 2020; for the links of v4 (2,400 Gbit/s), Google's announcement of
    v5p. If only the bandwidth of both directions together is published, half of it is used here.

    Attributes:
      name: the chip's name in a topology such as v5e:16x16.
      hbm_bytes: memory in bytes.
      flops: peak FLOP/s in bfloat16.
      hbm_bandwidth: memory bandwidth in bytes/s.
      ici_bandwidth: bytes/s that the chip sends to other chips over all its links together.
      devices: JAX devices per chip; each has an equal part of memory and speed.
      shapes: shapes of the slices on offer.
      config: the libtpu chip configuration that Cloud TPU uses; "" is libtpu's default.
    """

    name: str
    hbm_bytes: int
    flops: float
    hbm_bandwidth: float
    ici_bandwidth: float
    devices: int
    shapes: tuple[str, ...]
    config: str = ""

    @property
    def cores_named(self) -> bool:
        """Whether the cloud's slice names (v4-32) count cores, two per chip, rather than chips."""
        return self.name in ("v2", "v3", "v4", "v5p")


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v2", 16 * GIB, 46e12, 700e9, 248e9, 2, ("2x2", "4x4", "8x8", "8x16", "16x16")),
        Chip("v3", 32 * GIB, 123e12, 900e9, 328e9, 2, (*SQUARES, "16x32", "32x32")),
        Chip("v4", 32 * GIB, 275e12, 1200e9, 300e9, 1, (*CUBES, "8x16x16"), "megacore"),
        Chip("v5e", 16 * GIB, 197e12, 819e9, 200e9, 1, ("1x1", *SQUARES)),
        Chip("v5p", 95 * GIB, 459e12, 2765e9, 600e9, 1, (*CUBES, *BIG_CUBES, "16x16x24")),
        Chip("v6e", 32 * GIB, 918e12, 1640e9, 400e9, 1, ("1x1", *SQUARES)),
        Chip("tpu7x", 192 * GIB, 2307e12, 7380e9, 600e9, 2, (*CUBES, *BIG_CUBES)),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips that are rented together, such as v5e:16x16."""

    chip: Chip
    shape: str

    @property
    def name(self) -> str:
        """The slice's name, as --topology takes it."""
        return f"{self.chip.name}:{self.shape}"

    @property
    def chips(self) -> int:
        """The number of chips."""
        return count(self.shape)


def find_slice(name: str) -> Slice:
    """Finds a slice by a name such as v5e:16x16 or the cloud's v5e-256, v5litepod-256 or v4-32.

    The cloud counts chips for v5e and v6e, and cores, two per chip, for v2, v3, v4 and v5p.

    Raises:
      UserError: no slice has that name.
    """
    text = name.strip().lower().replace("v5litepod", "v5e")
    match = re.fullmatch(r"(\w+)([:-])(.+)", text)
    chip = CHIPS.get(match[1]) if match else None
    if not match or not chip:
        raise UserError(
            f"{_unknown(name)} Plans are for TPUs and this machine: give local, or CHIP:SHAPE such "
            f"as v5e:16x16 with a chip of {', '.join(CHIPS)}"
        )
    names = {shape: shape for shape in chip.shapes}
    if match[2] == "-":
        names = {_cloud_number(chip, shape): shape for shape in chip.shapes}
    if match[3] in names and not (match[2] == "-" and chip.name == "tpu7x"):
        return Slice(chip, names[match[3]])
    nearest = min(chip.shapes, key=lambda shape: abs(count(shape) - _wanted(chip, match[3])))
    raise UserError(
        f"unknown topology {name!r}; did you mean '{chip.name}:{nearest}'? {chip.name} comes as "
        f"{', '.join(chip.shapes)}"
    )


def count(shape: str) -> int:
    """The number of chips in a shape: 2x2x4 -> 16."""
    total = 1
    for side in shape.split("x"):
        total *= int(side)
    return total


def _cloud_number(chip: Chip, shape: str) -> str:
    return str(count(shape) * (2 if chip.cores_named else 1))


def _wanted(chip: Chip, text: str) -> int:
    """The number of chips in a shape or cloud name that is not on offer."""
    if re.fullmatch(r"\d{1,6}(x\d{1,6})+", text):
        return count(text)
    if re.fullmatch(r"\d{1,6}", text):
        return int(text) // (2 if chip.cores_named else 1)
    return 1


def _unknown(name: str) -> str:
    """The start of the sentence on an unknown name, with the nearest one if it is near."""
    known = _all_names()
    if difflib.get_close_matches(name, known, 1):
        return did_you_mean("topology", name, known)
    return f"unknown topology {name!r}."


def _all_names() -> list[str]:
    names = [f"{chip.name}:{shape}" for chip in CHIPS.values() for shape in chip.shapes]
    cloud = [
        f"{chip.name}-{_cloud_number(chip, shape)}"
        for chip in CHIPS.values()
        for shape in chip.shapes
        if chip.name != "tpu7x"
    ]
    return [*names, *cloud, "local"]
