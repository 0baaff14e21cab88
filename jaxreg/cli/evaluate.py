"""Verbs that score: ``jaxreg evaluate``, ``tune-lambda`` and ``compare``.

Their bodies live in `evaluation`; here options become arguments and results become
text. Heavy imports live inside the verbs.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from jaxreg.cli.options import (
    OPTIMISATION,
    PANELS,
    Division,
    LandmarksFrame,
    SamWeights,
    app,
    load_sam,
    parse_labels,
    print_merging,
    print_part,
)
from jaxreg.cli.parser import verb
from jaxreg.cli.progress import Bar, interrupted
from jaxreg.errors import UserError
from jaxreg.registration.options import AUTO, Options

if TYPE_CHECKING:
    from jaxreg.data.manifest.records import Manifest
    from jaxreg.data.pair_list import PairSpec
    from jaxreg.evaluation.run import Progress
    from jaxreg.evaluation.table import EvalRecord, Result

Path = pathlib.Path


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which pairs are scored, and the table of their scores.

    Attributes:
      out: Rows as .csv; the tables go beside it as .md.
      pairs: CSV or JSON of pairs.
      manifest: Instead: a manifest or folder of scans.
      split: Of the manifest.
      holdout: Every n-th subject of a manifest without splits belongs to val.
      neighbours: Moving scans per fixed scan of a manifest.
      across_modalities: Pair scans of two modalities of a manifest as well.
      count: Only so many pairs, from the first.
      labels: Which to score, such as 1,2.
      name: What the tables call the model.
    """

    PANEL: ClassVar = "Which pairs"

    out: Path
    pairs: Path | None = None
    manifest: Path | None = None
    split: str = "val"
    holdout: int | None = None
    neighbours: int = 3
    across_modalities: bool = False
    count: int | None = None
    labels: Annotated[tuple[int, ...] | None, parse_labels] = None
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Methods:
    """What is scored.

    Attributes:
      model: Name of jaxreg models, or a path; none for none.
      others: Other tools beside it: SyN-MI, SyN-CC, greedy.
      landmarks_frame: What landmark files hold: mm as in ITK (lps) or NIfTI (ras), or
        NIfTI's voxel indices, as Learn2Reg's do.
    """

    PANEL: ClassVar = "Methods"

    model: Annotated[str | None, str] = None
    others: str = ""
    landmarks_frame: LandmarksFrame = "lps"


@dataclasses.dataclass(frozen=True)
class Progressed(Division):
    """The same, and what an earlier run has done.

    Attributes:
      skip_existing: Pass over pairs whose rows are in --out, but for those that failed.
    """

    skip_existing: bool = False


@verb(
    app,
    "evaluate",
    only=PANELS,
    panels=PANELS,
    defaults={
        "io_iterations": None,
        "io_target": "network",
        "prealign": "none",
    },
)
def evaluate_verb(
    chosen: Pairs,
    divided: Progressed,
    methods: Methods,
    sam_network: SamWeights,
    options: Options,
) -> None:
    """Score registrations of labelled pairs: Dice, HD95, TRE, folding, time.

    A pair that names no modality takes the options', or goes by its values. With
    --io-iterations there are rows with so many steps of optimisation as well. The files
    of --out are written anew after every pair, or as many as there are devices; a pair
    that fails is warned about and left empty.
    """
    _check_source(chosen, "evaluate")
    from jaxreg.evaluation import baselines, run, sharing
    from jaxreg.registration import together
    from jaxreg.weights import load

    part = divided.own_part()
    tools = [tool.strip() for tool in methods.others.split(",") if tool.strip()]
    baselines.check_installed(tools)
    named = None if methods.model == "none" else methods.model
    displacement = options.io_target == "displacement"
    if named is None and not (tools or displacement or options.prealign != "none"):
        raise UserError(
            "give a --model, --others SyN-MI,greedy, --io-target displacement or "
            "--prealign, to evaluate"
        )
    listed = _read(chosen)
    sam = load_sam(options.prealign, sam_network.sam_weights, named)
    loaded = None if named is None else load.load(named)
    pairs, names, options = _paired(listed, chosen, loaded, options)
    if divided.merge_parts is not None:
        found = sharing.merge_files(
            pairs, divided.merge_parts, out=chosen.out, label_names=names
        )
        _conclude(found, chosen.out, names)
        return
    out, own = chosen.out, len(pairs)
    if part is not None:
        out, own = part.file(out), len(part.of(pairs))
        print_part(part, own, len(pairs))
    if not own:
        return
    devices = together.devices_for(own)
    if len(devices) > 1:
        print(together.described(devices))
    with _shown(out, "add --skip-existing to go on, --count for fewer") as progress:
        found = run.evaluate_files(
            pairs,
            loaded,
            options,
            out=chosen.out,
            label_names=names,
            part=part,
            skip_existing=divided.skip_existing,
            with_optimisation=options.io_iterations is not None,
            others={tool: baselines.TOOLS[tool] for tool in tools},
            labels=chosen.labels,
            landmarks_frame=methods.landmarks_frame,
            name=chosen.name,
            sam=sam,
            progress=progress,
        )
    print_merging(part, chosen.out)
    _conclude(found, out, names)


