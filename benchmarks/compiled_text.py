"""Reads the text of a compiled program: cycles, bytes, kernels and collectives.

Loops are counted as often as they run, every branch of a condition once. What runs as
one, a fusion say, is one kernel: it reads its operands and writes its result, each once
and padded to the tiles of its layout; of an operand of which it takes slices or gathers
only these, and of a result that it updates in place the new part. Memory on the chip
(TPU: VMEM, SMEM) is not counted.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CALLED = re.compile(
    r"(?:to_apply|calls|body|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_PADDED_RANK = 2  # tiles have the two minor axes, or one

# Neither computes nor moves anything, or what is inside does.
_FREE = frozenset(
    "parameter constant tuple get-tuple-element bitcast after-all while conditional "
    "call opt-barrier partition-id replica-id domain add-dependency".split()
)
_FREE_CUSTOM_CALLS = re.compile(r'custom_call_target="[^"]*(?:Bitcast|AllocateBuffer)')
_SLICES = frozenset(("slice", "dynamic-slice", "gather"))
_UPDATE = "dynamic-update-slice"
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
    "collective-broadcast",
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a computation.

    Attributes:
      name: without its %.
      shape: of the result, as it is written.
      opcode: "fusion".
      operands: names.
      rest: what follows the operands: attributes, metadata, backend_config.
      root: whether it is the computation's result.
      literal: what stands in the brackets, of a constant its value.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    root: bool = False
    literal: str = ""

    @property
    def cycles(self) -> int | None:
        """What the TPU's compiler estimates; None if it says nothing."""
        found = _CYCLES.search(self.rest)
        return int(found[1]) if found else None

    @property
    def source(self) -> str:
        """The operation of the traced function that it comes from."""
        found = _OP_NAME.search(self.rest)
        name = found[1] if found else ""
        return re.sub(r"^(jit\([^)]*\)/)+", "", name) or f"({self.opcode})"

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations that it runs."""
        said = (_NAME.findall(name) or [name] for name in _CALLED.findall(self.rest))
        return tuple(name for names in said for name in names)

    @property
    def works(self) -> bool:
        """Whether it runs as a kernel, or waits for nothing but one."""
        if self.opcode in _FREE or self.opcode.endswith(("-done", "-update")):
            return False
        return not _FREE_CUSTOM_CALLS.search(self.rest)


Computation = Mapping[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction that runs.

    Attributes:
      instruction: which.
      inside: of which computation.
      times: how often.
      top: whether it is a kernel itself, not a part of one.
    """

    instruction: Instruction
    inside: Computation
    times: int
    top: bool


