"""Datasets of an experiment: manifests or synthetic anatomies to pairs.

A *task* is a recipe's entry for one dataset, `pairs.Task`; its number, in the order of
the recipe, is `Pair.task` of its pairs. The *bank* holds the names that a network's
prompts or regions have, those of the weights it starts from first; a task's *row* is
the place of its name there. `Pair.objective` is the number of the task's objective.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import augment, modality, network_grid, pair_source, pairs, synthetic
from jaxreg.data import loading as loading_lib
from jaxreg.data import sampler as sampler_lib
from jaxreg.data.manifest import read
from jaxreg.data.manifest.records import Manifest, Pairing, Record
from jaxreg.errors import UserError
from jaxreg.experiments import held_out as held_out_lib
from jaxreg.experiments.config import Experiment
from jaxreg.experiments.held_out import FixedPlans
from jaxreg.losses.objective import Objective, TaskObjective
from jaxreg.models.base import NetworkConfig
from jaxreg.nn.heads import SmoothnessRange
from jaxreg.training import parallel, step
from jaxreg.training.parallel import Layout
from jaxreg.typing import Key, Pair

Source = pair_source.PairSource | pair_source.ReadyPairs
T = TypeVar("T")
_VALIDATION_SEED = 1
_SMOOTHNESS = 0x5300  # what a stream of random numbers is for


@dataclasses.dataclass(frozen=True)
class TaskRule:
    """Settings of a task that travel with the weights, besides its name.

    Attributes:
      ct_window: the task's own, None for that of all.
      quantile_range: the same.
      smoothness: the weight that the task was trained or validated with, None for its
        objective's.
      network_window: Hounsfield units that a network which reads them was shown; None
        for networks that read none.
      similarity_window: those that the similarity compared; None for all that was
        loaded.
    """

    ct_window: tuple[float, float] | None = None
    quantile_range: tuple[float, float] | None = None
    smoothness: float | None = None
    network_window: tuple[float, float] | None = None
    similarity_window: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class Sources:
    """The pairs of an experiment.

    Attributes:
      train: endless.
      validation: a few, or None.
      validation_count: how many.
      objectives: which objective scores each task, as an index into `objectives_of`.
      classes: label values of the Dice term.
      tasks: names of the tasks' datasets, as `Pair.task` counts them.
      regions: of each task.
      pairings: of each task.
      rules: of each task.
      bank: names of the network's prompts or regions, see `with_bank`.
      rows: of each task, its place in the bank.
      orientation: of the scans as the network sees them, see
        `network_grid.ResamplingRule`; None if not known.
    """

    train: Source
    validation: Source | None
    validation_count: int
    objectives: tuple[int, ...]
    classes: tuple[int, ...]
    tasks: tuple[str, ...] = ()
    regions: tuple[str, ...] = ()
    pairings: tuple[Pairing, ...] = ()
    rules: tuple[TaskRule, ...] = ()
    bank: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()
    orientation: str | None = None


@dataclasses.dataclass(frozen=True)
class TaskSettings:
    """What of the sources becomes part of a program: no pair, and no file's name.

    Attributes: see `Sources`.
    """

    objectives: tuple[int, ...]
    classes: tuple[int, ...]
    rules: tuple[TaskRule, ...]
    rows: tuple[int, ...]


def task_settings(sources: Sources) -> TaskSettings:
    """Returns the sources' settings; those of other pairs make the same program."""
    return TaskSettings(
        sources.objectives, sources.classes, sources.rules, sources.rows
    )


def objectives_of(experiment: Experiment) -> tuple[Objective, ...]:
    """Returns the default objective and the named ones, in order."""
    return (experiment.objective, *(o for _, o in experiment.objectives))


def loss_of(experiment: Experiment) -> Objective | TaskObjective:
    """Returns what is minimised: one objective, or each task's own."""
    if experiment.objectives:
        return TaskObjective(objectives_of(experiment))
    return experiment.objective


