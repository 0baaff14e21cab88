"""Trying an experiment: its checks, one compiled step, and what it will cost."""

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg import experiment as experiment_lib
from jaxreg.data import manifest, synthetic
from jaxreg.experiment import DataConfig, Experiment
from jaxreg.io import files
from jaxreg.models import kinds, sam, unireg
from jaxreg.models.base import Registration
from jaxreg.sources import (
    Sources,
    loss_of,
    make_prepare,
    make_sources,
    objectives_of,
    with_bank,
    with_tasks,
)
from jaxreg.space.grid import Shape
from jaxreg.trainer import (
    metric_of,
    sam_of,
    shared_out,
    tasks_of_start,
    trained_rows,
)
from jaxreg.training import optimizer, state, step
from jaxreg.training.parallel import Layout

_SOME_TASKS = tuple(f"task {i}" for i in range(5))  # where a dry run cannot know
_SOME_PAIRINGS = ("inter",) * len(_SOME_TASKS)


@dataclasses.dataclass(frozen=True)
class DryRun:
    """What a dry run found; see `dry_run`.

    Attributes:
      parameters: trained numbers.
      flops: of one step at the full grid and batch, as XLA counts them before it
        optimises.
      state_bytes: parameters, gradient and optimiser state.
      activation_bytes: of one step, scaled up by voxels and batch from the small grid.
      small: the grid that the step was compiled at.
      compile_seconds: for that.
      data: a sentence about each manifest of any stage, and about SAM weights.
    """

    parameters: int
    flops: float
    state_bytes: int
    activation_bytes: float
    small: tuple[int, int, int]
    compile_seconds: float
    data: tuple[str, ...]

    def rows(self) -> dict[str, str]:
        """Returns what to print, name to value."""
        return {
            "parameters": f"{self.parameters:,}",
            "arithmetic of a step": f"{self.flops / 1e12:.3g} TFLOP",
            "memory of parameters, gradient, optimiser": _gigabytes(self.state_bytes),
            "memory of activations (estimate)": _gigabytes(self.activation_bytes),
            "compiled at": " x ".join(map(str, self.small)),
            "seconds to compile": f"{self.compile_seconds:.1f}",
            **{f"data {i + 1}": text for i, text in enumerate(self.data)},
        }


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def dry_run(experiment: Experiment, *, small: int = 32) -> DryRun:
    """Builds the last stage of an experiment and compiles one step on a small grid.

    The data need not be there: what their manifests would give is made up. What
    training asks of settings and manifests before it starts is asked of every stage.

    Args:
      experiment: what to try.
      small: longest axis of the small grid.

    Raises:
      UserError: settings, devices or data do not fit together.
    """
    # What is quickly found comes before what takes minutes.
    known = tasks_of_start(experiment)
    data = tuple(_quick_checks(experiment, known))
    last = _with_likely_tasks(experiment_lib.stages(experiment)[-1][1], known)
    shape = last.loading.shape
    factor = min(1.0, small / max(shape))
    # What every network takes.
    grid = tuple(16 * math.ceil(n * factor / 16) for n in shape)
    grid = (grid[0], grid[1], grid[2])
    began = time.perf_counter()
    compiled = _lowered(last, grid, 1).compile()
    seconds = time.perf_counter() - began
    memory = compiled.memory_analysis()
    batch = last.train.batch
    model = kinds.build(last.model)
    variables, at_small = (_abstract(model, last, size) for size in (shape, grid))
    # A prompt bank grows with the grid.
    parameters, small_parameters = (
        sum(leaf.size for leaf in jax.tree.leaves(found["params"]))
        for found in (variables, at_small)
    )
    scale = np.prod(shape) / np.prod(grid) * batch / last.train.accumulate
    temporary = 0 if memory is None else memory.temp_size_in_bytes
    # The native form, since XLA counts the body of a loop over slabs only once.
    native = dataclasses.replace(
        last, model=dataclasses.replace(last.model, form="native")
    )
    cost = _lowered(native, shape, 1).cost_analysis() or {}
    start = jax.eval_shape(lambda: _abstract_state(last, variables))
    held = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(start))
    return DryRun(
        parameters=parameters,
        flops=float(cost.get("flops", 0.0)) * batch,
        state_bytes=held + 4 * parameters,
        activation_bytes=max(temporary - 4 * small_parameters, 0) * float(scale),
        small=grid,
        compile_seconds=seconds,
        data=data,
    )


def _with_likely_tasks(experiment: Experiment, known: Sequence[str]) -> Experiment:
    """Returns the experiment with a prompt for each task it starts with or names."""
    data = experiment.data
    if _is_there(data):
        sources = with_bank(make_sources(experiment), known, experiment.model)
        return with_tasks(experiment, sources)
    left = [task for task in data.tasks if task.dataset not in data.exclude]
    likely = Sources(
        train=synthetic.SyntheticPairs([synthetic.SyntheticConfig()]),
        validation=None,
        validation_count=0,
        objectives=(),
        classes=(),
        tasks=tuple(task.dataset for task in left) or _SOME_TASKS,
        regions=tuple(task.region or task.dataset for task in left) or _SOME_TASKS,
        pairings=tuple(task.pairing or "inter" for task in left) or _SOME_PAIRINGS,
    )
    return with_tasks(experiment, with_bank(likely, (), experiment.model))


