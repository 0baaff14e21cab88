"""Dry runs: checks, compiled steps, memory and arithmetic of an experiment."""

import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxreg.data import pair_source, pairs
from jaxreg.data.manifest import read as read_lib
from jaxreg.experiments import config
from jaxreg.experiments.config import DataConfig, Experiment, Stage
from jaxreg.experiments.datasets import (
    Sources,
    make_sources,
    rule_of,
    with_bank,
    with_bank_model,
)
from jaxreg.experiments.held_out import FixedPlans
from jaxreg.experiments.stage import (
    PairStage,
    batch_layout,
    lowered_step,
    make_optimizer,
    model_flops,
)
from jaxreg.experiments.warm_start import Read, names_of_start, sam_of
from jaxreg.io import files
from jaxreg.space.grid import Shape
from jaxreg.training import optimizer, state
from jaxreg.training.parallel import Layout
from jaxreg.training.stage import Report
from jaxreg.weights import load
from jaxreg.xla import compilation_cache

_MADE_UP_DATASETS = tuple(f"task {i}" for i in range(5))  # where a dry run cannot know


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """Memory that one device needs for a training step, as its program was compiled.

    Attributes:
      total: bytes: what is handed over, what comes back and what is needed meanwhile;
        a buffer that is used again counts once. None where it could not be found out.
      pairs: worked off at once.
      fewest: pairs that a step can have.
      least: bytes of the same step with these at once; None if not known.
      lasting: bytes of parameters, their gradient and the optimiser's state.
      reason: why there is no total.
    """

    total: int | None
    pairs: int
    fewest: int
    least: int | None
    lasting: int
    reason: str = ""

    def rows(self, *, of: str = "", what: str = "pair") -> dict[str, str]:
        """Returns what to print, name to value.

        Args:
          of: the stage, where there are several.
          what: is worked off at once.
        """
        device = pair = f"not known: {self.reason}"
        if self.total is not None:
            device = f"{_gigabytes(self.total)} for {counted(self.pairs, what)} at once"
        if self.least is not None:
            pair = f"{_gigabytes(self.least)} for {counted(self.fewest, what)} alone"
        return {
            f"memory of a step per device{of}": device,
            f"memory of a step per {what}{of}": pair,
            f"parameters, gradient, optimiser{of}": f"{_gigabytes(self.lasting)} of it",
        }


