"""Counts the memory traffic of a compiled program, and the communication between its devices.

XLA's cost analysis counts the body of a while loop once, however often it runs. So its "bytes
accessed" lacks (trips - 1) times the bytes of every loop body; these are read from the program's
text. It does not list collectives at all.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

from sret_jax.planning.hlo import Array, HloComputation, Instruction, read_program

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
NO_TRAFFIC = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "domain"),
    *("while", "conditional", "call", "add-dependency", "partition-id", "replica-id"),
    "opt-barrier",
}


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind among the same number of devices, in one run of a program.

    Attributes:
      kind: such as "all-reduce".
      devices: number of devices in each collective; None: all devices, or a transfer from one to
        another.
      count: number of collectives; those in loops count once per iteration.
      bytes: bytes of their results on one device, without padding; for a reduce-scatter, bytes of
        its operands.
    """

    kind: str
    devices: int | None
    count: int
    bytes: int


class Program:
    """A compiled program, read from its text.

    Args:
      text: from `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: the text has no entry computation.
    """

    def __init__(self, text: str):
        self.computations, self.entry = read_program(text)

    def repeated_bytes(self) -> int:
        """The bytes that XLA's "bytes accessed" omits: (trips - 1) * bytes of every loop body.

        Like XLA's figure, this includes the padding to tiles.
        """
        return sum(
            (times - 1) * sum(size for size, _ in self._accesses(instruction, where))
            for instruction, where, times in self._runs(self.entry, 1)
        )

    def main_memory_bytes(self) -> int:
        """Bytes that one run reads from and writes to the device's main memory, with padding."""
        return sum(
            times * size
            for instruction, where, times in self._runs(self.entry, 1)
            for size, space in self._accesses(instruction, where)
            if space == 0
        )

    def collectives(self) -> list[Collective]:
        """The collectives of one run, by kind and number of devices."""
        found: dict[tuple[str, int | None], list[int]] = {}
        channels: set[str] = set()
        for instruction, computation, times in self._runs(self.entry, 1):
            for channel, kind, devices, size in self._messages(instruction, computation):
                if channel not in channels:
                    found.setdefault((kind, devices), []).extend([size] * times)
                if channel:
                    channels.add(channel)
        ordered = sorted(found.items(), key=lambda item: (item[0][0], item[0][1] or 0))
        return [Collective(*key, len(sizes), sum(sizes)) for key, sizes in ordered]

    def _messages(
        self, instruction: Instruction, where: HloComputation
    ) -> Iterator[tuple[str | None, str, int | None, int]]:
        """(channel, kind, devices, bytes) of a collective, or of those inside a fusion.

        XLA:TPU writes a reduce-scatter as a fusion that keeps a slice of an all-reduce. An
        asynchronous collective appears in each fusion that starts, continues or ends it; all of
        them name the same channel.
        """
        kind = instruction.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            size = _collective_bytes(kind, instruction, where)
            channel = re.search(r"channel_id=\d+", instruction.attributes)
            devices = _group_size(instruction.attributes)
            yield channel and channel[0], kind, devices, size
        elif kind == "fusion":
            fused = self.computations[instruction.called("calls")]
            sliced = any(inner.opcode == "dynamic-slice" for inner in fused.instructions.values())
            for inner in fused.instructions.values():
                for number, name, devices, size in self._messages(inner, fused):
                    scatters = sliced and name == "all-reduce"
                    yield number, "reduce-scatter" if scatters else name, devices, size

    def trips(self, loop: Instruction) -> int | None:
        """How often the body of a while loop runs; None if the program does not contain it.

        For some backends XLA writes the number. Otherwise it is found for scans, whose condition
        compares a counter with a constant.
        """
        noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        if noted:
            return int(noted[1])
        condition = self.computations[loop.called("condition")]
        return self._compared_constant(condition.root, condition)

    def loops_counted_once(self) -> int:
        """The number of loops whose trip count depends on data, such as rejection sampling."""
        return sum(
            instruction.opcode == "while" and self.trips(instruction) is None
            for instruction, _, _ in self._runs(self.entry, 1)
        )

    def _compared_constant(self, compare: Instruction, computation: HloComputation) -> int | None:
        """N in `counter < N`; the comparison may be inside a fusion."""
        direction = compare
        if compare.opcode == "fusion":
            direction = self.computations[compare.called("calls")].root
        if direction.opcode != "compare" or "direction=LT" not in direction.attributes:
            return None
        for operand in compare.operands:
            constant = _constant(computation.instructions[operand], computation)
            if constant is not None:
                return constant
        if compare is not direction:
            return self._compared_constant(direction, self.computations[compare.called("calls")])
        return None

    def _runs(
        self, computation: HloComputation, times: int
    ) -> Iterator[tuple[Instruction, HloComputation, int]]:
        """Yields all instructions that run outside fusions, with the number of their runs."""
        for instruction in computation.instructions.values():
            yield instruction, computation, times
            if instruction.opcode == "while":
                body = self.computations[instruction.called("body")]
                yield from self._runs(body, times * (self.trips(instruction) or 1))
            elif instruction.opcode in ("call", "async-start"):
                attribute = "to_apply" if instruction.opcode == "call" else "calls"
                yield from self._runs(self.computations[instruction.called(attribute)], times)
            elif instruction.opcode == "conditional":
                branches = [self.computations[name] for name in instruction.branches]
                yield from self._runs(max(branches, key=self._total_bytes), times)

    def _total_bytes(self, computation: HloComputation) -> int:
        return sum(
            times * size
            for instruction, where, times in self._runs(computation, 1)
            for size, _ in self._accesses(instruction, where)
        )

    def _accesses(
        self, instruction: Instruction, where: HloComputation
    ) -> Iterator[tuple[int, int]]:
        """Yields (bytes, memory space) that one instruction reads and writes, as XLA counts them.

        Padding counts. Where an array is only sliced or updated in place, only the slice counts.
        """
        opcode = instruction.opcode
        if opcode in NO_TRAFFIC or (opcode.endswith("-done") and opcode != "copy-done"):
            return
        operands = [where.instructions[name] for name in instruction.operands]
        estimate = re.search(r'"bytes_accessed":"?(\d+)', instruction.attributes)
        if opcode == "custom-call" and estimate:
            yield from self._kernel_accesses(int(estimate[1]), [instruction, *operands])
        elif opcode == "fusion":
            yield from self._fusion_accesses(instruction, operands)
        elif opcode in ("dynamic-slice", "slice", "gather"):
            for array in instruction.arrays:
                yield array.padded_bytes, array.space
                yield array.padded_bytes, operands[0].arrays[0].space
        elif opcode in ("dynamic-update-slice", "scatter"):
            (update,) = operands[-1 if opcode == "scatter" else 1].arrays
            yield update.padded_bytes, update.space
            yield update.padded_bytes, instruction.arrays[0].space
        elif opcode == "slice-start":  # prefetches a part of an array; XLA counts it once
            source, part = instruction.arrays[:2]
            yield part.padded_bytes, min(source.space, part.space)
        elif opcode == "copy-start":
            for array in instruction.arrays[:2]:
                yield array.padded_bytes, array.space
        elif opcode == "copy-done":
            for array in instruction.arrays:  # XLA counts the copy again; it is no further traffic
                yield 2 * array.padded_bytes, -1
        else:
            for array in instruction.arrays:
                yield array.padded_bytes, array.space
            for operand in operands:
                for array in operand.arrays:
                    yield array.padded_bytes, array.space

    def _kernel_accesses(
        self, estimate: int, sources: Sequence[Instruction]
    ) -> Iterator[tuple[int, int]]:
        """Yields a Pallas kernel's own estimate; operands that XLA put on the chip count there."""
        arrays = [array for source in sources for array in source.arrays]
        on_chip = min(estimate, _size([array for array in arrays if array.space != 0]))
        yield on_chip, -1
        yield estimate - on_chip, 0

    def _fusion_accesses(
        self, fusion: Instruction, operands: Sequence[Instruction]
    ) -> Iterator[tuple[int, int]]:
        fused = self.computations[fusion.called("calls")]
        for number, operand in enumerate(operands):
            size = self._parameter_bytes(fused.parameters[number], fused)
            yield size, operand.arrays[0].space
        results = [fused.root]
        if fused.root.opcode == "tuple":
            results = [fused.instructions[name] for name in fused.root.operands]
        written = [
            array.padded_bytes
            for result in results
            for array in (
                fused.instructions[result.operands[1]].arrays
                if result.opcode == "dynamic-update-slice"
                else result.arrays
            )
        ]
        for size, array in zip(written, fusion.arrays, strict=True):
            yield size, array.space

    def _parameter_bytes(self, parameter: Instruction, fused: HloComputation) -> int:
        whole = _size(parameter.arrays)
        total, read_whole = 0, False
        for user in fused.users[parameter.name]:
            first = user.operands[0] == parameter.name
            if user.opcode == "slice" or (user.opcode == "dynamic-slice" and first):
                total += _size(user.arrays)
            elif user.opcode == "dynamic-update-slice" and first:
                continue
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")]
                total += sum(
                    self._parameter_bytes(inner.parameters[i], inner)
                    for i, name in enumerate(user.operands)
                    if name == parameter.name
                )
            elif not read_whole:
                read_whole = True
                total += whole
        return total