def _is_there(data: DataConfig) -> bool:
    """Whether pairs can be drawn now."""
    manifests = [pathlib.Path(path) for path in data.manifests]
    return bool(data.synthetic or manifests) and all(p.exists() for p in manifests)


def _abstract(model: Registration, experiment: Experiment, shape: Shape) -> Any:
    """Returns the shapes of fresh variables, with those of released SAM if needed."""
    key = jax.random.key(0)
    variables = dict(jax.eval_shape(functools.partial(model.init, shape=shape), key))
    if kinds.correlates_sam(experiment.model):
        released = functools.partial(sam.init, sam.SamConfig())
        variables[unireg.SAM] = jax.eval_shape(released, key)
    return variables


def _abstract_state(experiment: Experiment, variables: Any) -> dict[str, Any]:
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), variables)
    rule = optimizer.make_optimizer(experiment.optimizer, 1)
    made = state.start(zeros, rule, jax.random.key(0), ema=experiment.train.ema > 0)
    return state.to_tree(made)


def _lowered(experiment: Experiment, grid, count: int):
    """Returns the step of `count` pairs on a grid, traced on shapes alone."""
    supervised = any(o.dice_weight > 0 for o in objectives_of(experiment))
    names = ("moving", "fixed")
    image = jax.ShapeDtypeStruct((count, *grid, 1), jnp.float32)
    batch: dict[str, Any] = dict.fromkeys(names, image)
    number = jax.ShapeDtypeStruct((count,), jnp.int32)
    batch |= {"task": number, "index": number}
    if any(task.randomise != "B" for task in experiment.data.tasks):
        batch |= {f"{name}_target": image for name in names}
    for suffix, needed in (
        ("labels", supervised),
        ("mask", any(o.loss_masking for o in objectives_of(experiment))),
    ):
        if needed:
            whole = jax.ShapeDtypeStruct(image.shape, jnp.int32)
            batch |= {f"{name}_{suffix}": whole for name in names}
    sources = Sources(
        train=synthetic.SyntheticPairs([synthetic.SyntheticConfig()]),
        validation=None,
        validation_count=0,
        objectives=(0,) * max(len(experiment.data.tasks), 1),
        classes=experiment.data.classes or (1, 2),
    )
    model = kinds.build(experiment.model)
    rule = optimizer.make_optimizer(experiment.optimizer, 1)
    one = Layout("single")
    train_step = step.make_train_step(
        model,
        loss_of(experiment),
        rule,
        make_prepare(experiment, sources, one),
        step.StepConfig(ema=experiment.train.ema),
    )
    variables = _abstract(model, experiment, grid)
    shapes = jax.eval_shape(
        lambda v: state.start(v, rule, jax.random.key(0), ema=experiment.train.ema > 0),
        variables,
    )
    return jax.jit(train_step, donate_argnums=0).lower(shapes, batch)


def _check_cache(folder: pathlib.Path) -> None:
    """Checks that the folder is there or that training can make it; makes nothing."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    files.check_writable(there / "entry", "loading.cache_dir")


def _quick_checks(experiment: Experiment, known: Sequence[str]) -> list[str]:
    """Checks each stage as training does before it starts, as far as its data exist.

    Returns:
      A sentence about each manifest, and about SAM weights that are still missing.
    """
    said: list[str] = []
    needed = kinds.correlates_sam(experiment.model)
    if needed and experiment.train.sam is None and experiment.train.start is None:
        said.append("SAM weights are not given yet; training will need --train.sam")
    else:
        sam_of(experiment)
    for stage, changed in experiment_lib.stages(experiment):
        kinds.build(changed.model)
        per_epoch, *_ = shared_out(changed)
        optimizer.make_optimizer(changed.optimizer, per_epoch * stage.epochs)
        said.extend(_data_sentences(changed))
        kinds.check_grid(changed.model, changed.loading.shape)
        if _is_there(changed.data):
            sources = with_bank(make_sources(changed), known, changed.model)
            metric_of(changed, sources)
            if changed.train.only != "all":
                first = stage == experiment.stages[0]
                trained_rows(changed, sources, known, first=first)
    # Most stages share their data.
    return list(dict.fromkeys(said))


def _data_sentences(experiment: Experiment) -> Iterator[str]:
    if experiment.data.synthetic:
        yield f"synthetic: {', '.join(experiment.data.synthetic)}"
    for path in experiment.data.manifests:
        if not pathlib.Path(path).exists():
            yield f"{path} is not there yet; training will need it"
            continue
        found = manifest.read_manifest(path, holdout=experiment.data.holdout)
        counts = [f"{len(found.of_split(s))} {s}" for s in ("train", "val", "test")]
        yield f"{path}: {', '.join(counts)}"
    cache = experiment.loading.cache_dir
    if cache is not None:
        _check_cache(pathlib.Path(cache).absolute())