def read_manifests(experiment: Experiment) -> Manifest:
    """Returns all manifests of an experiment as one, with a validation split.

    Raises:
      UserError: one cannot be read, or two hold a dataset of the same name.
    """
    found: list[Manifest] = []
    for path in experiment.data.manifests:
        found.append(read.read_manifest(path, holdout=experiment.data.holdout))
    records: list[Record] = []
    labels: dict[str, Mapping[int, str]] = {}
    for one in found:
        names = {record.dataset for record in one.records}
        twice = sorted(names & {record.dataset for record in records})
        if twice:
            raise UserError(
                f"{one.source} has a dataset {twice[0]}, and so has another manifest; "
                "give one of them another name in its dataset column"
            )
        records.extend(one.records)
        labels |= one.labels
    source = ", ".join(one.source for one in found)
    return Manifest(records=tuple(records), source=source, labels=labels)


def make_sources(experiment: Experiment, *, number: int = 0) -> Sources:
    """Returns the pairs to train and to validate on.

    Args:
      experiment: as it is during the stage.
      number: of the stage, from 0; each draws training pairs of its own.

    Raises:
      UserError: there are no data, or they do not fit the tasks and objectives.
    """
    if experiment.data.synthetic:
        return _synthetic_sources(experiment, number)
    if not experiment.data.manifests:
        raise UserError(
            "the experiment names no data; give `data.manifests` PATH (a manifest or a "
            "folder of scans) or `data.synthetic` inter_mono"
        )
    data = experiment.data
    whole = read_manifests(experiment)
    tasks = _without_excluded(
        data.tasks
        or tuple(
            pairs.Task(name) for name in sorted({r.dataset for r in whole.records})
        ),
        data.exclude,
        lambda task: task.dataset,
    )
    names = ["default", *(name for name, _ in experiment.objectives)]
    train = whole.of_split("train")
    sampler = sampler_lib.sampler(
        train,
        tasks,
        pairs_per_epoch=data.pairs_per_epoch,
        schedule=data.schedule,
        seed=_pairs_seed(experiment.train.seed, number),
    )
    _check_modalities(experiment, whole.records, tasks)
    plans, held_out = held_out_lib.validation_plans(whole, tasks, experiment)
    classes = data.classes or tuple(
        sorted({value for named in whole.labels.values() for value in named} - {0})
    )
    _check_annotations(experiment, train, tasks, classes)
    validation = FixedPlans(tasks, plans)
    return Sources(
        train=pair_source.PairSource(train, sampler, whole.labels),
        validation=(
            pair_source.PairSource(held_out, validation, whole.labels)
            if plans
            else None
        ),
        validation_count=len(plans),
        objectives=tuple(names.index(task.objective) for task in tasks),
        classes=classes,
        tasks=tuple(task.dataset for task in tasks),
        regions=tuple(_region(train, task) for task in tasks),
        pairings=tuple(pairs.pairing_of(train, task) for task in tasks),
        rules=tuple(rule_of(experiment, task) for task in tasks),
    )


def rule_of(experiment: Experiment, task: pairs.Task) -> TaskRule:
    """Returns the settings of a task; the similarity compares what the network sees."""
    shown = task.network_window or experiment.model.network_window
    return TaskRule(
        task.ct_window,
        task.quantile_range,
        task.smoothness,
        network_window=shown,
        similarity_window=task.similarity_window or shown,
    )


def _region(records: Sequence[Record], task: pairs.Task) -> str:
    """Returns the region of a task, by which networks may be conditioned."""
    stated = {r.region for r in records if r.dataset == task.dataset and r.region}
    return task.region or (stated.pop() if len(stated) == 1 else task.dataset)


def _without_excluded(
    items: Sequence[T], exclude: Sequence[str], name: Callable[[T], str]
):
    """Returns the items without the excluded ones.

    Raises:
      UserError: an excluded name is not there, or nothing is left.
    """
    names = [name(item) for item in items]
    unknown = [word for word in exclude if word not in names]
    left = tuple(item for item in items if name(item) not in exclude)
    if unknown or not left:
        what = f"{unknown[0]} is not among" if unknown else "leaves nothing of"
        raise UserError(
            f"data.exclude {what} the datasets {', '.join(dict.fromkeys(names))}; "
            "name one or more of them, not all"
        )
    return left


def _pairs_seed(seed: int, number: int) -> int:
    """Returns the seed of a stage's training pairs.

    A sum would give the second stage of one run the pairs of another's first.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def dataset_names(sources: Sources) -> tuple[str, ...]:
    """Returns the name under which pairs of each task are scored: its dataset's."""
    return sources.tasks or ("all",) * len(sources.objectives)