def _size(arrays: Sequence[Array]) -> int:
    return sum(array.padded_bytes for array in arrays)


def _constant(instruction: Instruction, computation: HloComputation) -> int | None:
    """The value of an instruction that is a whole-number constant or a copy of one."""
    while instruction.opcode in ("copy", "bitcast"):
        instruction = computation.instructions[instruction.operands[0]]
    if instruction.opcode == "constant" and re.fullmatch(r"-?\d+", instruction.literal):
        return int(instruction.literal)
    return None


def _group_size(attributes: str) -> int | None:
    """The number of devices in one group; None if the text contains no groups.

    XLA lists groups, {{0,1},{2,3}}, or gives their number and size, [2,2]<=[4], or names the mesh
    axes that a group spans, mesh['a'=2,'b'=2] {'b'}; an axis may be split, {'a':(1)2}.
    """
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    return None


def _collective_bytes(kind: str, instruction: Instruction, computation: HloComputation) -> int:
    """Bytes of the larger side: the result, or for a reduce-scatter the operands."""
    operands = [computation.instructions[name] for name in instruction.operands]
    into = sum(array.bytes for operand in operands for array in operand.arrays)
    out = sum(array.bytes for array in instruction.arrays)
    if kind == "reduce-scatter":
        return into
    # The result of an async start is (operands, results, context...); most kinds keep the sizes.
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        return out - into
    return out
