"""One stage of a training run."""

import dataclasses
import functools
import pathlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from jaxreg.data import batches as batches_lib
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
    with_tasks,
)
from jaxreg.experiments.validation import make_find_bad_pairs, make_validation
from jaxreg.experiments.warm_start import Report
from jaxreg.models import registry
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.sam import TrainedSam
from jaxreg.training import checkpoints, loop, optimizer, parallel, state, step
from jaxreg.training.logging import RunLog
from jaxreg.training.parallel import Layout
from jaxreg.typing import Key, Variables


def _steps_key(seed: int, number: int) -> Key:
    """Returns the root key of a stage's steps; independent of the weights' key."""
    return jax.random.fold_in(jax.random.split(jax.random.key(seed))[1], number)


def trained_rows(
    experiment: Experiment, sources: Sources, known: Sequence[str], *, first: bool
) -> tuple[int, ...]:
    """Returns the prompts that change where `train.only` restricts training.

    Args:
      experiment: as it is during the stage.
      sources: with their bank.
      known: tasks of the bank that training starts from.
      first: whether no stage came before.

    Raises:
      UserError: the network has no bank, nothing to start from, or no prompt to change.
    """
    only, start = experiment.train.only, experiment.train.start
    if not isinstance(experiment.model, PromptRegConfig):
        raise UserError(
            f"train.only is {only}, but the network has no prompt bank; give "
            "--train.only all, or a PromptReg model"
        )
    if first and start is None:
        raise UserError(
            f"train.only is {only}, but there are no weights to start from and the "
            "rest would stay untrained; give --train.start"
        )
    if only == "prompts":
        return tuple(sorted(set(sources.rows)))
    rows = tuple(i for i, name in enumerate(sources.bank) if name not in known)
    if not rows:
        raise UserError(
            "train.only is new_prompts, but the weights to start from know all tasks "
            f"already ({', '.join(sources.tasks)}); add a dataset, or give "
            "--train.only prompts"
        )
    return rows


def shared_out(experiment: Experiment) -> tuple[int, Layout, tuple[int, int]]:
    """Returns steps per epoch, the devices, and what `parallel.check_batch` does."""
    train, pairs_per_epoch = experiment.train, experiment.data.pairs_per_epoch
    if pairs_per_epoch < train.batch:
        raise UserError(
            f"data.pairs_per_epoch is {pairs_per_epoch}, less than train.batch "
            f"{train.batch}; raise it"
        )
    layout = parallel.make_layout(train.parallel, space=train.space)
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
    return optimizer.only(rule, functools.partial(registry.prompt_mask, rows=rows))


def make_step(
    experiment: Experiment,
    sources: Sources,
    rule: optax.GradientTransformation,
    layout: Layout,
    shares: tuple[int, int],
) -> Callable:
    """Returns ``step(state, batch) -> (state, parts)`` of a stage, for its devices.

    Args:
      experiment: as it is during the stage, with its network, see `with_tasks`.
      sources: of its pairs.
      rule: of `make_optimizer`.
      layout: its devices.
      shares: replicas, see `parallel.check_batch`.
    """
    train, (replicas, span) = experiment.train, shares
    train_step = step.make_train_step(
        registry.build(experiment.model),
        loss_of(experiment),
        rule,
        make_prepare(experiment, sources, layout),
        step.StepConfig(train.accumulate, replicas, train.ema, layout.axis, span),
    )
    return parallel.compile_step(train_step, layout)


