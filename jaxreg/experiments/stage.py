"""A stage of training on pairs: its data, network, devices, optimiser and score."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from jaxreg.data import loading as loading_lib
from jaxreg.data import pair_source
from jaxreg.errors import UserError
from jaxreg.experiments import warm_start
from jaxreg.experiments.config import Experiment, Stage
from jaxreg.experiments.datasets import (
    Sources,
    dataset_names,
    loading_of,
    loss_of,
    make_prepare,
    make_sources,
    with_bank,
    with_bank_model,
)
from jaxreg.experiments.validation import make_find_bad_pairs, make_validation
from jaxreg.experiments.warm_start import Read
from jaxreg.models import sam as sam_lib
from jaxreg.models.sam import TrainedSam
from jaxreg.training import loop, optimizer, parallel, state, utilisation
from jaxreg.training import step as step_lib
from jaxreg.training.parallel import Layout
from jaxreg.training.stage import StagePlan
from jaxreg.typing import Key, Variables


def _steps_key(seed: int, number: int) -> Key:
    """Returns the root key of a stage's steps; independent of the weights' key."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)


def trained_rows(
    experiment: Experiment, sources: Sources, known: Sequence[str], *, first: bool
) -> tuple[int, ...]:
    """Returns the rows of the bank that change where `train.only` restricts training.

    Args:
      experiment: as it is during the stage.
      sources: with their bank.
      known: names in the bank of the weights to start from.
      first: whether no stage came before.

    Raises:
      UserError: the network has no bank, nothing to start from, or no prompt to change.
    """
    only, start = experiment.train.only, experiment.train.start
    if experiment.model.conditioning != "prompts":
        raise UserError(
            f"train.only is {only}, but the network has no prompt bank; give "
            "`train.only` all, or a PromptReg model"
        )
    if first and start is None:
        raise UserError(
            f"train.only is {only}, but there are no weights to start from and the "
            "rest would stay untrained; give `train.start`"
        )
    if only == "prompts":
        return tuple(sorted(set(sources.rows)))
    rows = tuple(i for i, name in enumerate(sources.bank) if name not in known)
    if not rows:
        raise UserError(
            "train.only is new_prompts, but the weights to start from know all tasks "
            f"already ({', '.join(sources.tasks)}); add a dataset, or give "
            "`train.only` prompts"
        )
    return rows


def batch_layout(
    experiment: Experiment, devices: list[Any] | None = None
) -> tuple[int, Layout, tuple[int, int]]:
    """Returns steps per epoch, the devices, and what `parallel.check_batch` does.

    Args:
      experiment: as it is during the stage.
      devices: all of `jax.devices()` if None.
    """
    train, pairs_per_epoch = experiment.train, experiment.data.pairs_per_epoch
    if pairs_per_epoch < train.batch:
        raise UserError(
            f"data.pairs_per_epoch is {pairs_per_epoch}, less than train.batch "
            f"{train.batch}; raise it"
        )
    layout = parallel.make_layout(
        train.parallel,
        space=train.space,
        shard_optimizer=train.shard_optimizer,
        devices=devices,
    )
    shares = parallel.check_batch(
        train.batch, layout, accumulate=train.accumulate, replicas=train.replicas
    )
    return pairs_per_epoch // train.batch, layout, shares


def make_optimizer(
    experiment: Experiment,
    steps: int,
    per_epoch: int,
    rows: tuple[int, ...] | None = None,
) -> optax.GradientTransformation:
    """Returns the update rule of a stage.

    Args:
      experiment: as it is during the stage.
      steps: of the stage.
      per_epoch: of them.
      rows: the prompts that alone change, see `trained_rows`; None for all parameters.
    """
    rule = optimizer.make_optimizer(experiment.optimizer, steps, per_epoch)
    if rows is None:
        return rule
    mask = functools.partial(experiment.model.prompt_mask, rows=rows)
    return optimizer.only(rule, mask)


