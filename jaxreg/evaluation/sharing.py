"""Evaluations that several processes share, or that go on after an interrupt.

Each part of a list has a table of its own, see `registration.parts`; put together they
are the table of the whole list, but for the seconds.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence

from jaxreg.data.pair_list import PairSpec, pair_names
from jaxreg.errors import UserError
from jaxreg.evaluation import table as table_lib
from jaxreg.io import files
from jaxreg.registration import parts
from jaxreg.xla import spreading

Names = Mapping[tuple[str, str], PairSpec]
"""Pairs by their table and name, which together are in no list twice."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What a process does of a list, and where its rows go.

    Attributes:
      part: the pairs that it evaluates; all if None.
      known: rows of an earlier run; pairs that have them all are passed over.
      keep: called with all rows so far, after each pair, or after as many as there are
        devices.
      devices: on which so many pairs are registered at a time, see `together`; those of
        `together.devices_for` if None.
    """

    part: parts.Part | None = None
    known: Sequence[table_lib.EvalRecord] = ()
    keep: Callable[[table_lib.Result], None] | None = None
    devices: Sequence[spreading.Device] | None = None

    def of(self, pairs: Names) -> Names:
        """Returns the pairs of this process."""
        if self.part is None:
            return pairs
        return {name: pairs[name] for name in self.part.of(list(pairs))}

    def finished(
        self, pairs: Names, methods: Sequence[str]
    ) -> list[table_lib.EvalRecord]:
        """Returns the rows of pairs that an earlier run has measured by every method.

        A pair that failed, or whose files are missing, is none of them.

        Args:
          pairs: of this process.
          methods: by name.

        Raises:
          UserError: there are rows of other pairs or methods.
        """
        rows: dict[tuple[str, str], dict[str, table_lib.EvalRecord]] = {}
        for row in self.known:
            pair = (row.task, row.pair)
            if pair not in pairs or row.method not in methods:
                other = row.method if pair in pairs else f"the pair {row.pair}"
                raise UserError(
                    f"the table `out` has rows of {other}, which is not evaluated now; "
                    "name another file, or leave `skip_existing` out"
                )
            rows.setdefault(pair, {})[row.method] = row
        return [
            row
            for name, found in rows.items()
            if len(found) == len(methods)
            and not any(row.failed for row in found.values())
            and all(path.is_file() for path in _outputs(pairs[name]))
            for row in found.values()
        ]


def _outputs(pair: PairSpec) -> list[pathlib.Path]:
    return [p for p in (pair.transform_out, pair.warped_out) if p is not None]


def named(pairs: Sequence[PairSpec]) -> Names:
    """Returns pairs by table and name.

    Raises:
      UserError: one is listed twice, or two have one output.
    """
    found: dict[tuple[str, str], PairSpec] = {}
    outputs: set[pathlib.Path] = set()
    for pair, name in zip(pairs, pair_names(pairs), strict=True):
        if (pair.table, name) in found:
            raise UserError(f"pair {name} of {pair.table} is listed twice; remove one")
        found[pair.table, name] = pair
        for path in _outputs(pair):
            if path.absolute() in outputs:
                raise UserError(
                    f"pair {name}: {path} is an output twice; name another file"
                )
            outputs.add(path.absolute())
    return found


def in_order(
    rows: Sequence[table_lib.EvalRecord], methods: Sequence[str], pairs: Names
) -> table_lib.Result:
    """Returns rows by method and pair, those of a task with the same labels.

    Args:
      rows: in any order.
      methods: in that of the table.
      pairs: in that of the list.
    """
    known: dict[str, set[int]] = {}
    for row in rows:
        known.setdefault(row.task, set()).update(row.dice)

    def filled(task: str, scores: Mapping[int, float]) -> dict[int, float]:
        return {n: scores.get(n, math.nan) for n in sorted(known[task])}

    method_at = {method: place for place, method in enumerate(methods)}
    pair_at = {name: place for place, name in enumerate(pairs)}
    ordered = sorted(rows, key=lambda r: (method_at[r.method], pair_at[r.task, r.pair]))
    return table_lib.Result(
        tuple(
            dataclasses.replace(
                row,
                dice=filled(row.task, row.dice),
                hd95_mm=filled(row.task, row.hd95_mm),
            )
            for row in ordered
        )
    )


def write_files(
    out: pathlib.Path,
    result: table_lib.Result,
    label_names: Mapping[str, Mapping[int, str]] | None,
) -> None:
    """Writes the rows as CSV and the tables as Markdown beside it.

    Args:
      out: the CSV file; the Markdown gets its name with .md.
      result: the rows.
      label_names: see `table.markdown`.
    """
    table_lib.write_csv(out, result)
    with files.atomic_path(out.with_suffix(".md")) as unfinished:
        text = table_lib.markdown(result, label_names=label_names)
        unfinished.write_text(text, encoding="utf-8")


def check_files(out: files.PathLike) -> pathlib.Path:
    """Checks that `write_files` can write; returns the path of the CSV file.

    Raises:
      UserError: it cannot.
    """
    out = files.check_writable(out, "`out`", suffixes=(".csv",))
    files.check_writable(out.with_suffix(".md"), "`out`")
    return out


def merge_files(
    pairs: Sequence[PairSpec],
    count: int,
    *,
    out: files.PathLike,
    label_names: Mapping[str, Mapping[int, str]] | None = None,
) -> table_lib.Result:
    """Puts the tables of a list's parts together, in the list's order.

    Args:
      pairs: of the whole list.
      count: of its parts.
      out: the table of the whole list; those of its parts lie beside it, see
        `parts.Part.file`.
      label_names: see `table.markdown`.

    Returns:
      The rows.

    Raises:
      UserError: a part is missing, lacks rows or has other ones; or the files cannot be
        written.
    """
    out, whole = check_files(out), named(pairs)
    rows: list[table_lib.EvalRecord] = []
    methods: tuple[str, ...] = ()
    for part in parts.every(count):
        own = Share(part).of(whole)
        if not own:
            continue
        found = table_lib.read_csv(part.file(out))
        methods = methods or found.methods
        _check_part(part, part.file(out), found, methods, own)
        rows += found.rows
    result = in_order(rows, methods, whole)
    write_files(out, result, label_names)
    return result


def _check_part(
    part: parts.Part,
    path: pathlib.Path,
    found: table_lib.Result,
    methods: Sequence[str],
    own: Names,
) -> None:
    if set(found.methods) != set(methods):
        raise UserError(
            f"{path} has the methods {', '.join(found.methods)}, the parts before it "
            f"{', '.join(methods)}; evaluate all parts alike"
        )
    there = [(row.method, row.task, row.pair) for row in found.rows]
    expected = {(method, *name) for method in methods for name in own}
    other = set(there) - expected
    if other or len(set(there)) < len(there):
        name = min(other)[-1] if other else "a row twice"
        raise UserError(
            f"{path} has {name}, which {part} of the list has not; evaluate the parts "
            "of the present list"
        )
    lacking = expected - set(there)
    if lacking:
        raise UserError(
            f"{path} lacks {min(lacking)[-1]}; finish {part} first, by `part` "
            f"{part.number}/{part.count} and `skip_existing`"
        )