def metric_of(experiment: Experiment, sources: Sources) -> str | None:
    """Returns the score by which a checkpoint is best; None if the last one is."""
    wanted, source = experiment.loop.metric, sources.validation
    if wanted == "last":
        return None
    if source is None:
        if wanted != "auto":
            raise UserError(
                f"loop.metric is {wanted}, but no pair validates; give validation "
                "images or --loop.metric auto, which then takes the last checkpoint"
            )
        return None
    having = _labelled_datasets(sources)
    labelled = any(having.values())
    if wanted == "dice" and not labelled:
        raise UserError(
            "loop.metric is dice, but no validation pair has label maps of both "
            "images; add the column label or give --loop.metric loss"
        )
    chosen = ("dice" if labelled else "loss") if wanted == "auto" else wanted
    if chosen == "dice" and not all(having.values()):
        without = ", ".join(name for name, has in having.items() if not has)
        warnings.warn(
            "the best weights are those of the best mean Dice over datasets, in which "
            f"{without} has no say: no validation pair there has label maps of both "
            "images; add them, or give --loop.metric loss",
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


class StageRun:
    """One stage: builds what the loop needs, runs it, and reads the best state back."""

    def __init__(
        self,
        experiment: Experiment,
        stage: Stage,
        out: pathlib.Path,
        report: Report,
        before: Sequence[str],
        known: Sequence[str],
        sam: TrainedSam | None,
    ):
        """Builds data, network and step of a stage; nothing runs yet."""
        self.stage, self.report, self.before, self.sam = stage, report, before, sam
        self.out = out / stage.name
        self.number = experiment.stages.index(stage)
        registry.check_grid(experiment.model, experiment.loading.shape)
        found = make_sources(experiment, number=self.number)
        self.sources = with_bank(found, before, experiment.model)
        experiment = with_tasks(experiment, self.sources)
        if sam is not None:
            model = registry.with_sam_window(experiment.model, sam.ct_window)
            experiment = dataclasses.replace(experiment, model=model)
        self.experiment, self.model = experiment, registry.build(experiment.model)
        self.per_epoch, self.layout, shares = shared_out(experiment)
        self.shares = shares
        self.steps = self.per_epoch * stage.epochs
        self.learning_rate = optimizer.make_schedule(
            experiment.optimizer, self.steps, self.per_epoch
        )
        rows = None
        if experiment.train.only != "all":
            rows = trained_rows(experiment, self.sources, known, first=self.number == 0)
        self.optimizer = make_optimizer(experiment, self.steps, self.per_epoch, rows)
        self.metric = metric_of(experiment, self.sources)

    def run(
        self, before: Variables | None, *, resume: bool
    ) -> tuple[Variables, Mapping[str, float], int]:
        """Returns the best variables, the last validation's scores, and the steps.

        Args:
          before: variables of the stage before, None for the first.
          resume: go on from the last checkpoint, if there is one.
        """
        keep = self.experiment.loop
        with checkpoints.RunCheckpoints(
            self.out / "checkpoints",
            keep_latest=keep.keep_latest,
            keep_best=keep.keep_best,
            metric=self.metric,
            larger_is_better=self.metric == "dice",
        ) as kept:
            start, record = self._start(kept, before, resume=resume)
            scores = record.get("scores", {})
            # A run may have been stopped in its last validation.
            unscored = self.sources.validation is not None and not scores
            if int(start.step) < self.steps or unscored:
                scores = self._train(start, kept, record)
            found = kept.restore(state.to_tree(start), best=True)
        for sentence in found.skipped:
            self.report(sentence)
        if found.skipped:
            self.report(f"the weights are those of step {found.step} of {self.steps}")
        held = state.frozen(start.variables)
        best = state.from_tree(found.state, held)
        return state.averaged(best), scores, self.steps

    def _start(
        self,
        kept: checkpoints.RunCheckpoints,
        before: Variables | None,
        *,
        resume: bool,
    ) -> tuple[state.TrainState, Mapping[str, Any]]:
        """Returns the state to go on from, and the record of its checkpoint."""
        seed, shape = self.experiment.train.seed, self.experiment.loading.shape
        going_on = resume and kept.latest_step() is not None
        # What a run started from need not be there any more when it goes on.
        variables = (
            warm_start.with_sam(
                jax.tree.map(
                    np.asarray, self.model.init(warm_start.weights_key(seed), shape)
                ),
                self.sam,
            )
            if going_on
            else warm_start.initial_variables(
                self.experiment,
                self.model,
                before,
                self.report,
                self.sources.bank,
                self.before,
                self.sam,
            )
        )
        fresh = state.start(
            variables,
            self.optimizer,
            _steps_key(seed, self.number),
            ema=self.experiment.train.ema > 0,
        )
        if not going_on:
            return fresh, {}
        restored = kept.restore(state.to_tree(fresh))
        for sentence in restored.skipped:
            self.report(sentence)
        self.report(f"resumed at step {restored.step} of {self.steps}")
        held = state.frozen(variables)
        return state.from_tree(restored.state, held), restored.record

    def _train(
        self,
        start: state.TrainState,
        kept: checkpoints.RunCheckpoints,
        resumed: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """Trains to the end of the stage; returns the last validation's scores."""
        experiment, layout = self.experiment, self.layout
        train, first = experiment.train, int(start.step)
        last: dict[str, float] = {}
        validate = make_validation(experiment, self.sources, self.model, layout)

        def remembered(variables):
            assert validate is not None
            found = validate(variables)
            last.clear()
            last.update(found.scores)
            return found

        with (
            batches_lib.Batches(
                self.sources.train,
                loading_of(experiment, validation=False),
                batch_size=train.batch,
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                start=first,
                stop=self.steps,
            ) as batches,
            RunLog(self.out, start_step=first, enabled=jax.process_index() == 0) as log,
        ):
            job = loop.Job(
                step=make_step(
                    experiment, self.sources, self.optimizer, layout, self.shares
                ),
                layout=layout,
                batches=batches,
                batch_size=train.batch,
                steps=self.steps,
                steps_per_epoch=self.per_epoch,
                learning_rate=self.learning_rate,
                validate=None if validate is None else remembered,
                find_bad_pairs=make_find_bad_pairs(
                    experiment, self.sources, self.model, layout
                ),
                checkpoints=kept,
                log=log,
                record={"stage": self.stage.name},
                metric=self.metric,
                resumed=resumed,
            )
            loop.run(parallel.place_state(start, layout), job, experiment.loop)
        return last