def make_step(
    experiment: Experiment,
    sources: Sources,
    rule: optax.GradientTransformation,
    layout: Layout,
    shares: tuple[int, int],
) -> Callable:
    """Returns ``step(state, batch) -> (state, parts)`` of a stage, for its devices.

    Args:
      experiment: as it is during the stage, with its network, see `with_bank_model`.
      sources: of its pairs.
      rule: of `make_optimizer`.
      layout: its devices.
      shares: replicas, see `parallel.check_batch`.
    """
    train, (replicas, span) = experiment.train, shares
    train_step = step_lib.make_train_step(
        experiment.model.build(),
        loss_of(experiment),
        rule,
        make_prepare(experiment, sources, layout),
        step_lib.StepConfig(train.accumulate, replicas, train.ema, layout.axis, span),
    )
    return parallel.compile_step(train_step, layout)


def lowered_step(
    experiment: Experiment,
    sources: Sources,
    rule: optax.GradientTransformation,
    layout: Layout,
    shares: tuple[int, int],
) -> tuple[jax.stages.Lowered, state.TrainState]:
    """Returns the step that training compiles, traced on shapes, and its state's.

    Args:
      experiment: as it is during the stage, with the network for its tasks.
      sources: of its pairs.
      rule: of `make_optimizer`.
      layout: the devices.
      shares: see `parallel.check_batch`.
    """
    train = experiment.train
    start = jax.eval_shape(
        lambda v: state.start(v, rule, jax.random.key(0), ema=train.ema > 0),
        _abstract(experiment),
    )
    loading = loading_of(experiment, validation=False)
    arrays = loading_lib.batch_kinds(sources.train, loading)
    batch = {
        name: jax.ShapeDtypeStruct((train.batch, *shape), kind)
        for name, (shape, kind) in arrays.items()
    }
    step = make_step(experiment, sources, rule, layout, shares)
    return step.lower(*parallel.placed_shapes(start, batch, layout)), start


def _abstract(experiment: Experiment) -> Any:
    """Returns the shapes of fresh variables, with those of released SAM if needed."""
    key, model = jax.random.key(0), experiment.model.build()
    init = functools.partial(model.init, shape=experiment.loading.shape)
    variables = dict(jax.eval_shape(init, key))
    if experiment.model.needs_sam:
        released = functools.partial(sam_lib.init, sam_lib.SamConfig())
        variables[sam_lib.SAM] = jax.eval_shape(released, key)
    return variables


def model_flops(
    experiment: Experiment, sources: Sources, rule: optax.GradientTransformation
) -> float | None:
    """Returns the floating-point operations that a step of a stage is defined to need.

    Those of one pair for each of the batch, see `utilisation.counted_flops`.

    Args:
      experiment: as it is during the stage, with the network for its tasks.
      sources: of its pairs.
      rule: of `make_optimizer`.
    """
    one = dataclasses.replace(experiment.train, batch=1, accumulate=1, replicas=0)
    model = utilisation.plain(experiment.model)
    alone = dataclasses.replace(experiment, train=one, model=model)

    def lower():
        return lowered_step(alone, sources, rule, Layout("single"), (0, 1))[0]

    found = utilisation.counted_flops(lower)
    return None if found is None else found * experiment.train.batch


def metric_of(experiment: Experiment, sources: Sources) -> str | None:
    """Returns the score by which a checkpoint is best; None if the last one is."""
    wanted, source = experiment.loop.metric, sources.validation
    if wanted == "last":
        return None
    if source is None:
        if wanted != "auto":
            raise UserError(
                f"loop.metric is {wanted}, but no pair validates; give validation "
                "images or `loop.metric` auto, which then takes the last checkpoint"
            )
        return None
    having = _labelled_datasets(sources)
    labelled = any(having.values())
    if wanted == "dice" and not labelled:
        raise UserError(
            "loop.metric is dice, but no validation pair has label maps of both "
            "images; add the column label or give `loop.metric` loss"
        )
    chosen = ("dice" if labelled else "loss") if wanted == "auto" else wanted
    if chosen == "dice" and not all(having.values()):
        without = ", ".join(name for name, has in having.items() if not has)
        warnings.warn(
            "the best weights are those of the best mean Dice over datasets, in which "
            f"{without} has no say: no validation pair there has label maps of both "
            "images; add them, or give `loop.metric` loss",
            stacklevel=2,
        )
    return chosen