def _conclude(found: "Result", out: pathlib.Path, names) -> None:
    from jaxreg.evaluation import table

    print(table.markdown(found, label_names=names))
    print(f"wrote {out} and {out.with_suffix('.md')}")
    if found.failed:
        raise UserError(
            f"{len(found.failed)} of {len(found.rows)} rows failed for the reasons "
            "above and are empty; mend these pairs or leave them out"
        )


def _check_source(chosen: Pairs, purpose: str) -> None:
    if (chosen.pairs is None) == (chosen.manifest is None):
        raise UserError(f"give either --pairs or --manifest, to say what to {purpose}")
    if chosen.count is not None and chosen.count < 1:
        raise UserError(f"--count is {chosen.count}, expected at least 1 pair")


def _read(chosen: Pairs) -> "Manifest | tuple[PairSpec, ...]":
    """Returns what a list of pairs or a manifest holds."""
    from jaxreg.data import pair_list
    from jaxreg.data.manifest import read

    if chosen.pairs is not None:
        return pair_list.read_pairs(chosen.pairs)
    assert chosen.manifest is not None  # the caller's promise
    return read.read_manifest(chosen.manifest, holdout=chosen.holdout)


def _paired(
    listed: "Manifest | tuple[PairSpec, ...]",
    chosen: Pairs,
    model: Any,
    options: Options,
) -> tuple[Any, Any, Options]:
    """Returns the first pairs, a manifest's names of labels, and the options.

    Warns of pairs whose modality neither they nor the options name.
    """
    from jaxreg.evaluation import pairs as pairs_lib

    options = dataclasses.replace(options, inverse=False)
    if isinstance(listed, tuple):
        pairs, names = listed, None
    else:
        names = listed.labels
        pairs = pairs_lib.pairs_of_manifest(
            listed,
            split=chosen.split,
            neighbours=chosen.neighbours,
            across_modalities=chosen.across_modalities,
            model=model,
            options=options,
        )
    pairs = pairs[: chosen.count]
    _warn_about_modalities(pairs, options)
    return pairs, names, options


def _warn_about_modalities(pairs, options: Options) -> None:
    unknown = sum(
        (pair.fixed_modality or options.fixed_modality) == AUTO
        or (pair.moving_modality or options.moving_modality) == AUTO
        for pair in pairs
    )
    if unknown:
        warnings.warn(
            f"{unknown} of {len(pairs)} pairs name no modality, so that the values of "
            "their scans say whether they are CT or MRI; give --fixed-modality and "
            "--moving-modality, or columns of that name",
            stacklevel=4,
        )


@contextlib.contextmanager
def _shown(
    out: pathlib.Path, more: str = "give --count for fewer pairs"
) -> "Iterator[Progress]":
    """Shows rows as they are done; after an interrupt, says where those are.

    The table has whole pairs, and is not there before the first one is done.

    Args:
      out: the table.
      more: what to do then.
    """
    before = _written_at(out)

    def show(done: int, total: int, row: "EvalRecord") -> None:
        score = "" if math.isnan(row.mean_dice) else f", Dice {row.mean_dice:.3f}"
        bar.show(done, total, f"{row.method}{score}")

    def kept() -> str:
        done = _written_at(out) != before
        found = f"the pairs that are done are in {out}" if done else "no pair is done"
        return f"{found}; {more}"

    with interrupted(kept), Bar("evaluate", waiting="compiling, the first pair") as bar:
        yield show


