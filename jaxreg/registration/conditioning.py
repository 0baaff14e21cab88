"""Conditioning of a network on a pair's task, region and weight of smoothness.

A bank of prompts (PromptReg) has domains, of which some may be chosen. A network with
heads for tasks (UniReg) is told the region, and whether the scans are of one subject;
one that was trained so can be asked for a smoothness.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax.numpy as jnp

from jaxreg.errors import UserError
from jaxreg.nn.heads import Pairing, RegionPairings
from jaxreg.registration.optimization import network
from jaxreg.typing import Pair
from jaxreg.weights import zoo

_PAIRINGS: tuple[Pairing, ...] = get_args(Pairing)


@dataclasses.dataclass(frozen=True)
class TaskValues:
    """What the pairs of one task carry.

    Attributes:
      number: of the task among all that the network can be told, see `table`; None for
        networks that are told none.
      smoothness: what is asked for, None where nothing can be.
      text: both in words; empty where a network is told nothing.
    """

    number: int | None = None
    smoothness: float | None = None
    text: str = ""

    def of(self, pair: Pair) -> Pair:
        """Returns the pairs with what the network is to know of them."""
        n = len(pair.fixed)
        task = None if self.number is None else jnp.full(n, self.number, jnp.int32)
        requested = None if self.smoothness is None else jnp.full(n, self.smoothness)
        return dataclasses.replace(pair, task=task, smoothness=requested)


UNCONDITIONED = TaskValues()


@dataclasses.dataclass(frozen=True)
class Conditioning(TaskValues):
    """The same with the network.

    Attributes:
      model: with the chosen prompts alone, or for all tasks that it can be told, and
        with the task's own intensities.
      region: its name, None for networks that are told none.
      pairing: two subjects or one; None as well.
      trained: whether training had this region with this pairing.
    """

    model: zoo.LoadedModel = dataclasses.field(kw_only=True)
    region: str | None = None
    pairing: Pairing | None = None
    trained: bool = True

    @property
    def key(self) -> str:
        """What a smoothness that was found best is stored under."""
        return f"{self.region}, {self.pairing}"


@dataclasses.dataclass(frozen=True)
class _TrainedTask:
    """A task of the training, see `run.bundle_of`."""

    name: str
    region: int
    pairing: Pairing
    rule: Mapping[str, Any]


def table(regions: int) -> RegionPairings:
    """Returns every region between and within subjects, in one order.

    The same for all tasks, so that weights are one program whatever they are told.
    """
    return tuple((r, p) for r in range(regions) for p in _PAIRINGS)


def condition(
    model: zoo.LoadedModel,
    task: str = "auto",
    pairing: Pairing | None = None,
    smoothness: float | None = None,
    *,
    source: str = "`task`",
) -> Conditioning:
    """Returns the network as it serves one task.

    Args:
      model: any network.
      task: "auto"; or domains of a bank, separated by commas; or a region or task of a
        network with heads.
      pairing: two subjects or one; that of the named task if None.
      smoothness: weight of the smoothness term; if None the one that was found best for
        the task, or its own in training, or the middle of the range.
      source: where the task stands, for the errors.

    Raises:
      UserError: the network does not know the task, is not told of any, or cannot be
        asked for a smoothness.
    """
    if smoothness is not None:
        _check_smoothness(model, smoothness)
    conditioned_on = model.model.config.conditioning
    if conditioned_on == "regions":
        return _of_region(model, _found(model, task, pairing, source), smoothness)
    if pairing is not None:
        raise UserError(
            f"`pairing` is {pairing}, but {model.name} is not told of it; leave it out"
        )
    if task == "auto":
        whole = model if conditioned_on is None else _with_rule(model, _rules(model))
        return Conditioning(model=whole)
    if conditioned_on is None:
        raise UserError(
            f"`task` is {task}, but {model.name} has neither a prompt bank nor heads "
            "for tasks; leave it out"
        )
    return Conditioning(model=_with_domains(model, task))


def task_name_of(model: zoo.LoadedModel, task: str | None, region: str | None) -> str:
    """Returns which word of a pair's tells a network with heads most.

    The region, where the network knows it; the task, where it was trained on it and
    there is no other region. "auto" where the pair has neither.

    Args:
      model: with heads for tasks.
      task: the pair's, as a list or its dataset calls it.
      region: the same.
    """
    regions = _regions(model)
    known = {regions[t.region] for t in _trained(model) if t.name == task}
    if known and (region not in regions or region in known):
        return task or "auto"
    return region if region in regions else task or region or "auto"


def needs_region(model: zoo.LoadedModel | None) -> bool:
    """Whether each pair's task must be told to a network."""
    return model is not None and model.model.config.conditioning == "regions"