def _labelled_datasets(sources: Sources) -> dict[str, bool]:
    """Returns whether a dataset that validates has a pair with both label maps."""
    source, names = sources.validation, dataset_names(sources)
    if not isinstance(source, pair_source.PairSource):
        return dict.fromkeys(names, True)
    found: dict[str, bool] = {}
    for plan in map(source.plan, range(sources.validation_count)):
        both = (source.records[view.record].label for view in (plan.moving, plan.fixed))
        name = names[plan.task]
        found[name] = all(both) or found.get(name, False)
    return found


class PairStage:
    """A stage that trains on pairs: its data, network, devices and optimiser."""

    def __init__(
        self,
        experiment: Experiment,
        stage: Stage,
        out: pathlib.Path,
        before: Sequence[str],
        known: Sequence[str],
        sam: TrainedSam | None,
        read: Read,
    ):
        """Builds data, network and optimiser of a stage; nothing runs yet."""
        self.stage, self.before, self.sam, self.read = stage, before, sam, read
        self.out = out / stage.name
        self.number = experiment.stages.index(stage)
        experiment.model.check_grid(experiment.loading.shape)
        found = make_sources(experiment, number=self.number)
        self.sources = with_bank(found, before, experiment.model)
        experiment = with_bank_model(experiment, self.sources)
        if sam is not None:
            model = experiment.model.with_sam_window(sam.ct_window)
            experiment = dataclasses.replace(experiment, model=model)
        self.experiment, self.model = experiment, experiment.model.build()
        self.per_epoch, self.layout, self.shares = batch_layout(experiment)
        self.steps = self.per_epoch * stage.epochs
        rows = None
        if experiment.train.only != "all":
            rows = trained_rows(experiment, self.sources, known, first=self.number == 0)
        self.optimizer = make_optimizer(experiment, self.steps, self.per_epoch, rows)
        self.metric = metric_of(experiment, self.sources)

    def plan(self) -> StagePlan:
        """Returns what `training.stage.run` works on."""
        experiment, train = self.experiment, self.experiment.train
        common = experiment, self.sources, self.model, self.layout
        job = loop.Job(
            step=make_step(
                experiment, self.sources, self.optimizer, self.layout, self.shares
            ),
            layout=self.layout,
            batch_size=train.batch,
            steps=self.steps,
            steps_per_epoch=self.per_epoch,
            learning_rate=optimizer.make_schedule(
                experiment.optimizer, self.steps, self.per_epoch
            ),
            validate=make_validation(*common),
            find_bad_pairs=make_find_bad_pairs(*common),
            record={"stage": self.stage.name},
            metric=self.metric,
            flops=lambda: model_flops(experiment, self.sources, self.optimizer),
        )
        return StagePlan(
            title=f"stage {self.stage.name}: {self.stage.epochs} epochs",
            folder=self.out,
            source=self.sources.train,
            loading=loading_of(experiment, validation=False),
            job=job,
            optimizer=self.optimizer,
            key=_steps_key(train.seed, self.number),
            ema=train.ema > 0,
            config=experiment.loop,
            fresh=lambda: warm_start.fresh_variables(experiment, self.model, self.sam),
            initial=self._initial,
        )

    def _initial(self, before: Variables | None) -> tuple[Variables, list[str]]:
        """Returns the variables to start with, and sentences about them."""
        sentences: list[str] = []
        variables = warm_start.initial_variables(
            self.experiment,
            self.model,
            before,
            sentences.append,
            self.sources.bank,
            self.before,
            self.sam,
            self.read,
        )
        return variables, sentences
