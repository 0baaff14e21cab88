"""What the devices of a compiled program send each other, read from its text."""

import dataclasses
import math
import re

_KINDS = "all-gather|all-reduce|collective-permute|all-to-all|reduce-scatter"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f64": 8, "s64": 8}
_LINE = re.compile(rf"= (.*?) ({_KINDS})(-start)?\((.*)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of arrays.

    Attributes:
      kind: as XLA calls it.
      arrays: type and shape of each that a device has afterwards.
      groups: which devices take part, as XLA writes it.
      inside: whether it is in a loop.
    """

    kind: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]
    groups: str
    inside: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each array."""
        return tuple(_BYTES.get(t, 4) * math.prod(s) for t, s in self.arrays)


def of(text: str) -> list[Collective]:
    """Returns the collectives of a program's text."""
    loops = set(re.findall(r"body=%?([\w.\-]+)", text))
    found, inside = [], False
    for line in text.splitlines():
        if line and not line[0].isspace():  # a computation starts
            name = re.match(r"(?:ENTRY )?%?([\w.\-]+)", line)
            inside = bool(name) and name[1] in loops
            continue
        match = _LINE.search(line)
        if not match:
            continue
        shapes = re.findall(r"\b([a-z]+\d*)\[([\d,]*)\]", match[1])
        arrays = tuple(
            (kind, tuple(int(n) for n in sizes.split(",") if n))
            for kind, sizes in shapes
        )
        if match[3]:  # a started one has its operands beside its results
            arrays = arrays[len(arrays) // 2 :]
        groups = re.search(r"replica_groups=(\S+?),? ", match[4])
        found.append(Collective(match[2], arrays, groups[1] if groups else "", inside))
    return found


def largest(text: str) -> int:
    """Returns the bytes of the largest exchange of a program, 0 without any."""
    return max((sum(each.sizes) for each in of(text)), default=0)
