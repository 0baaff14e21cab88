"""An experiment: the frozen tree that a configuration file returns, and changes to it.

    # configs/NAME.py
    def get_config() -> Experiment: ...

``--section.field value`` on the command line changes one leaf of the tree; a stage's
`changes` are the same, for that stage alone: ``--stages.NAME.section.field value``.
"""

import ast
import dataclasses
import difflib
import json
import os
import pathlib
import runpy
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from jaxreg.data import synthetic
from jaxreg.data.augment import Augmentation
from jaxreg.data.pairs import Schedule, Task
from jaxreg.data.pipeline import Loading
from jaxreg.errors import UserError
from jaxreg.io import files
from jaxreg.losses.objective import Objective
from jaxreg.models import kinds
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def _at_least(least: int, value: int, name: str) -> None:
    if value < least:
        raise UserError(f"{name} is {value}, expected at least {least}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pairs, and how they are read.

    Attributes:
      manifests: manifest files or folders, see `data.manifest.read_manifest`.
      synthetic: names of `data.synthetic.TASKS`, instead of manifests.
      synthetic_labels: structures of the synthetic anatomies.
      synthetic_deformation: largest displacement of the synthetic deformations, voxels;
        an eighth of the shortest axis if None.
      holdout: every n-th subject validates where a manifest has no splits; None: all
        train.
      tasks: how each dataset is trained on; one task per dataset if empty.
      exclude: datasets, or kinds of synthetic pair, that take no part: a domain left
        out to see how the others serve it.
      schedule: see `data.pairs.sampler`.
      pairs_per_epoch: of all tasks together.
      classes: label values of the Dice term; all of a manifest's list if empty.
        Validation scores every label that it finds.
      validation_pairs: so many of all datasets together, fewer if there are no more;
        0 for none. Each dataset has an equal share, at least one where it has any, and
        gives what it lacks to the others; within a dataset they are spread over the
        validation split. The best weights are those of the best mean over datasets.
      neighbours: each validation subject is fixed image for the next few, cyclically.
    """

    manifests: tuple[str, ...] = ()
    synthetic: tuple[str, ...] = ()
    synthetic_labels: int = 5
    synthetic_deformation: float | None = None
    holdout: int | None = 5
    tasks: tuple[Task, ...] = ()
    exclude: tuple[str, ...] = ()
    schedule: Schedule = "per_dataset"
    pairs_per_epoch: int = 1000
    classes: tuple[int, ...] = ()
    validation_pairs: int = 16
    neighbours: int = 3

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a number is out of its range.
        """
        for name, least in (("synthetic_labels", 1), ("pairs_per_epoch", 1),
                            ("validation_pairs", 0), ("neighbours", 1)):  # fmt: skip
            _at_least(least, getattr(self, name), f"data.{name}")
        if self.holdout is not None and self.holdout < 2:
            raise UserError(
                f"data.holdout is {self.holdout}, expected 2 or more (5: every fifth "
                "subject), or None to train on all"
            )


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a batch becomes a step.

    Attributes:
      batch: pairs of the global batch, over all devices and accumulated parts.
      accumulate: the batch is worked off in this many parts.
      replicas: 0: batch statistics over all pairs worked off at once; n: in n equal
        parts with statistics of their own, as on n GPUs of the original.
      ema: decay of the moving average of parameters and batch statistics, 0 for none.
      parallel: see `training.parallel.make_layout`.
      space: devices per volume, split along D.
      seed: of weights, pairs, augmentation and noise.
      start: weights to start from: a name of `jaxreg models`, a checkpoint folder or a
        PyTorch file; fresh ones if None.
      start_tasks: names of the prompts, or regions, of `start`, in their order, where
        the weights do not tell (PyTorch files) or call the datasets otherwise.
      sam: SAM weights whose embeddings a UniReg correlates; those of `start` if None.
      only: which parameters change: all, a bank's static prompts, or those of tasks
        that the weights to start from do not know.
    """

    batch: int = 4
    accumulate: int = 1
    replicas: int = 0
    ema: float = 0.0
    parallel: Literal["auto", "single", "mesh", "pmap"] = "auto"
    space: int = 1
    seed: int = 0
    start: str | None = None
    start_tasks: tuple[str, ...] = ()
    sam: str | None = None
    only: Literal["all", "prompts", "new_prompts"] = "all"

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a number is out of its range.
        """
        for name, least in (("batch", 1), ("accumulate", 1), ("space", 1),
                            ("seed", 0)):  # fmt: skip
            _at_least(least, getattr(self, name), f"train.{name}")
        if self.replicas < 0 or not 0 <= self.ema < 1:
            raise UserError(
                f"train.replicas is {self.replicas} and train.ema {self.ema}, expected "
                "0 or more replicas and a decay of at least 0 and below 1"
            )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One part of the training, with an optimiser of its own.

    A stage starts from the weights of the one before; layers that these lack are fresh.

    Attributes:
      name: of its folder.
      epochs: how long.
      changes: ("section.field", value) of the experiment during this stage.
    """

    name: str
    epochs: int
    changes: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: the stage has no epoch.
        """
        if self.epochs < 1:
            raise UserError(
                f"stage {self.name} has {self.epochs} epochs, expected at least 1"
            )


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a training run is made of.

    Attributes:
      name: of the run.
      paper: what it follows, with the section.
      licence: of the weights that come out, as the training data have it.
      model: the network.
      data: the pairs.
      loading: how scans become arrays.
      augment: what is drawn for each pair; None for nothing.
      objective: what is minimised, for tasks that name no other.
      objectives: further ones by name, see `data.pairs.Task.objective`.
      optimizer: update rule and learning rate.
      train: batch, devices, start.
      loop: logging, validation, checkpoints.
      stages: one after the other.
    """

    name: str
    stages: tuple[Stage, ...]
    paper: str = ""
    licence: str = "not stated; that of the training data and of the starting weights"
    model: kinds.Config = GradIconConfig()
    data: DataConfig = DataConfig()
    loading: Loading = Loading()
    augment: Augmentation | None = Augmentation()
    objective: Objective = Objective()
    objectives: tuple[tuple[str, Objective], ...] = ()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    loop: LoopConfig = LoopConfig()

    def __post_init__(self):
        """Checks what spans sections.

        Raises:
          UserError: no stage, stages of one name, an unknown objective or synthetic
            task, losses of prompts without a bank, data of two kinds, settings that
            synthetic data cannot have, or a window of Hounsfield units that is not the
            network's.
        """
        names = [stage.name for stage in self.stages]
        if not names or len(set(names)) < len(names):
            raise UserError(
                f"{self.name} has the stages {', '.join(names) or 'none'}; give at "
                "least one, each with a name of its own"
            )
        if self.data.manifests and self.data.synthetic:
            raise UserError(
                "data.manifests and data.synthetic are both given; leave one out"
            )
        for task in self.data.synthetic:
            _known(task, synthetic.TASKS, "data.synthetic")
        ignored = {
            "data.tasks": self.data.tasks,
            f"data.schedule {self.data.schedule}": self.data.schedule != "per_dataset",
            "objectives": self.objectives,
            "loading.mask_inputs": self.loading.mask_inputs,
        }
        found = [name for name, given in ignored.items() if given]
        if self.data.synthetic and found:
            raise UserError(
                f"synthetic pairs take no notice of {', '.join(found)}; leave that "
                "out, or give data.manifests instead of data.synthetic"
            )
        self._check_windows()
        for task in self.data.tasks:
            self._check_windows_of(task)
        for objective in (self.objective, *dict(self.objectives).values()):
            prompted = objective.orthogonality_weight, objective.task_weight
            if any(prompted) and not isinstance(self.model, PromptRegConfig):
                raise UserError(
                    "objective.orthogonality_weight or objective.task_weight is above "
                    "0, but the network has no prompt bank; set both to 0, or give a "
                    "PromptReg model"
                )
        known = {"default", *dict(self.objectives)}
        for task in self.data.tasks:
            _known(task.objective, known, f"objective of task {task.dataset}")

    def _check_windows(self) -> None:
        """Checks that a network that reads Hounsfield units is shown them rightly."""
        needed = kinds.hounsfield_window(self.model)
        if needed is None or not self.data.manifests:
            return
        given = {"loading.ct_window": self.loading.ct_window}
        given |= {
            f"ct_window of task {task.dataset}": task.ct_window
            for task in self.data.tasks
            if task.ct_window is not None
        }
        for name, window in given.items():
            if tuple(window) != tuple(needed):
                raise UserError(
                    f"{name} is {window[0]:g} to {window[1]:g} HU, but the network "
                    f"takes 0 and 1 for {needed[0]:g} and {needed[1]:g} HU "
                    "(model.window); give both the same, or for a network without "
                    "units --model.backbone_window None and --model.features mind"
                )

    def _check_windows_of(self, task: Task) -> None:
        """Checks what a task says of who is shown which Hounsfield units."""
        loaded = task.ct_window or self.loading.ct_window
        for name in ("network_window", "similarity_window"):
            window = getattr(task, name)
            if window is None:
                continue
            low, high = window
            if not loaded[0] <= low < high <= loaded[1]:
                raise UserError(
                    f"{name} of task {task.dataset} is {low:g} to {high:g} HU, "
                    f"expected two increasing numbers within the {loaded[0]:g} to "
                    f"{loaded[1]:g} HU that are loaded; mend it, or widen "
                    "loading.ct_window"
                )
        told = kinds.tells_tasks(self.model) == "regions"
        reads = kinds.reads_ct_alone(self.model)
        if task.network_window is not None and not (told and reads):
            raise UserError(
                f"task {task.dataset} has a network_window, but the network is not "
                "told of tasks or reads no Hounsfield units; give the task a "
                "ct_window, or --model.backbone_window for all"
            )


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
            f"--config {path} has no function get_config() that returns an "
            "experiment.Experiment; see configs/demo.py"
        )
    return found


def load_any(path: str | os.PathLike[str]) -> Any:
    """Runs a configuration file and returns what its `get_config` does, or None.

    Raises:
      UserError: there is no such file.
    """
    path = pathlib.Path(path)
    if not os.path.isfile(path):  # Path.is_file raises on a name that is too long
        near = sorted(path.parent.glob("*.py")) if os.path.isdir(path.parent) else []
        raise UserError(
            f"--config {path} does not exist{_near(path.name, [p.name for p in near])}"
        )
    get_config = runpy.run_path(str(path)).get("get_config")
    return get_config() if callable(get_config) else None


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
    plain: list[_Change] = []
    staged: dict[str, list[_Change]] = {}
    for path, value in _paths(changes):
        if path[0] == "stages" and len(path) > 2 and path[2] in _SECTIONS:
            staged.setdefault(path[1], []).append((path[2:], value))
        else:
            plain.append((path, value))
    for path, _ in plain:
        _check_lasting(path, experiment.stages, staged)
    changed = _replaced(experiment, plain, "")
    names = [stage.name for stage in changed.stages]
    for name in staged:
        _known(name, names, "the stage of a change")
    own = (_stage_changed(changed, s, staged.get(s.name, ())) for s in changed.stages)
    return dataclasses.replace(changed, stages=tuple(own))


def changed(tree: Any, changes: Iterable[tuple[str, Any]]) -> Any:
    """Returns any tree of settings with some leaves changed; see `override`."""
    return _replaced(tree, _paths(changes), "")


def stages(experiment: Experiment) -> tuple[tuple[Stage, Experiment], ...]:
    """Returns each stage with the experiment as it is during it."""
    return tuple(
        (stage, _replaced(experiment, _paths(stage.changes), ""))
        for stage in experiment.stages
    )


def to_dict(experiment: Any) -> dict[str, Any]:
    """Returns the tree as JSON can hold it."""
    return json.loads(json.dumps(dataclasses.asdict(experiment), default=str))


def write(path: pathlib.Path, experiment: Any) -> None:
    """Writes the tree as JSON, for the record and for `--resume`."""
    with files.atomic_path(path) as temporary:
        text = json.dumps(to_dict(experiment), indent=2) + "\n"
        pathlib.Path(temporary).write_text(text, encoding="utf-8")


# A resumed run may differ from the first in where and how it works, not in what.
_FREE = ("loop.", "train.parallel", "train.space", "loading.workers",
         "loading.prefetch", "loading.read_threads", "loading.cache_dir",
         "loading.cache_limit_gb", "paper", "licence")  # fmt: skip


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
            "settings that it was started with, or give another --out"
        ) from error
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
            f"({'; '.join(differing[:5])}); resume it with those, or give another --out"
        )


def _completed(before: Any, now: Any) -> Any:
    """Returns settings as read, with the defaults of fields that came later."""
    if isinstance(before, Mapping) and dataclasses.is_dataclass(now):
        given = {field.name: field for field in dataclasses.fields(now)}
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


_Change = tuple[list[str], Any]
_OPTION = tuple[str, Any]
# What a stage may have its own value of.
_SECTIONS = {f.name for f in dataclasses.fields(Experiment)} - {
    "stages", *(f.name for f in dataclasses.fields(Stage))
}  # fmt: skip


def _path(name: str) -> list[str]:
    return name.replace("-", "_").split(".")


def _paths(changes: Iterable[tuple[str, Any]]) -> list[_Change]:
    return [(_path(name), value) for name, value in changes]


def _check_lasting(
    path: list[str],
    several: Iterable[Stage],
    staged: Mapping[str, Iterable[_Change]],
) -> None:
    """Checks that no stage undoes a change, unless it is given one for itself."""
    undoing = [
        stage.name
        for stage in several
        if path not in [given for given, _ in staged.get(stage.name, ())]
        and any(_overlap(path, own) for own, _ in _paths(stage.changes))
    ]
    if undoing:
        name = ".".join(path)
        own = " ".join(f"--stages.{stage}.{name} VALUE" for stage in undoing)
        raise UserError(
            f"--{name} has no effect in stages that have a value of their own "
            f"({', '.join(undoing)}); give {own}"
        )


def _overlap(one: list[str], other: list[str]) -> bool:
    """Says whether one path is the other or leads to it."""
    return all(a == b for a, b in zip(one, other, strict=False))


def _stage_changed(
    experiment: Experiment, stage: Stage, given: Iterable[_Change]
) -> Stage:
    """Returns the stage with further changes of its own, as their fields' types."""
    new = {".".join(path): value for path, value in given}
    if not new:
        return stage
    kept = [
        (".".join(path), value)
        for path, value in _paths(stage.changes)
        if not any(path[: len(_path(name))] == _path(name) for name in new)
    ]
    above = f"stages.{stage.name}."
    during = _replaced(experiment, _paths([*kept, *new.items()]), above)
    read = [(name, _leaf(during, _path(name))) for name in new]
    return dataclasses.replace(stage, changes=(*kept, *read))


def _leaf(tree: Any, path: list[str]) -> Any:
    for name in path:
        tree = dict(tree)[name] if isinstance(tree, tuple) else getattr(tree, name)
    return tree


def _near(word: str, choices: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(choices), n=2, cutoff=0.5)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _known(word: str, choices: Iterable[str], what: str) -> None:
    choices = list(choices)
    if word not in choices:
        raise UserError(
            f'{what} is "{word}", expected one of {", ".join(choices)}'
            f"{_near(word, choices)}"
        )


def _replaced(tree: Any, changes: Iterable[_Change], above: str) -> Any:
    """Returns the tree with all changes made at once, so that it is checked once."""
    inside: dict[str, list[_Change]] = {}
    for path, value in changes:
        inside.setdefault(path[0], []).append((path[1:], value))
    fields = {f.name for f in dataclasses.fields(tree)}
    made: dict[str, Any] = {}
    for name, given in inside.items():
        here = f"{above}{name}"
        if name not in fields:
            raise UserError(
                f"there is no setting --{here}{_near(name, fields)}; "
                f"{above.rstrip('.') or 'an experiment'} has "
                f"{', '.join(sorted(fields))}"
            )
        child = getattr(tree, name)
        for value in (value for rest, value in given if not rest):
            child = _read(value, typing.get_type_hints(type(tree))[name], here)
        below = [(rest, value) for rest, value in given if rest]
        if below and name in ("stages", "objectives") and isinstance(child, tuple):
            child = _named_replaced(child, below, here)
        elif below and not dataclasses.is_dataclass(child):
            raise UserError(
                f"--{here}.{'.'.join(below[0][0])}: {here} is {child!r} and has no "
                "fields"
            )
        elif below:
            child = _replaced(child, below, f"{here}.")
        made[name] = child
    return dataclasses.replace(tree, **made)


def _named_replaced(items: tuple, changes: Iterable[_Change], here: str) -> tuple:
    """Changes some of the stages, or of the (name, objective) pairs, by their names."""
    names = [item[0] if isinstance(item, tuple) else item.name for item in items]
    inside: dict[str, list[_Change]] = {name: [] for name in names}
    for path, value in changes:
        name, rest = path[0], path[1:]
        if name not in names or not rest:
            raise UserError(
                f"there is no setting --{here}.{'.'.join(path)}; {here} has "
                f"{', '.join(names) or 'no entries'}, each with fields of its own"
                f"{_near(name, names)}"
            )
        inside[name].append((rest, value))

    def changed(item, name):
        below = f"{here}.{name}."
        if isinstance(item, tuple):
            return item[0], _replaced(item[1], inside[name], below)
        return _replaced(item, inside[name], below)

    return tuple(changed(i, name) for i, name in zip(items, names, strict=True))


def _read(value: Any, kind: Any, name: str) -> Any:
    """Returns a value as its field's type wants it; text is parsed."""
    expected = _spelled(kind)
    wrong = UserError(f"--{name} is {value!r}, expected {expected}")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or value == "None":
            if type(None) not in arguments:
                raise wrong
            return None
        rest = [a for a in arguments if a is not type(None)]
        return _read(value, rest[0], name)
    if origin is Literal:
        if value not in arguments:
            raise UserError(f"--{name} is {value!r}, expected {expected}")
        return value
    if origin is tuple:
        return _read_tuple(value, arguments, name, wrong)
    if kind in (int, float, bool, str):
        return _read_scalar(value, kind, wrong)
    if isinstance(value, str):
        raise UserError(
            f"--{name} cannot be given as text; set its fields, as in --{name}.FIELD, "
            "or change the configuration file"
        )
    return value


def _read_scalar(value: Any, kind: type, wrong: UserError) -> Any:
    if kind is str:
        return str(value)
    if isinstance(value, str):
        try:
            value = ast.literal_eval(
                value.title() if value.lower() in ("true", "false") else value
            )
        except (ValueError, SyntaxError):
            raise wrong from None
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise wrong
    return value


def _read_tuple(value: Any, arguments: tuple, name: str, wrong: UserError) -> tuple:
    if isinstance(value, str) and arguments[0] == _OPTION:
        return _read_options(value, wrong)
    if isinstance(value, str):
        value = [part.strip() for part in value.strip("()[] ").split(",") if part]
    if not isinstance(value, Iterable):
        raise wrong
    items = list(value)
    endless = len(arguments) == 2 and arguments[1] is Ellipsis
    if not endless and len(items) != len(arguments):
        raise wrong
    kinds = [arguments[0]] * len(items) if endless else list(arguments)
    return tuple(_read(i, k, name) for i, k in zip(items, kinds, strict=True))


def _read_options(text: str, wrong: UserError) -> tuple[tuple[str, Any], ...]:
    """Reads ``sigma=2, bins=32`` as Python reads arguments; "None" is no option."""
    inside = text.strip()
    if inside.lower() in ("", "()", "none"):
        return ()
    try:
        call = ast.parse(f"f({inside})", mode="eval").body
        if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
            raise wrong
        names = [keyword.arg for keyword in call.keywords]
        if call.args or None in names or len(set(names)) < len(names):
            raise wrong
        return tuple((str(k.arg), ast.literal_eval(k.value)) for k in call.keywords)
    except (ValueError, SyntaxError):
        raise wrong from None


def _spelled(kind: Any) -> str:
    """Says in words what a field takes."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(str(a) for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_spelled(a) for a in arguments)
    if origin is tuple:
        if arguments[0] == _OPTION:
            return "NAME=VALUE, with commas, or None"
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return f"a list of {_spelled(arguments[0])}, with commas"
        return f"{len(arguments)} values, with commas"
    words = {int: "a whole number", float: "a number", bool: "true or false",
             str: "text", type(None): "None"}  # fmt: skip
    return words.get(kind, str(kind))