def _synthetic_sources(experiment: Experiment, number: int) -> Sources:
    data = experiment.data
    configs = [
        dataclasses.replace(
            synthetic.TASKS[name],
            shape=experiment.loading.shape,
            labels=data.synthetic_labels,
            deformation_voxel=data.synthetic_deformation,
        )
        for name in _without_excluded(data.synthetic, data.exclude, str)
    ]
    train, validation = (
        synthetic.SyntheticPairs(configs, seed, data.pairs_per_epoch)
        for seed in (
            _pairs_seed(experiment.train.seed, number),
            experiment.train.seed + _VALIDATION_SEED,
        )
    )
    # Pairs go through the kinds in turn, so that each has one at least.
    count = data.validation_pairs and max(data.validation_pairs, len(configs))
    return Sources(
        train=train,
        validation=validation if count else None,
        validation_count=count,
        objectives=(0,) * len(configs),
        classes=data.classes or tuple(range(1, data.synthetic_labels + 1)),
        tasks=tuple(config.name for config in configs),
        regions=tuple(config.name for config in configs),
        pairings=tuple(config.pairing for config in configs),
        rules=tuple(rule_of(experiment, pairs.Task(config.name)) for config in configs),
    )


def _check_modalities(
    experiment: Experiment, records: Sequence[Record], tasks: Sequence[pairs.Task]
) -> None:
    windows = [rule_of(experiment, task).similarity_window for task in tasks]
    cut = {task.dataset for task, own in zip(tasks, windows, strict=True) if own}
    for task in tasks:
        if task.dataset in cut and task.invert_ct:
            raise UserError(
                f"task {task.dataset} has invert_ct and a window of Hounsfield units, "
                "in which inverted scans mean nothing; leave one of the two out"
            )
    for record in records:
        own = [task for task in tasks if task.dataset == record.dataset]
        other = modality.kind(record.modality) != "ct"
        if other and any(task.similarity_window for task in own):
            raise UserError(
                f"{record.image} of {record.dataset} has modality {record.modality}, "
                "but its task has a similarity_window of Hounsfield units; leave that "
                "out"
            )
    if experiment.model.network_window is None:
        return
    datasets = {task.dataset for task in tasks}
    for record in records:
        if record.dataset in datasets and modality.kind(record.modality) != "ct":
            raise UserError(
                f"{record.image} of {record.dataset} has modality {record.modality}, "
                "but the network takes its images for Hounsfield units; give "
                "`model.backbone_window` None, and `model.features` mind or a SAM "
                "network of that modality"
            )


def _check_annotations(
    experiment: Experiment,
    train: Sequence[Record],
    tasks: Sequence[pairs.Task],
    classes: tuple[int, ...],
) -> None:
    named = {"default": experiment.objective, **dict(experiment.objectives)}
    for task in tasks:
        objective = named[task.objective]
        members = [record for record in train if record.dataset == task.dataset]
        for needed, what, weight in (
            ("label", "a Dice term", objective.dice_weight > 0),
            ("mask", "loss masking", objective.loss_masking),
        ):
            if weight and not any(getattr(record, needed) for record in members):
                raise UserError(
                    f"dataset {task.dataset} has no {needed} in its manifest, but its "
                    f"objective has {what}; add the column {needed} or switch it off"
                )
        if objective.dice_weight > 0 and not classes:
            raise UserError(
                f"dataset {task.dataset} is to be trained with labels, but the "
                "manifest does not list them; give `data.classes` 1,2,3"
            )
    datasets = {task.dataset for task in tasks}
    if experiment.loading.mask_inputs and not any(
        record.mask for record in train if record.dataset in datasets
    ):
        raise UserError(
            "loading.mask_inputs is true, but no training image has a mask; add the "
            "column mask to a manifest or give `loading.mask_inputs` false"
        )


def loading_of(experiment: Experiment, *, validation: bool) -> loading_lib.Loading:
    """Returns how scans are read, with the annotations that are needed."""
    several = objectives_of(experiment)
    return dataclasses.replace(
        experiment.loading,
        use_labels=validation or any(o.dice_weight > 0 for o in several),
        use_masks=any(o.loss_masking for o in several),
    )


