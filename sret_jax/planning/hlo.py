"""Parses the text of a compiled program: its computations, instructions and arrays."""

import dataclasses
import functools
import math
import re

BITS = {"pred": 8, "s4": 4, "u4": 4, "s2": 2, "u2": 2, "token": 0, "opaque": 0, "tuple": 0}
ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](?:\{([^}]*)\})?")
INSTRUCTION = re.compile(r"\s+(ROOT )?%?(\S+) = (.*)")
COMPUTATION = re.compile(r"(ENTRY )?%?(\S+) .*\{$")
NAME = re.compile(r"%([^\s,()]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array and its layout in memory.

    Attributes:
      dtype: element type, such as "bf16".
      shape: sizes of the axes.
      minor_to_major: the axes, from the one that varies fastest in memory to the slowest.
      tile: the last axes are padded to multiples of these sizes; () for no padding.
      space: memory space; 0 is the device's main memory, other numbers are on the chip.
    """

    dtype: str
    shape: tuple[int, ...]
    minor_to_major: tuple[int, ...]
    tile: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> int:
        """Its size without padding, in bytes."""
        return math.prod(self.shape) * _bits(self.dtype) // 8

    @property
    def padded_bytes(self) -> int:
        """Its size with the padding of its tiles, in bytes."""
        physical = [self.shape[axis] for axis in reversed(self.minor_to_major)]
        physical = [1] * (len(self.tile) - len(physical)) + physical
        for i, size in enumerate(reversed(self.tile), 1):
            physical[-i] = math.ceil(physical[-i] / size) * size
        return math.prod(physical) * _bits(self.dtype) // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: unique name within the computation.
      opcode: kind of instruction, such as "all-reduce".
      arrays: the result; several arrays if it is a tuple.
      operands: names of the instructions whose results it reads.
      attributes: the rest of the line.
      literal: the text between the parentheses.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str
    literal: str

    def called(self, attribute: str) -> str:
        """The name of the computation that an attribute refers to."""
        match = re.search(rf"\b{attribute}=%?([^\s,}}]+)", self.attributes)
        if not match:
            raise ValueError(f"{self.opcode} {self.name} names no {attribute}")
        return match[1]

    @property
    def branches(self) -> tuple[str, ...]:
        """The names of the computations that a conditional chooses from."""
        several = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if several:
            return tuple(NAME.findall(several[1]))
        return self.called("true_computation"), self.called("false_computation")


@dataclasses.dataclass(frozen=True)
class HloComputation:
    """Instructions by name, in order. The root is the result."""

    instructions: dict[str, Instruction]
    root: Instruction

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(i.literal): i for i in self.instructions.values() if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """For each instruction, the instructions that read its result."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self.instructions.values():
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users


def read_program(text: str) -> tuple[dict[str, HloComputation], HloComputation]:
    """Parses a program: all its computations by name, and the entry computation.

    Args:
      text: from `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, HloComputation] = {}
    entry, name, instructions, root = "", "", {}, ""  # type: ignore[var-annotated]
    for line in text.splitlines():
        if line.startswith("}") and name:
            computations[name] = HloComputation(instructions, instructions[root])
            name = ""
        elif name:
            match = INSTRUCTION.match(line)
            if match:
                instruction = _parse_instruction(match[2], match[3])
                instructions[instruction.name] = instruction
                root = instruction.name if match[1] else root
        elif match := COMPUTATION.match(line):
            name, instructions = match[2], {}
            entry = name if match[1] else entry
    if not entry:
        raise ValueError("the text is not that of a compiled program: it has no entry")
    return computations, computations[entry]


def _parse_instruction(name: str, rest: str) -> Instruction:
    rest = re.sub(r"/\*.*?\*/", "", rest)
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opcode, _, _ = rest.partition("(")
    end = _closing(rest, len(opcode))
    literal = rest[len(opcode) + 1 : end - 1]
    return Instruction(
        name=name,
        opcode=opcode,
        arrays=tuple(_parse_array(match) for match in ARRAY.finditer(kind)),
        operands=() if opcode in ("constant", "parameter") else tuple(NAME.findall(literal)),
        attributes=rest[end:],
        literal=literal,
    )


def _closing(text: str, start: int) -> int:
    """The position after the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


def _parse_array(match: re.Match[str]) -> Array:
    dtype, dimensions, layout = match[1], match[2], match[3] or ""
    shape = tuple(int(d.lstrip("<=")) for d in dimensions.split(",") if d)
    order, _, tiles = layout.partition(":")
    minor_to_major = tuple(int(axis) for axis in order.split(",") if axis)
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    space = re.search(r"S\((\d+)\)", tiles)
    return Array(
        dtype,
        shape,
        minor_to_major or tuple(reversed(range(len(shape)))),
        tuple(int(size) for size in tile[1].split(",")) if tile else (),
        int(space[1]) if space else 0,
    )


def _bits(dtype: str) -> int:
    """The bits of an element: from BITS, or from the name of the type, such as bf16 or f8e4m3."""
    if dtype in BITS:
        return BITS[dtype]
    number = re.search(r"\d+", dtype)
    return int(number[0]) if number else 0
