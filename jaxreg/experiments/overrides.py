"""Overrides of an experiment's settings by dotted names.
``--section.field value`` on the command line changes one leaf of the tree; a stage's
`changes` are the same, for that stage alone: ``--stages.NAME.section.field value``.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from jaxreg.errors import UserError
from jaxreg.experiments import fields
from jaxreg.experiments.config import Experiment, Stage


def override(experiment: Experiment, changes: Iterable[tuple[str, Any]]) -> Experiment:
    """Returns the experiment with some leaves changed.

    Args:
      experiment: stays as it is.
      changes: ("section.field", value), or ("stages.NAME.section.field", value) for one
        stage alone; text is read as the field's type. What spans fields is checked
        once all are changed, so their order is free.

    Raises:
      UserError: no such section or field (near matches are named), a value does not
        fit, or a stage would undo a change with its own.
    """
    plain: list[fields.Change] = []
    staged: dict[str, list[fields.Change]] = {}
    for path, value in fields.split_names(changes):
        if path[0] == "stages" and len(path) > 2:
            name = fields.present_name(experiment, ".".join(path[2:]))
            path = [*path[:2], *name.split(".")]
        path = fields.present_name(experiment, ".".join(path)).split(".")
        if path[0] == "stages" and len(path) > 2 and path[2] in _SECTIONS:
            staged.setdefault(path[1], []).append((path[2:], value))
        else:
            plain.append((path, value))
    for path, _ in plain:
        _check_lasting(path, experiment.stages, staged)
    changed = fields.replaced(experiment, plain, "")
    names = [stage.name for stage in changed.stages]
    for name in staged:
        fields.check_known(name, names, "the stage of a change")
    own = (_stage_changed(changed, s, staged.get(s.name, ())) for s in changed.stages)
    return dataclasses.replace(changed, stages=tuple(own))


# What a stage may have its own value of.
_SECTIONS = {f.name for f in dataclasses.fields(Experiment)} - {
    "stages", *(f.name for f in dataclasses.fields(Stage))
}  # fmt: skip


def _check_lasting(
    path: list[str],
    several: Iterable[Stage],
    staged: Mapping[str, Iterable[fields.Change]],
) -> None:
    """Checks that no stage undoes a change, unless it is given one for itself."""
    undoing = [
        stage.name
        for stage in several
        if path not in [given for given, _ in staged.get(stage.name, ())]
        and any(_overlap(path, own) for own, _ in fields.split_names(stage.changes))
    ]
    if undoing:
        name = ".".join(path)
        own = " ".join(f"`stages.{stage}.{name}` VALUE" for stage in undoing)
        raise UserError(
            f"`{name}` has no effect in stages that have a value of their own "
            f"({', '.join(undoing)}); give {own}"
        )


def _overlap(one: list[str], other: list[str]) -> bool:
    """Says whether one path is the other or leads to it."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _stage_changed(
    experiment: Experiment, stage: Stage, given: Iterable[fields.Change]
) -> Stage:
    """Returns the stage with further changes of its own, as their fields' types."""
    new = {".".join(path): value for path, value in given}
    if not new:
        return stage
    kept = [
        (".".join(path), value)
        for path, value in fields.split_names(stage.changes)
        if not any(
            path[: len(fields.split_name(name))] == fields.split_name(name)
            for name in new
        )
    ]
    above = f"stages.{stage.name}."
    during = fields.replaced(
        experiment, fields.split_names([*kept, *new.items()]), above
    )
    read = [(name, fields.leaf_at(during, fields.split_name(name))) for name in new]
    return dataclasses.replace(stage, changes=(*kept, *read))