def compared_window(model: zoo.LoadedModel | None) -> tuple[float, float] | None:
    """Returns the Hounsfield units that a similarity of two CT scans compares.

    Those that the weights state, for the task that the network is told; else, as for
    weights that were stored without, those that the network is shown. None for all
    that is loaded.

    Args:
      model: of `condition`, or None.
    """
    if model is None:
        return None
    stated = model.bundle.preprocessing.get("similarity_window")
    if stated is None:
        return model.model.config.network_window
    return float(stated[0]), float(stated[1])


def check_unconditioned(
    task: str, pairing: Pairing | None, smoothness: float | None
) -> None:
    """Checks that nothing is told where there is no network.

    Raises:
      UserError: something is.
    """
    given = {
        "`task`": task if task != "auto" else None,
        "`pairing`": pairing,
        "`smoothness`": smoothness,
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{name} is {value}, but no network takes part; leave it out"
            )


def domains(model: zoo.LoadedModel, pair: Pair) -> dict[str, float]:
    """Returns the share of each domain of a bank in a pair's prompt, by name."""
    if model.model.config.conditioning != "prompts":
        return {}
    found = network.auxiliaries(model.model, model.variables, pair)
    shares = found["task_weights"][0].tolist()
    return dict(zip(_domain_names(model), shares, strict=True))


def _with_domains(model: zoo.LoadedModel, task: str) -> zoo.LoadedModel:
    """Returns the network with some of its bank's prompts alone."""
    known, names = _domain_names(model), [name.strip() for name in task.split(",")]
    for name in names:
        if name not in known:
            raise UserError(
                f"`task` names {name}, which is not among the domains of {model.name} "
                f"({', '.join(known)}); give some of these, or auto"
            )
    if len(set(names)) < len(names):
        raise UserError(
            f"`task` is {task}, which names a domain twice; name each of them once"
        )
    rows = [known.index(name) for name in names]
    rules = _rules(model)
    kept = [rules[row] for row in rows] if len(rules) == len(known) else []
    ruled = _with_rule(model, kept)
    preprocessing = {**ruled.bundle.preprocessing, "tasks": names, "task_rules": kept}
    return dataclasses.replace(
        model,
        variables=model.model.config.with_prompts(model.variables, rows),
        bundle=dataclasses.replace(model.bundle, preprocessing=preprocessing),
    )


def _domain_names(model: zoo.LoadedModel) -> list[str]:
    """Returns the names of a bank's prompts; numbers where the weights have none."""
    count = model.model.config.names_in(model.variables)
    names = model.task_names
    return list(names) if len(names) == count else [f"task {i}" for i in range(count)]


def _config(model: zoo.LoadedModel) -> Any:
    """Returns the configuration of a network with heads for regions."""
    return model.model.config


def _regions(model: zoo.LoadedModel) -> list[str]:
    """Returns the regions' names; numbers where the weights have none."""
    count = _config(model).regions
    names = list(model.bundle.preprocessing.get("regions", ()))
    return names if len(names) == count else [f"region {i}" for i in range(count)]


def _trained(model: zoo.LoadedModel) -> list[_TrainedTask]:
    """Returns the tasks of the training that have names."""
    known = zip(model.task_names, _config(model).tasks, _rules(model), strict=False)
    return [
        _TrainedTask(name, place, pairing, rule)
        for name, (place, pairing), rule in known
    ]


def _rules(model: zoo.LoadedModel) -> list[Mapping[str, Any]]:
    """Returns window, quantiles and smoothness of each task; {} where not stated."""
    found = list(model.bundle.preprocessing.get("task_rules", ()))
    return (
        found if len(found) == len(model.task_names) else [{} for _ in model.task_names]
    )


