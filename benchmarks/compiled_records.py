"""What is compiled, the record of what its compiler said, and tables of records."""

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

Record = dict[str, Any]
"""A specification's fields and what `compiled_worker.measure` found of it."""
Status = Literal["fits", "too large", "failed", "not there"]
COLUMNS = (
    "network", "task", "grid", "batch", "precision", "remat", "device", "mesh",
    "memory GB", "temporaries GB", "cycles", "seconds", "moved GB", "bound ms",
    "kernels", "gathers", "scatters", "collectives GB", "code MB", "compile CPU s",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Spec:
    """A program to compile, and for what.

    Attributes:
      network: in `programs.MODELS`.
      task: see `programs.build`.
      size: longest axis instead of the published one.
      batch: pairs on each device that shares the batch; see `programs.build`.
      precision: see `programs.build`; "float32" has all products at full precision.
      remat: what is computed again; the network's own if None.
      device: in `devices.TARGETS`.
      settings: of the network besides, name and value; see `programs.build`.
      mesh: devices that share the batch, and each volume. None is one device and the
        step alone; of a mesh it is the one that `jaxreg train` compiles, with its
        augmentation.
    """

    network: str
    task: str = "train"
    size: int | None = None
    batch: int | None = None
    precision: str = "default"
    remat: str | None = None
    device: str = "v5e"
    mesh: tuple[int, int] | None = None
    settings: tuple[tuple[str, str], ...] = ()

    @property
    def chips(self) -> int:
        """How many devices take part."""
        return 1 if self.mesh is None else self.mesh[0] * self.mesh[1]

    def title(self) -> str:
        """Returns what it is, in a line."""
        said = [self.network, self.task, f"{self.size}^3" if self.size else "published"]
        said += [f"batch {self.batch}"] * (self.batch is not None)
        said += [self.precision, *[f"remat {self.remat}"] * (self.remat is not None)]
        said += [f"{name} {value}" for name, value in self.settings]
        return ", ".join([*said, mesh_of(self.mesh)]) + f", for {self.device}"

    def file(self) -> str:
        """Returns the name of its record in a folder of records."""
        data, space = self.mesh or (0, 0)
        parts = [
            self.network, self.task, self.size or "published", f"b{self.batch or 1}",
            self.precision, self.remat or "own", self.device,
            f"{data}x{space}" if self.mesh else "alone",
            *(f"{name}_{value}" for name, value in self.settings),
        ]  # fmt: skip
        return "-".join(map(str, parts)) + ".json"


def mesh_of(mesh: Sequence[int] | None) -> str:
    """Returns "data=4,space=1", or "one device"."""
    return "one device" if mesh is None else "data={},space={}".format(*mesh)


def write(record: Record, path: pathlib.Path) -> None:
    """Writes a record; one that is there is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(path.name + ".part")
    whole.write_text(json.dumps(record, indent=1) + "\n")
    whole.replace(path)


def read(folder: pathlib.Path) -> list[Record]:
    """Returns all records of a folder, by name of their files."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


# --- one record -----------------------------------------------------------------------


def sentence(record: Record) -> str:
    """Returns why there are no numbers: it is too large, or did not compile."""
    if record["status"] != "too large":
        return record["reason"]
    if record.get("asked") is None:
        return f"does not fit: {record['reason']}"
    room = f"{_giga(record['asked'])} asked of {_giga(record['memory'])}"
    return f"does not fit: {room}"


def report(record: Record) -> str:
    """Returns what the compiler said, in lines."""
    if "temporaries" not in record:
        return f"{record['title']}\n{sentence(record)}"
    lines = [
        f"{record['title']}; estimated by the compiler for {record['device']}, "
        f"{mesh_of(record['mesh'])}, on each device",
        f"memory       {_giga(record['needed'])}: arguments "
        f"{_giga(record['arguments'])}, temporaries {_giga(record['temporaries'])}, "
        f"results {_giga(record['results'])} ({_giga(record['aliased'])} of them in "
        f"arguments), code {record['code'] / 1e6:.0f} MB{_room(record)}",
    ]
    if record.get("largest_batch") is not None:
        lines.append(f"largest batch {record['largest_batch']}")
    if record["cycles"] is not None:
        lines.append(
            f"cycles       {record['cycles']:.3g} ({record['seconds']:.3g} s); "
            f"{record['without_estimate']} of {record['kernels']} kernels without an "
            "estimate"
        )
    lines.append(
        f"bytes        {_giga(record['moved'])} moved by kernels, padding included"
        + _time(record, "memory_seconds")
    )
    if record["bound"] is not None:
        lines.append(
            f"roofline     {1e3 * record['bound']:.3g} ms: "
            f"{record['flops'] / 1e9:,.0f} GFLOP and "
            f"{_giga(record['least_bytes'])} at least, layer by layer"
        )
    lines.append(
        f"kernels      {record['kernels']:,}, gathers {record['gathers']:,}, scatters "
        f"{record['scatters']:,}" + _loops(record["unknown_loops"])
    )
    lines += _collectives(record["collectives"])
    lines.append(
        f"time         {record['trace_s']:.0f} s to trace, {record['compile_s']:.0f} s "
        f"to compile ({record['compile_cpu_s']:.0f} s of processors)"
    )
    lines.append("most expensive:")
    for one in record["operations"]:
        cost = f"{one['bytes'] / 1e9:9.3g} GB"
        if record["cycles"]:
            share = 100 * one["cycles"] / record["cycles"]
            cost = f"{one['cycles']:9.3g} cycles {share:5.1f} %"
        lines.append(f"  {cost}  {one['source'][-100:]}")
    return "\n".join(lines)


def _giga(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def _room(record: Record) -> str:
    if record["memory"] is None:
        return ""
    fits = "fits" if record["status"] == "fits" else "does not fit"
    return f"; {fits} {_giga(record['memory'])}"


def _time(record: Record, name: str) -> str:
    return f" ({1e3 * record[name]:.3g} ms)" if record[name] is not None else ""


def _loops(unknown: int) -> str:
    return f"; {unknown} loops of unknown length counted once" * (unknown > 0)


def _collectives(found: Sequence[Mapping[str, Any]]) -> list[str]:
    kinds: dict[str, list[float]] = {}
    for one in found:
        total = kinds.setdefault(one["kind"], [0, 0])
        total[0] += one["count"]
        total[1] += one["count"] * one["bytes"]
    lines = [
        f"{kind:18} {count:,}, {size / 1e6:,.3g} MB"
        for kind, (count, size) in sorted(kinds.items(), key=lambda item: -item[1][1])
    ]
    for one in found[:3]:
        lines.append(f"  {one['bytes'] / 1e6:.3g} MB  {one['source'][-90:]}")
    return lines


# --- tables ---------------------------------------------------------------------------


def head(columns: Sequence[str] = COLUMNS) -> str:
    """Returns the first two lines of a table in Markdown."""
    return "| " + " | ".join(columns) + " |\n|" + "---|" * len(columns)


def row(record: Record) -> str:
    """Returns a record as a row of a table with `COLUMNS`."""
    if "temporaries" not in record:
        numbers = [sentence(record), *[""] * 11]
    else:
        sent = sum(one["count"] * one["bytes"] for one in record["collectives"])
        cycles, moved = record["cycles"], record["moved"]
        numbers = [
            _number(record["needed"], 1e9) + " !" * (record["status"] != "fits"),
            _number(record["temporaries"], 1e9), _number(cycles),
            _number(record["seconds"]), _number(moved, 1e9),
            _number(record["bound"], 1e-3), f"{record['kernels']:,}",
            f"{record['gathers']:,}", f"{record['scatters']:,}", _number(sent, 1e9),
            _number(record["code"], 1e6), _number(record["compile_cpu_s"]),
        ]  # fmt: skip
    return "| " + " | ".join([*_settings(record), *numbers]) + " |"


def _settings(record: Record) -> list[str]:
    chips = "-" if record["mesh"] is None else mesh_of(record["mesh"])
    return [
        record["network"], record["task"], grid_of(record), str(record["batch"] or 1),
        precision_of(record), record["remat"] or "-", record["device"], chips,
    ]  # fmt: skip


def precision_of(record: Record) -> str:
    """Returns the precision, and whether the network's activations have it."""
    asked, found = record["precision"], record.get("activations", "")
    return "products bfloat16" if (asked, found) == ("bfloat16", "float32") else asked


def grid_of(record: Record) -> str:
    """Returns "175^3", "192 x 192 x 160"."""
    grid = record.get("grid")
    if grid is None:
        return f"{record['size']}^3" if record["size"] else "published"
    return f"{grid[0]}^3" if len(set(grid)) == 1 else " x ".join(map(str, grid))


def _number(value: float | None, unit: float = 1.0) -> str:
    if value is None:
        return "-"
    scaled = value / unit
    return f"{scaled:.2e}" if scaled >= 1e5 else f"{scaled:.3g}"


RECIPE_COLUMNS = (
    "network", "grid", "device", "batch per chip", "precision", "remat", "mesh",
    "memory GB of", "pairs/s per chip, roofline", "by bytes moved", "by cycles",
)  # fmt: skip


def recipes(records: Iterable[Record]) -> str:
    """Returns the fastest training step that fits, for each network, grid and device.

    Pairs per second are per chip and estimated: by the roofline of the layers, by the
    bytes that the compiled program moves, and on TPU by its compiler's cycles. The
    fastest is that of fewest cycles a pair, elsewhere of fewest bytes.

    Args:
      records: of any tasks; those of training are looked at.
    """
    best: dict[tuple[str, str, str], Record] = {}
    refused: dict[tuple[str, str, str], Record] = {}
    for record in records:
        if record["task"] != "train" or record["status"] not in ("fits", "too large"):
            continue
        key = record["network"], grid_of(record), record["device"]
        if record["status"] == "too large":
            refused.setdefault(key, record)
        elif key not in best or _pair_cost(record) < _pair_cost(best[key]):
            best[key] = record
    lines = [head(RECIPE_COLUMNS)]
    for key in sorted({*best, *refused}):
        record = best.get(key)
        if record is None:
            cells = [*key, "-", "-", "-", "-", sentence(refused[key]), "-", "-", "-"]
        else:
            chips = "-" if record["mesh"] is None else mesh_of(record["mesh"])
            room = f"{_number(record['needed'], 1e9)} of"
            cells = [
                *key, str(record["batch"] or 1), precision_of(record),
                record["remat"] or "-", chips,
                f"{room} {_number(record['memory'], 1e9)}",
                *(_rate(record, n) for n in ("bound", "memory_seconds", "seconds")),
            ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pairs(record: Record) -> float:
    """Returns how many pairs a chip works off in a step."""
    return record["pairs"] / (1 if record["mesh"] is None else record["mesh"][1])


def _pair_cost(record: Record) -> float:
    seconds = record["seconds"]
    return (record["memory_seconds"] if seconds is None else seconds) / _pairs(record)


def _rate(record: Record, name: str) -> str:
    return "-" if record[name] is None else _number(_pairs(record) / record[name])
