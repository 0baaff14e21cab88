"""Configuration files: read, checked, written, compared."""

import dataclasses
import json
import os
import pathlib
import runpy
from collections.abc import Mapping
from typing import Any

from jaxreg.errors import UserError, near_match
from jaxreg.experiments import fields, former_modules
from jaxreg.experiments.config import Experiment
from jaxreg.io import files
from jaxreg.models.former_names import present_names


def load(path: str | os.PathLike[str]) -> Experiment:
    """Runs a configuration file and returns its experiment.

    Raises:
      UserError: there is no such file, or it defines no `get_config`.
    """
    return checked(load_any(path), path)


def checked(found: Any, path: str | os.PathLike[str]) -> Experiment:
    """Returns what a configuration file gave, if it is an experiment.

    Raises:
      UserError: it is something else.
    """
    if not isinstance(found, Experiment):
        raise UserError(
            f"`config` {path} has no function get_config() that returns an "
            "experiments.config.Experiment; see configs/demo.py"
        )
    return found


def load_any(path: str | os.PathLike[str]) -> Any:
    """Runs a configuration file and returns what its `get_config` does, or None.

    Modules are found by the names of earlier versions as well, see `former_modules`.

    Raises:
      UserError: there is no such file, or it imports what is not there.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        near = sorted(path.parent.glob("*.py")) if os.path.isdir(path.parent) else []
        raise UserError(
            f"`config` {path} does not exist"
            f"{near_match(path.name, [p.name for p in near])}"
        )
    with former_modules.importable(str(path)):
        try:
            get_config = runpy.run_path(str(path)).get("get_config")
            return get_config() if callable(get_config) else None
        except (ImportError, SyntaxError) as error:
            raise UserError(
                f"`config` {path} cannot be run: {error}; give a file such as "
                "configs/demo.py, which imports what is there"
            ) from error


def to_dict(experiment: Any) -> dict[str, Any]:
    """Returns the tree as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(experiment), default=str))


def write(path: pathlib.Path, experiment: Any) -> None:
    """Writes the tree as JSON, for the record and for `--resume`."""
    with files.atomic_path(path) as temporary:
        text = json.dumps(to_dict(experiment), indent=2) + "\n"
        pathlib.Path(temporary).write_text(text, encoding="utf-8")


# A resumed run may differ from the first in where and how it works, not in what.
_FREE = ("loop.", "train.parallel", "train.space", "train.shard_optimizer",
         "loading.workers", "loading.prefetch", "loading.read_threads",
         "loading.cache_dir", "loading.cache_limit_gb", "paper",
         "licence")  # fmt: skip


def check_same(path: pathlib.Path, experiment: Any) -> None:
    """Checks that a run to be resumed was started with the same settings.

    Raises:
      UserError: names the settings that differ, or the file is damaged. A setting
        that the file does not know is the same if it is None or empty.
    """
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} cannot be read ({error}), so the run is not resumed; put back the "
            "settings that it was started with, or give another `out`"
        ) from error
    known = before if isinstance(before, Mapping) else {}
    for stage in known.get("stages", ()):
        stage["changes"] = [
            [fields.present_name(experiment, name), value]
            for name, value in stage.get("changes", ())
        ]
    was = _leaves(_completed(before, experiment))
    now = _leaves(to_dict(experiment))
    differing = [
        f"{name} {was.get(name)} -> {now.get(name)}"
        for name in sorted({*was, *now})
        if was.get(name) != now.get(name) and not name.startswith(_FREE)
    ]
    if differing:
        raise UserError(
            f"the run in {path.parent} was started with other settings "
            f"({'; '.join(differing[:5])}); resume it with those, or give another `out`"
        )


def _completed(before: Any, now: Any) -> Any:
    """Returns settings as read, with the defaults of fields that came later."""
    if isinstance(before, Mapping) and dataclasses.is_dataclass(now):
        given = {field.name: field for field in dataclasses.fields(now)}
        before = present_names(type(now), before)
        later = {
            name: json.loads(json.dumps(field.default, default=dataclasses.asdict))
            for name, field in given.items()
            if name not in before and field.default is not dataclasses.MISSING
        }
        known = {
            name: _completed(value, getattr(now, name)) if name in given else value
            for name, value in before.items()
        }
        return known | later
    if isinstance(before, list) and isinstance(now, tuple) and len(before) == len(now):
        return [_completed(*both) for both in zip(before, now, strict=True)]
    return before


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix.rstrip("."): _stated(tree)}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _leaves(value, f"{prefix}{name}.")
    return found


def _stated(value: Any) -> Any:
    """Returns a setting without what it leaves open, which older files do not name."""
    if isinstance(value, Mapping):
        return {name: item for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_stated(item) for item in value] or None
    return value