@dataclasses.dataclass(frozen=True)
class Collective:
    """A transfer between devices.

    Attributes:
      kind: of `COLLECTIVES`.
      source: see `Instruction.source`.
      count: how often it runs.
      bytes: of the larger of what it takes and gives, each time, per device.
      shape: of the result.
    """

    kind: str
    source: str
    count: int
    bytes: int
    shape: str


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a program's text says that it costs on each device.

    Attributes:
      cycles: estimated by the TPU's compiler; None if it estimated nothing.
      moved: bytes of main memory that kernels read and write.
      kernels: that run.
      without_estimate: of these, those of which the compiler said no cycles.
      gathers: that run, inside of kernels too.
      scatters: the same.
      unknown_loops: of which the text does not say how often they run; counted once.
      operations: (source, cycles, bytes), most expensive first.
      collectives: most bytes first.
    """

    cycles: int | None
    moved: int
    kernels: int
    without_estimate: int
    gathers: int
    scatters: int
    unknown_loops: int
    operations: tuple[tuple[str, int, int], ...]
    collectives: tuple[Collective, ...]


def cost_of(text: str) -> Cost:
    """Returns what a compiled program costs.

    Args:
      text: `jax.stages.Compiled.as_text()`.
    """
    program = Program(text)
    cycles: dict[str, int] = collections.defaultdict(int)
    moved: dict[str, int] = collections.defaultdict(int)
    counts = collections.Counter()
    estimated = False
    collectives = []
    for step in program.executed():
        one, times = step.instruction, step.times
        counts[one.opcode] += times
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            size = _sent(one, step.inside)
            collectives.append(Collective(kind, one.source, times, size, one.shape))
        if not step.top or not one.works:
            continue
        counts["kernels"] += times
        moved[one.source] += times * program.moved(one, step.inside)
        said = one.cycles
        estimated |= said is not None
        counts["silent"] += times * (said is None)
        cycles[one.source] += times * (said or 0)
    by = cycles if estimated else moved
    order = sorted(moved, key=lambda name: (-by[name], name))
    return Cost(
        cycles=sum(cycles.values()) if estimated else None,
        moved=sum(moved.values()),
        kernels=counts["kernels"],
        without_estimate=counts["silent"],
        gathers=counts["gather"],
        scatters=counts["scatter"],
        unknown_loops=len(program.unknown_loops),
        operations=tuple((name, cycles[name], moved[name]) for name in order),
        collectives=tuple(sorted(collectives, key=lambda c: -c.count * c.bytes)),
    )


class Program:
    """The computations of a program, and how often they run."""

    def __init__(self, text: str):
        """Reads the text."""
        self.computations, self.entry = _computations(text)
        self.unknown_loops: set[str] = set()

    def executed(self) -> Iterator[Step]:
        """Yields what runs, from the entry on, and how often."""
        yield from self._executed(self.entry, 1, top=True)

    def _executed(self, name: str, times: int, *, top: bool) -> Iterator[Step]:
        inside = self.computations[name]
        for one in inside.values():
            yield Step(one, inside, times, top)
            if one.opcode == "while":
                trips = self._trips(one, inside)
                if trips is None:
                    self.unknown_loops.add(one.name)
                trips = 1 if trips is None else trips
                for called in one.called:
                    yield from self._executed(called, times * trips, top=top)
            elif one.opcode in ("conditional", "call"):
                for called in one.called:
                    yield from self._executed(called, times, top=top)
            elif one.opcode in ("fusion", "async-start"):
                for called in one.called:
                    yield from self._executed(called, times, top=False)

    def _trips(self, loop: Instruction, inside: Computation) -> int | None:
        """Returns how often a loop runs: as it is said, or by its condition."""
        said = _TRIPS.search(loop.rest)
        if said:
            return int(said[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        if condition is None:
            return None
        compared = self.computations.get(condition[1], {})
        root = next((i for i in compared.values() if i.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        counter, limit = (compared.get(name) for name in root.operands)
        end = _number(limit)
        place = counter and re.search(r"index=(\d+)", counter.rest)
        if end is None or not place:
            return None
        start = inside.get(loop.operands[0])
        if start is None or start.opcode != "tuple":
            return None
        first = inside.get(start.operands[int(place[1])])
        while first is not None and first.opcode in ("copy", "bitcast"):
            first = inside.get(first.operands[0])
        begin = _number(first)
        return None if begin is None else max(0, end - begin)

    def moved(self, one: Instruction, inside: Computation) -> int:
        """Returns the bytes that a kernel reads and writes."""
        if one.opcode.endswith("-start") and one.shape.startswith("("):
            return bytes_of(one.shape)  # holds what it reads beside what it writes
        read = 0
        for place, name in enumerate(one.operands):
            if name not in inside:
                continue
            whole = bytes_of(inside[name].shape)
            read += min(whole, self._taken(one, place, whole))
        written = self._written(one, inside)
        if one.opcode in (*_SLICES, _UPDATE):
            read = min(read, written)
        return read + written

    def _written(self, one: Instruction, inside: Computation) -> int:
        """Returns the bytes of a result, of one that is updated in place the new part.

        A result is that of a fusion's root; a tuple's are those of its members.
        """
        if one.opcode == _UPDATE and one.operands[1] in inside:
            return bytes_of(inside[one.operands[1]].shape)
        if one.opcode == "fusion" and one.called:
            inner = self.computations[one.called[0]]
            root = next(i for i in inner.values() if i.root)
            several = root.operands if root.opcode == "tuple" else (root.name,)
            made = [_before_bitcasts(inner[name], inner) for name in several]
            if any(i.opcode == _UPDATE for i in made):
                return sum(self._written(i, inner) for i in made)
        return bytes_of(one.shape)

    def _taken(self, fusion: Instruction, place: int, whole: int) -> int:
        """Returns the bytes that a fusion takes of an operand."""
        if fusion.opcode != "fusion" or not fusion.called:
            return whole
        inner = self.computations[fusion.called[0]]
        parameter = next(
            i.name
            for i in inner.values()
            if i.opcode == "parameter" and i.literal == str(place)
        )
        users = [i for i in inner.values() if parameter in i.operands]
        partly = (*_SLICES, _UPDATE)
        if not users or any(
            i.opcode not in partly or i.operands.index(parameter) > 0 for i in users
        ):
            return whole
        # What is updated in place is not read.
        return sum(bytes_of(i.shape) for i in users if i.opcode != _UPDATE)


def _computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the computations by name, and the name of the entry."""
    found: dict[str, dict[str, Instruction]] = {}
    current: dict[str, Instruction] = {}
    entry = ""
    for line in text.splitlines():
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head:
            current = found.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
            continue
        said = _INSTRUCTION.match(line)
        if said:
            one = _instruction(said[2], said[3], root=bool(said[1]))
            current[one.name] = one
    if not entry:
        raise ValueError("this is no text of a compiled program: it has no ENTRY")
    return found, entry


