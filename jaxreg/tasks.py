"""What a network is told of a pair besides the images, in the user's words.

A bank of prompts (PromptReg) has domains, of which some may be chosen. A network with
heads for tasks (UniReg) is told the region, and whether the scans are of one subject;
one that was trained so can be asked for a smoothness.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from jaxreg import optimize, zoo
from jaxreg.errors import UserError
from jaxreg.models import kinds
from jaxreg.models.promptreg import PromptReg, bank_of, choose_rows
from jaxreg.nn.dynamic import Pairing, SmoothnessRange
from jaxreg.typing import Pair


@dataclasses.dataclass(frozen=True)
class Words:
    """What the pairs of one task carry.

    Attributes:
      numbered: whether they need their task's number, which is 0.
      smoothness: what is asked for, None where nothing can be.
    """

    numbered: bool = False
    smoothness: float | None = None

    def of(self, pair: Pair) -> Pair:
        """Returns the pairs with what the network is to know of them."""
        n = len(pair.fixed)
        task = jnp.zeros(n, jnp.int32) if self.numbered else None
        asked = None if self.smoothness is None else jnp.full(n, self.smoothness)
        return dataclasses.replace(pair, task=task, smoothness=asked)


NOTHING = Words()


@dataclasses.dataclass(frozen=True)
class Told(Words):
    """The same with the network.

    Attributes:
      model: with the chosen prompts alone, or for the one task.
    """

    model: zoo.LoadedModel = dataclasses.field(kw_only=True)


def tell(
    model: zoo.LoadedModel,
    task: str = "auto",
    pairing: Pairing | None = None,
    smoothness: float | None = None,
) -> Told:
    """Returns the network as it serves one task.

    Args:
      model: any network.
      task: "auto"; or domains of a bank, separated by commas; or a region or task of a
        network with heads.
      pairing: two subjects or one; that of the named task if None.
      smoothness: weight of the smoothness term; if None the one that was found best for
        the task, or the middle of the range.

    Raises:
      UserError: the network does not know the task, is not told of any, or cannot be
        asked for a smoothness.
    """
    config: Any = getattr(model.model, "config", None)
    asked = kinds.smoothness_range(config)
    told = kinds.tells_tasks(config)
    if told == "regions":
        chosen, name = _of_region(model, config, task, pairing)
        weight = _smoothness(model, asked, smoothness, name)
        return Told(model=chosen, numbered=True, smoothness=weight)
    _smoothness(model, asked, smoothness, task)
    if pairing is not None:
        raise UserError(
            f"--pairing is {pairing}, but {model.name} is not told of it; leave it out"
        )
    if task == "auto":
        return Told(model=model)
    if told is None:
        raise UserError(
            f"--task is {task}, but {model.name} has neither a prompt bank nor heads "
            "for tasks; leave it out"
        )
    return Told(model=_with_domains(model, task))


def told_of_regions(model: zoo.LoadedModel | None) -> bool:
    """Whether each pair's task must be told to a network."""
    config: Any = getattr(model and model.model, "config", None)
    return kinds.tells_tasks(config) == "regions"


def refuse(task: str, pairing: Pairing | None, smoothness: float | None) -> None:
    """Checks that nothing is told where there is no network.

    Raises:
      UserError: something is.
    """
    given = {
        "--task": task if task != "auto" else None,
        "--pairing": pairing,
        "--smoothness": smoothness,
    }
    for name, value in given.items():
        if value is not None:
            raise UserError(
                f"{name} is {value}, but no network takes part; leave it out"
            )


def domains(model: zoo.LoadedModel, pair: Pair) -> dict[str, float]:
    """Returns the share of each domain of a bank in a pair's prompt, by name."""
    if not isinstance(model.model, PromptReg):
        return {}
    found = optimize.auxiliaries(model.model, model.variables, pair)
    shares = found["task_weights"][0].tolist()
    return dict(zip(_domain_names(model), shares, strict=True))


def _with_domains(model: zoo.LoadedModel, task: str) -> zoo.LoadedModel:
    """Returns the network with some of its bank's prompts alone."""
    known, names = _domain_names(model), [name.strip() for name in task.split(",")]
    for name in names:
        if name not in known:
            raise UserError(
                f"--task names {name}, which is not among the domains of {model.name} "
                f"({', '.join(known)}); give some of these, or auto"
            )
    if len(set(names)) < len(names):
        raise UserError(
            f"--task is {task}, which names a domain twice; name each of them once"
        )
    rows = [known.index(name) for name in names]
    return dataclasses.replace(
        model,
        variables=choose_rows(model.variables, rows),
        bundle=dataclasses.replace(
            model.bundle, preprocessing={**model.bundle.preprocessing, "tasks": names}
        ),
    )


def _domain_names(model: zoo.LoadedModel) -> list[str]:
    """Returns the names of a bank's prompts; numbers where the weights have none."""
    count = len(bank_of(model.variables))
    names = model.tasks
    return list(names) if len(names) == count else [f"task {i}" for i in range(count)]


def _of_region(
    model: zoo.LoadedModel, config, task: str, pairing: Pairing | None
) -> tuple[zoo.LoadedModel, str]:
    """Returns the network with one task of its own, number 0, and the task's name."""
    regions = list(model.bundle.preprocessing.get("regions", ()))
    if len(regions) != config.regions:
        regions = [f"region {i}" for i in range(config.regions)]
    trained = dict(zip(model.tasks, config.tasks, strict=False))
    if task == "auto" and len(trained) == 1:
        task = next(iter(trained))
    if task in trained:
        region, own = trained[task]
    elif task in regions:
        region = regions.index(task)
        pairings = {p for r, p in config.tasks if r == region}
        own = pairings.pop() if len(pairings) == 1 else None
    else:
        known = ", ".join(dict.fromkeys((*trained, *regions)))
        raise UserError(
            f"--task is {task}, but {model.name} makes its heads for one of {known}; "
            "name that, or for another part of the body the nearest one"
        )
    pairing = pairing or own
    if pairing is None:
        raise UserError(
            f"{model.name} knows {task} within and between subjects; give --pairing "
            "intra or inter"
        )
    fields = {**model.bundle.config, "tasks": ((region, pairing),)}
    single = dataclasses.replace(config, tasks=((region, pairing),))
    return (
        dataclasses.replace(
            model,
            model=kinds.build(single),
            bundle=dataclasses.replace(model.bundle, config=fields),
        ),
        task,
    )


def _smoothness(
    model: zoo.LoadedModel,
    asked: SmoothnessRange | None,
    given: float | None,
    task: str,
) -> float | None:
    if asked is None:
        if given is not None:
            raise UserError(
                f"--smoothness is {given:g}, but {model.name} was not trained to be "
                "asked for one; leave it out"
            )
        return None
    if given is None:
        found = model.bundle.preprocessing.get("smoothness", {})
        return float(found.get(task, asked.middle))
    if not asked.low <= given <= asked.high:
        raise UserError(
            f"--smoothness is {given:g}, but {model.name} was trained for "
            f"{asked.low:g} to {asked.high:g}; give a number between"
        )
    return given