@dataclasses.dataclass(frozen=True)
class TracedStep:
    """The training step of a stage, ready to be compiled.

    Attributes:
      stage: which.
      experiment: as it is during it, with the network for its tasks.
      sources: of its pairs; made up where data are not there.
      rule: of its optimiser.
      layout: its devices, as this machine has them.
      lowered: the step, for the shapes of a state and a global batch.
      start: the shapes of a state, as one device has it.
    """

    stage: Stage
    experiment: Experiment
    sources: Sources
    rule: optax.GradientTransformation
    layout: Layout
    lowered: jax.stages.Lowered
    start: state.TrainState

    @property
    def at_once(self) -> int:
        """Pairs that a device works off at once."""
        train = self.experiment.train
        return train.batch // (self.layout.data * train.accumulate)

    def of_pairs(self, at_once: int) -> jax.stages.Lowered:
        """Returns the step for another number of pairs at once on each device."""
        if at_once == self.at_once:
            return self.lowered
        train, layout = self.experiment.train, self.layout
        batch = at_once * layout.data * train.accumulate
        # Whose statistics are shared makes no difference to what is needed.
        train = dataclasses.replace(train, batch=batch, replicas=0)
        changed = dataclasses.replace(self.experiment, train=train)
        return lowered_step(changed, self.sources, self.rule, layout, (0, 1))[0]


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a dry run found; see `dry_run`.

    Attributes:
      parameters: trained numbers.
      flops: of one step at the full grid and batch, see `stage.model_flops`.
      memory: of a step on each device, by stage.
      devices: which there are, and what was assumed.
      compiled_for: grid and kind of device.
      seconds: for tracing and compiling the steps of all stages.
      data: a sentence about each manifest of any stage, and about SAM weights.
    """

    parameters: int
    flops: float | None
    memory: Mapping[str, StepMemory]
    devices: str
    compiled_for: str
    seconds: float
    data: tuple[str, ...]

    def rows(self) -> dict[str, str]:
        """Returns what to print, name to value."""
        several = len(self.memory) > 1
        return {
            "parameters": f"{self.parameters:,}",
            "arithmetic of a step": "not known without a CPU among JAX's platforms"
            if self.flops is None
            else f"{self.flops / 1e12:.3g} TFLOP",
            "devices": self.devices,
            **{
                name: value
                for stage, found in self.memory.items()
                for name, value in found.rows(of=f", {stage}" * several).items()
            },
            "compiled for": self.compiled_for,
            "seconds to compile": f"{self.seconds:.1f}",
            **{f"data {i}": text for i, text in enumerate(self.data, start=1)},
        }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.3g} GB"


def counted(count: int, what: str) -> str:
    """Returns "1 pair", "2 pairs"."""
    return f"{count} {what}" + "s" * (count != 1)


@compilation_cache.kept()
def dry_run(experiment: Experiment, *, report: Report = lambda _: None) -> DryRun:
    """Builds all stages of an experiment and compiles their steps, as training would.

    The data need not be there: what their manifests would give is made up. What
    training asks of settings and manifests before it starts is asked of every stage.
    Nothing is allocated: the grid, the batch and the devices are those of the training,
    as far as this machine has them.

    Args:
      experiment: what to try.
      report: takes a sentence before each compilation, which may take minutes.

    Raises:
      UserError: settings, devices or data do not fit together.
    """
    # What is quickly found comes before what takes minutes.
    read = functools.cache(load.load)
    known = names_of_start(experiment, read)
    data = tuple(_quick_checks(experiment, known, read))
    began = time.perf_counter()
    memory: dict[str, StepMemory] = {}
    found: dict[str, StepMemory] = {}  # by program: stages may differ in data alone
    last = None
    for last in traced_steps(experiment, known):
        program = last.lowered.as_text()
        if program not in found:
            shape, at_once = last.experiment.loading.shape, last.at_once
            then = ", then for one" if at_once > 1 else ""
            report(
                f"{last.stage.name}: compiling the training step for "
                f"{grid_and_device(shape)}, {counted(at_once, 'pair')} at once{then}"
            )
            found[program] = memory_of(last.of_pairs, last.start, at_once)
        memory[last.stage.name] = found[program]
    assert last is not None  # an experiment has a stage
    params = jax.tree.leaves(last.start.variables["params"])
    return DryRun(
        parameters=sum(leaf.size for leaf in params),
        flops=_flops(last),
        memory=memory,
        devices=_devices(last),
        compiled_for=grid_and_device(last.experiment.loading.shape),
        seconds=time.perf_counter() - began,
        data=data,
    )


def traced_steps(
    experiment: Experiment,
    known: Sequence[str] = (),
    devices: list[Any] | None = None,
) -> Iterator[TracedStep]:
    """Yields the step that training compiles in each stage, traced on shapes alone.

    Args:
      experiment: with or without its data.
      known: names of the prompts or regions of the weights to start from.
      devices: to train on, described ones too; all of `jax.devices()` if None.
    """
    for stage, changed in config.stages(experiment):
        per_epoch, layout, shares = batch_layout(changed, devices)
        during, sources = _with_sources(changed, known)
        rows = None
        if during.train.only != "all":  # which prompts change, changes no size
            rows = tuple(range(len(sources.bank)))
        rule = make_optimizer(during, per_epoch * stage.epochs, per_epoch, rows)
        lowered, start = lowered_step(during, sources, rule, layout, shares)
        yield TracedStep(stage, during, sources, rule, layout, lowered, start)


def memory_of(
    lower: Callable[[int], jax.stages.Lowered],
    start: state.TrainState,
    pairs: int,
    fewest: int = 1,
) -> StepMemory:
    """Compiles a step and returns its memory, or why that cannot be known.

    Args:
      lower: pairs at once on a device to the step, for the shapes of a state and batch.
      start: these shapes of a state, as one device has it.
      pairs: that a device works off at once.
      fewest: that it could; compiled too, since memory is not in proportion to them.
    """
    params = start.variables["params"]
    lasting = sum(_bytes(leaf) for leaf in jax.tree.leaves((start, params)))
    total, reason = _needed(lower(pairs))
    least = total
    if total is not None and pairs > fewest:
        least, reason = _needed(lower(fewest))
    return StepMemory(total, pairs, fewest, least, lasting, reason)


def _needed(lowered: jax.stages.Lowered) -> tuple[int | None, str]:
    """Returns the bytes of a compiled step, or None and why they are not known."""
    try:
        plan = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        return None, f"it cannot be compiled here ({str(error).splitlines()[0]})"
    total = 0
    if plan is not None:
        # What is handed over and reused for the result counts once.
        total = plan.argument_size_in_bytes + plan.temp_size_in_bytes
        total += plan.output_size_in_bytes - plan.alias_size_in_bytes
        total += plan.generated_code_size_in_bytes
    if not total:
        return None, f"{jax.default_backend()} does not tell what its programs need"
    return int(total), ""


def _bytes(leaf: Any) -> int:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, leaf)
    return leaf.size * leaf.dtype.itemsize


def grid_and_device(shape: Shape) -> str:
    """Returns "175 x 175 x 175 on cpu"."""
    return f"{' x '.join(map(str, shape))} on {jax.default_backend()}"


def _devices(step: TracedStep) -> str:
    """Returns which devices a step was compiled for, and what it assumes."""
    train, layout = step.experiment.train, step.layout
    kind = jax.devices()[0].device_kind
    text = f"{layout.data * layout.space} of this machine ({kind}), "
    text += f"{counted(step.at_once, 'pair')} at once on "
    text += f"{layout.space} that share volumes" if layout.space > 1 else "each"
    if train.replicas > layout.data:
        share = train.batch // (train.accumulate * train.replicas)
        text += (
            f"; the recipe asks for {train.replicas}, with {counted(share, 'pair')} "
            f"each: `train.batch` {share} `train.replicas` 1 tries one of them"
        )
    return text


def _with_sources(
    experiment: Experiment, known: Sequence[str]
) -> tuple[Experiment, Sources]:
    """Returns a stage with a prompt for each task that it has, and its data.

    Data that are not there are made up.
    """
    there = _is_there(experiment.data)
    found = make_sources(experiment) if there else _likely_sources(experiment)
    sources = with_bank(found, known, experiment.model)
    return with_bank_model(experiment, sources), sources


def _likely_sources(experiment: Experiment) -> Sources:
    """Returns sources without pairs, in place of manifests that are not there yet."""
    data = experiment.data
    named = data.tasks or tuple(pairs.Task(name) for name in _MADE_UP_DATASETS)
    tasks = tuple(task for task in named if task.dataset not in data.exclude)
    names = ["default", *(name for name, _ in experiment.objectives)]
    return Sources(
        train=pair_source.PairSource((), FixedPlans(tasks, ())),
        validation=None,
        validation_count=0,
        objectives=tuple(names.index(task.objective) for task in tasks),
        classes=data.classes or (1, 2),
        tasks=tuple(task.dataset for task in tasks),
        regions=tuple(task.region or task.dataset for task in tasks),
        pairings=tuple(task.pairing or "inter" for task in tasks),
        rules=tuple(rule_of(experiment, task) for task in tasks),
    )


def _is_there(data: DataConfig) -> bool:
    """Whether pairs can be drawn now."""
    manifests = [pathlib.Path(path) for path in data.manifests]
    return bool(data.synthetic or manifests) and all(p.exists() for p in manifests)


def _flops(step: TracedStep) -> float | None:
    return model_flops(step.experiment, step.sources, step.rule)


def _check_cache(folder: pathlib.Path) -> None:
    """Checks that the folder is there or that training can make it; makes nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    files.check_writable(there / "entry", "loading.cache_dir")