def _written_at(path: pathlib.Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def parse_weights(text: str) -> tuple[float, ...]:
    """Returns the weights of "0.1,1,10".

    Raises:
      UserError: these are not numbers.
    """
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"--smoothness is {text}, expected numbers such as 0.1,1,10"
        ) from None


@dataclasses.dataclass(frozen=True)
class Sweep:
    """Which network is asked for which weights.

    Attributes:
      model: Checkpoint folder, trained with a range.
      steps: How many weights to try, over the range. Default: 7.
      smoothness: Instead: these weights, such as 0.1,1,10.
      write: Store each task's best weight in the checkpoint.
    """

    PANEL: ClassVar = "Sweep"

    model: str
    steps: int | None = None
    smoothness: Annotated[tuple[float, ...] | None, parse_weights] = None
    write: bool = False


@verb(
    app,
    "tune-lambda",
    only=[name for name in PANELS if name not in (*OPTIMISATION, "smoothness")],
    panels=PANELS,
)
def tune_verb(
    chosen: Pairs, asked: Sweep, sam_network: SamWeights, options: Options
) -> None:
    """Find the smoothness (lambda) that serves each task best, on labelled pairs.

    One network, trained with model.smoothness_range, is asked for several weights.
    Dice per structure and overall, folding and roughness of each are printed. Register
    as you will later: all options of a prediction are those of register.
    """
    _check_source(chosen, "tune on")
    model, given = asked.model, asked.smoothness
    if asked.steps is not None and given is not None:
        raise UserError("--steps and --smoothness both say what to try; give one")
    if asked.write and not os.path.isdir(model):
        raise UserError(f"--write needs a checkpoint folder, --model is {model}")
    from jaxreg.evaluation import sweep, table
    from jaxreg.weights import load

    listed = _read(chosen)
    sam = load_sam(options.prealign, sam_network.sam_weights, model)
    loaded = load.load(model)
    steps = 7 if asked.steps is None else asked.steps
    tried = given or sweep.weights_to_try(loaded, steps)
    sweep.check_weights(loaded, tried)
    options = dataclasses.replace(options, io_iterations=None)
    pairs, names, options = _paired(listed, chosen, loaded, options)
    with _shown(chosen.out) as progress:
        found = sweep.sweep(
            pairs,
            loaded,
            options,
            tried,
            out=chosen.out,
            label_names=names,
            labels=chosen.labels,
            name=chosen.name,
            sam=sam,
            progress=progress,
        )
    print(table.markdown(found.result, label_names=names))
    print("\n".join(sweep.lines_of(found, label_names=names)))
    print(f"wrote {chosen.out} and {chosen.out.with_suffix('.md')}")
    sweep.check_found(found)
    if asked.write:
        sweep.store_best(model, found.best)
        print(f"stored in {model}; register takes it for these tasks from now on")


@dataclasses.dataclass(frozen=True)
class Compared:
    """Two results.

    Attributes:
      a: A .csv of jaxreg evaluate.
      b: Another one, or the same.
      metric: dice, hd95_mm, tre_mm, folding_percent, sdlogj or seconds; dice_N or
        hd95_mm_N for label N.
      method_a: Which method of the first.
      method_b: Which method of the second.
    """

    a: Path
    b: Path
    metric: str = "dice"
    method_a: str | None = None
    method_b: str | None = None


@verb(app, "compare", positional=("a", "b"))
def compare_verb(results: Compared) -> None:
    """Test whether two results differ by more than chance, pair by pair."""
    from jaxreg.evaluation import statistics

    print(
        statistics.compare_files(
            results.a,
            results.b,
            metric=results.metric,
            method_a=results.method_a,
            method_b=results.method_b,
        )
    )