def _found(
    model: zoo.LoadedModel, task: str, pairing: Pairing | None, source: str
) -> _TrainedTask:
    """Returns the task that is meant, with its rule where training had it.

    Raises:
      UserError: there is none of the name, or several.
    """
    regions, trained = _regions(model), _trained(model)
    names = list(dict.fromkeys(t.name for t in trained))
    if task == "auto" and len(names) == 1:
        task = names[0]
    named = [t for t in trained if t.name == task]
    meant: set[tuple[int, Pairing]]
    if named:
        meant = {(t.region, t.pairing) for t in named}
        places = {t.region for t in named}
    elif task in regions:
        places = {regions.index(task)}
        meant = {(r, p) for r, p in _config(model).tasks if r in places}
    else:
        known = ", ".join(dict.fromkeys((*names, *regions)))
        raise UserError(
            f"{source} is {task}, but {model.name} makes its heads for one of {known}; "
            "name that, or for another part of the body the nearest one"
        )
    if pairing is not None:
        meant = {(r, p) for r, p in meant if p == pairing} or {
            (r, pairing) for r in places
        }
    if len({p for _, p in meant}) != 1:
        raise UserError(
            f"{model.name} knows {task} within and between subjects; give `pairing` "
            "intra or inter, or in a list the column pairing"
        )
    if len(meant) > 1:
        several = " or ".join(regions[r] for r, _ in sorted(meant))
        raise UserError(
            f"{source} is {task}, which {model.name} knows in several regions; name "
            f"{several} instead"
        )
    region, own = next(iter(meant))
    same = [t for t in trained if (t.region, t.pairing) == (region, own)]
    same.sort(key=lambda t: t.name != task)  # of several, the one that was named
    return same[0] if same else _TrainedTask(task, region, own, {})


def _of_region(
    model: zoo.LoadedModel, task: _TrainedTask, smoothness: float | None
) -> Conditioning:
    """Returns the network told of one task."""
    config = _config(model)
    every = table(config.regions)
    found = Conditioning(
        model=_with_table(_with_rule(model, [task.rule]), every, task),
        number=every.index((task.region, task.pairing)),
        region=_regions(model)[task.region],
        pairing=task.pairing,
        trained=(task.region, task.pairing) in config.tasks,
    )
    requested = config.smoothness_condition
    if requested is None:
        return dataclasses.replace(found, text=found.key)
    best = model.bundle.preprocessing.get("smoothness", {}).get(found.key)
    prior = best or task.rule.get("smoothness") or requested.middle
    weight = min(max(float(smoothness or prior), requested.low), requested.high)
    text = f"{found.key}, smoothness {weight:.3g}"
    return dataclasses.replace(found, smoothness=weight, text=text)


def _with_table(
    model: zoo.LoadedModel, tasks: RegionPairings, task: _TrainedTask
) -> zoo.LoadedModel:
    config = _config(model)
    window = config.task_window((task.region, task.pairing))
    own = tuple(task.rule.get("network_window") or ()) or window
    return model.with_config(config.with_region_pairings(tasks, own))


def _with_rule(
    model: zoo.LoadedModel, rules: Sequence[Mapping[str, Any]]
) -> zoo.LoadedModel:
    """Returns the weights with the intensities of some tasks, where these agree."""
    preprocessing = dict(model.bundle.preprocessing)
    for stored, name in (
        ("ct_window", "ct_window"),
        ("mri_quantiles", "quantile_range"),
        ("similarity_window", "similarity_window"),
    ):
        source = {tuple(rule.get(name) or ()) for rule in rules}
        if len(source) == 1 and (own := source.pop()):
            preprocessing[stored] = list(own)
    bundle = dataclasses.replace(model.bundle, preprocessing=preprocessing)
    return dataclasses.replace(model, bundle=bundle)


def _check_smoothness(model: zoo.LoadedModel, given: float) -> None:
    requested = model.model.config.smoothness_condition
    if requested is None:
        raise UserError(
            f"`smoothness` is {given:g}, but {model.name} was not trained to be "
            "asked for one; leave it out"
        )
    if not requested.low <= given <= requested.high:
        raise UserError(
            f"`smoothness` is {given:g}, but {model.name} was trained for "
            f"{requested.low:g} to {requested.high:g}; give a number between"
        )