def _quick_checks(
    experiment: Experiment, known: Sequence[str], read: Read
) -> list[str]:
    """Checks each stage as training does before it starts, as far as its data exist.

    Returns:
      A sentence about each manifest, and about SAM weights that are still missing.
    """
    sentences: list[str] = []
    needed = experiment.model.needs_sam
    if needed and experiment.train.sam is None and experiment.train.start is None:
        sentences.append(
            "SAM weights are not given yet; training will need `train.sam`"
        )
    else:
        sam_of(experiment, read=read)
    for stage, changed in config.stages(experiment):
        per_epoch, *_ = batch_layout(changed)
        optimizer.make_optimizer(changed.optimizer, per_epoch * stage.epochs)
        sentences.extend(_data_sentences(changed))
        changed.model.check_grid(changed.loading.shape)
        if _is_there(changed.data):
            PairStage(changed, stage, pathlib.Path(), known, known, None, read)
    # Most stages share their data.
    return list(dict.fromkeys(sentences))


def manifest_sentences(paths: Sequence[str], holdout: int | None) -> Iterator[str]:
    """Yields how many scans each manifest has in each split.

    Args:
      paths: of manifests; they need not be there.
      holdout: see `DataConfig`.
    """
    for path in paths:
        if not pathlib.Path(path).exists():
            yield f"{path} is not there yet; training will need it"
            continue
        found = read_lib.read_manifest(path, holdout=holdout)
        counts = [f"{len(found.of_split(s))} {s}" for s in ("train", "val", "test")]
        yield f"{path}: {', '.join(counts)}"


def _data_sentences(experiment: Experiment) -> Iterator[str]:
    data, cache = experiment.data, experiment.loading.cache_dir
    if data.synthetic:
        yield f"synthetic: {', '.join(data.synthetic)}"
    yield from manifest_sentences(data.manifests, data.holdout)
    if cache is not None:
        _check_cache(pathlib.Path(cache).absolute())
