"""An experiment: the frozen tree that a configuration file returns.

# configs/NAME.py
def get_config() -> Experiment: ...
"""

import dataclasses
from typing import Any, Literal

from jaxreg.data import synthetic
from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.data.sampler import Schedule
from jaxreg.errors import UserError
from jaxreg.experiments import fields
from jaxreg.losses.objective import Objective
from jaxreg.models.base import NetworkConfig
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def _at_least(least: int, value: int, name: str) -> None:
    if value < least:
        raise UserError(f"{name} is {value}, expected at least {least}")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which pairs, and how they are read.

    Attributes:
      manifests: manifest files or folders, see `read.read_manifest`.
      synthetic: names of `data.synthetic.TASKS`, instead of manifests.
      synthetic_labels: structures of the synthetic anatomies.
      synthetic_deformation: largest displacement of the synthetic deformations, voxels;
        an eighth of the shortest axis if None.
      holdout: every n-th subject validates where a manifest has no splits; None: all
        train.
      tasks: how each dataset is trained on; one task per dataset if empty.
      exclude: datasets, or kinds of synthetic pair, that take no part: a domain left
        out to see how the others serve it.
      schedule: see `sampler.sampler`.
      pairs_per_epoch: of all tasks together.
      classes: label values of the Dice term; all of a manifest's list if empty.
        Validation scores every label that it finds.
      validation_pairs: so many of all datasets together, fewer if there are no more;
        0 for none. Each dataset has an equal share, at least one where it has any; what
        it cannot fill, the others do. Within a dataset they are spread over the
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
      shard_optimizer: each device that shares the batch keeps its part alone of the
        optimiser's state and of the moving average, and updates that part of the
        weights.
      seed: of weights, pairs, augmentation and noise.
      start: weights to start from: a name of `jaxreg models`, a checkpoint folder or a
        PyTorch file; fresh ones if None.
      start_tasks: names of the prompts, or regions, of `start`, in their order, where
        the weights do not name them (PyTorch files) or call the datasets otherwise.
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
    shard_optimizer: bool = False
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
      objectives: further ones by name, see `pairs.Task.objective`.
      optimizer: update rule and learning rate.
      train: batch, devices, start.
      loop: logging, validation, checkpoints.
      stages: one after the other.
    """

    name: str
    stages: tuple[Stage, ...]
    paper: str = ""
    licence: str = "not stated; that of the training data and of the starting weights"
    model: NetworkConfig = GradIconConfig()
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
        object.__setattr__(self, "stages", tuple(map(self._with_names, self.stages)))
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
            fields.check_known(task, synthetic.TASKS, "data.synthetic")
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
            if any(prompted) and self.model.conditioning != "prompts":
                raise UserError(
                    "objective.orthogonality_weight or objective.task_weight is above "
                    "0, but the network has no prompt bank; set both to 0, or give a "
                    "PromptReg model"
                )
        known = {"default", *dict(self.objectives)}
        for task in self.data.tasks:
            fields.check_known(
                task.objective, known, f"objective of task {task.dataset}"
            )

    def _with_names(self, stage: Stage) -> Stage:
        """Returns a stage whose changes go by the present names of fields."""
        changes = ((fields.present_name(self, n), value) for n, value in stage.changes)
        return dataclasses.replace(stage, changes=tuple(changes))

    def _check_windows(self) -> None:
        """Checks that a network that reads Hounsfield units is shown them rightly."""
        needed = self.model.hounsfield_window
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
                    "units `model.backbone_window` None and `model.features` mind"
                )

    def _check_windows_of(self, task: Task) -> None:
        """Checks the windows of Hounsfield units of one task."""
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
        has_regions = self.model.conditioning == "regions"
        reads = self.model.network_window is not None
        if task.network_window is not None and not (has_regions and reads):
            raise UserError(
                f"task {task.dataset} has a network_window, but the network is not "
                "told of tasks or reads no Hounsfield units; give the task a "
                "ct_window, or `model.backbone_window` for all"
            )


def stages(experiment: Experiment) -> tuple[tuple[Stage, Experiment], ...]:
    """Returns each stage with the experiment as it is during it."""
    return tuple(
        (stage, fields.replaced(experiment, fields.split_names(stage.changes), ""))
        for stage in experiment.stages
    )