def _instruction(name: str, said: str, *, root: bool) -> Instruction:
    cut = _closing(said) + 1 if said.startswith("(") else said.index(" ")
    shape, said = said[:cut], said[cut:].strip()
    opcode, _, said = said.partition("(")
    cut = _closing("(" + said) - 1
    given = said[:cut]
    operands = tuple(_NAME.findall(given))
    return Instruction(name, shape, opcode, operands, said[cut + 1 :], root, given)


def _before_bitcasts(one: Instruction, inside: Computation) -> Instruction:
    while one.opcode in ("bitcast", "copy") and one.operands[0] in inside:
        one = inside[one.operands[0]]
    return one


def _closing(text: str) -> int:
    """Returns the place of the bracket that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


def _number(one: Instruction | None) -> int | None:
    if one is None or one.opcode != "constant":
        return None
    return int(one.literal) if re.fullmatch(r"-?\d+", one.literal) else None


def _sent(one: Instruction, inside: Computation) -> int:
    """Returns the bytes of the larger of what a collective takes and gives."""
    taken = sum(
        bytes_of(inside[n].shape, everywhere=True) for n in one.operands if n in inside
    )
    given = bytes_of(one.shape, everywhere=True)
    kind = one.opcode.removesuffix("-start")
    if one.opcode != kind and kind in ("all-gather", "collective-permute"):
        given -= taken  # its shape is of both
    return max(taken, given)


@functools.cache
def bytes_of(shape: str, *, everywhere: bool = False) -> int:
    """Returns the bytes of an array, or all arrays of a tuple, in main memory.

    Args:
      shape: "bf16[1,89,16]{2,1,0:T(8,128)(2,1)}".
      everywhere: without padding, and on the chip too.
    """
    return sum(
        _array_bytes(kind, dimensions, layout, everywhere=everywhere)
        for kind, dimensions, layout in _ARRAY.findall(shape)
    )


def _array_bytes(kind: str, said: str, layout: str, *, everywhere: bool) -> int:
    size = _item_bytes(kind)
    dimensions = [int(n.strip("<=")) for n in said.split(",") if n]
    order, _, tiling = layout.partition(":")
    space = re.search(r"S\((\d+)\)", tiling)
    if everywhere:
        return math.ceil(size * math.prod(dimensions))
    if space and space[1] != "0":
        return 0
    tile = re.search(r"T\(([\d,]+)\)", tiling)
    if tile and order:
        minor = [int(axis) for axis in order.split(",")][:_PADDED_RANK]
        sides = [int(n) for n in reversed(tile[1].split(","))]
        for axis, side in zip(minor, sides, strict=False):
            dimensions[axis] = -(-dimensions[axis] // side) * side
    return math.ceil(size * math.prod(dimensions))


@functools.cache
def _item_bytes(kind: str) -> float:
    """Returns the bytes of a number: "bf16", "pred", "f8e4m3fn", "token"."""
    if kind == "pred":
        return 1
    bits = re.match(r"(?:bf|f|s|u|c)(\d+)", kind)
    return int(bits[1]) / 8 if bits else 0


def summary(cost: Cost, most: int = 10) -> dict[str, Any]:
    """Returns a cost as numbers and lists for JSON; the first operations only."""
    said = dataclasses.asdict(cost)
    said["operations"] = [
        {"source": name, "cycles": cycles, "bytes": moved}
        for name, cycles, moved in cost.operations[:most]
    ]
    said["collectives"] = [dataclasses.asdict(c) for c in cost.collectives]
    return said