def make_prepare(
    experiment: Experiment, sources: Sources, layout: Layout
) -> Callable[[step.Batch, Any], Pair]:
    """Returns ``prepare(batch, key) -> pair``, the part of loading that devices do."""
    supervised = any(o.dice_weight > 0 for o in objectives_of(experiment))
    settings = task_settings(sources)
    classes = settings.classes if supervised else ()

    def prepare(batch, key):
        pair = augment.to_pair(batch, key, experiment.augment, classes=classes)
        pair = with_task_settings(pair, experiment, settings)
        wanted = experiment.model.smoothness_condition
        if wanted is not None and key is not None:
            drawn = _draw_smoothness(key, batch["index"], wanted)
            pair = dataclasses.replace(pair, smoothness=drawn)
        return parallel.constrain(pair, layout)

    return prepare


def _draw_smoothness(key: Key, index: jax.Array, wanted: SmoothnessRange) -> jax.Array:
    """Draws a weight for each pair of a batch, uniform in its logarithm."""
    key = jax.random.fold_in(key, _SMOOTHNESS)

    def draw(number):  # by the pair's number: not by its place on a device
        return jax.random.uniform(jax.random.fold_in(key, number))

    span = math.log(wanted.high / wanted.low)
    return wanted.low * jnp.exp(span * jax.vmap(draw)(index))


def with_task_settings(
    pair: Pair, experiment: Experiment, sources: Sources | TaskSettings
) -> Pair:
    """Returns the pair with its task's objective, smoothness, window and prompt.

    For a network conditioned on regions the task keeps its number.
    """
    if len(objectives_of(experiment)) > 1:
        objectives = jnp.asarray(sources.objectives, jnp.int32)
        pair = dataclasses.replace(pair, objective=objectives[pair.task])
    weights = _smoothness(experiment, sources)
    if weights is not None:
        of_task = jnp.asarray(weights, jnp.float32)
        pair = dataclasses.replace(pair, smoothness=of_task[pair.task])
    if any(rule.similarity_window for rule in sources.rules):
        of_task = jnp.asarray(
            [_similarity_range(experiment, r) for r in sources.rules], "f4"
        )
        pair = dataclasses.replace(pair, similarity_range=of_task[pair.task])
    if sources.rows and experiment.model.conditioning == "prompts":
        rows = jnp.asarray(sources.rows, jnp.int32)
        pair = dataclasses.replace(pair, task=rows[pair.task])
    return pair


def _similarity_range(experiment: Experiment, rule: TaskRule) -> tuple[float, float]:
    """Returns the part of a task's images, [0, 1], that the similarity compares."""
    if rule.similarity_window is None:
        return 0.0, 1.0
    loaded = rule.ct_window or experiment.loading.ct_window
    return network_grid.part_of(rule.similarity_window, loaded)


def _smoothness(
    experiment: Experiment, sources: Sources | TaskSettings
) -> list[float] | None:
    """Returns each task's weight of smoothness; None where its objective has it."""
    wanted = experiment.model.smoothness_condition
    own = [rule.smoothness for rule in sources.rules]
    if wanted is None and not any(weight is not None for weight in own):
        return None
    several = objectives_of(experiment)
    return [
        weight if weight is not None
        else wanted.middle if wanted else several[number].smoothness_weight
        for weight, number in zip(
            own or (None,) * len(sources.objectives), sources.objectives, strict=True
        )
    ]  # fmt: skip


def with_bank(sources: Sources, known: Sequence[str], model: NetworkConfig) -> Sources:
    """Returns the sources with the bank of a network.

    The known ones come first and the new ones after them: tasks of a bank of prompts,
    or regions of heads. A known one whose data are not there keeps its place; tasks of
    one dataset, or of one region, share one.
    """
    if model.names_entry is None:
        return sources
    names = getattr(sources, model.names_entry)
    bank = tuple(dict.fromkeys((*known, *names)))
    rows = tuple(bank.index(name) for name in names)
    return dataclasses.replace(sources, bank=bank, rows=rows)


def with_bank_model(experiment: Experiment, sources: Sources) -> Experiment:
    """Returns the experiment with a network for the names of the bank."""
    if experiment.model.conditioning is None:
        return experiment
    tasks = tuple(zip(sources.rows, sources.pairings, strict=False))
    model = experiment.model.with_names(sources.bank, tasks)
    shown = [rule.network_window for rule in sources.rules]
    model = model.with_network_windows(shown)
    return dataclasses.replace(experiment, model=model)
