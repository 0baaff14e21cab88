"""Settings of SAM's self-supervised training.

    # configs/NAME.py
    def get_config() -> SamExperiment: ...

The defaults are those of the released code (its configuration for several data sets).
"""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any, Literal

from jaxreg.data import modality as modality_lib
from jaxreg.data import preprocess, sampler
from jaxreg.data.loading import Loading
from jaxreg.data.manifest import read
from jaxreg.data.manifest.records import Record
from jaxreg.data.sam_views import ViewConfig
from jaxreg.errors import UserError
from jaxreg.experiments import fields
from jaxreg.losses.contrastive import ContrastiveConfig
from jaxreg.models import sam
from jaxreg.models.sam import SamConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

RELEASED_RULE = OptimizerConfig(
    "sgd", learning_rate=0.02, momentum=0.9, weight_decay=1e-4, warm_up=500,
    warm_up_from=0.001,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SamData:
    """Which scans; nothing else of them is used, no labels and no pairs.

    Attributes:
      manifests: manifest files or folders, see `read.read_manifest`.
      holdout: every n-th subject validates where a manifest has no splits; None: all
        train.
      validation_volumes: at most so many, equal shares of every dataset, spread over
        its validation split; 0 for none.
    """

    manifests: tuple[str, ...] = ()
    holdout: int | None = 5
    validation_volumes: int = 12

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a number is out of its range.
        """
        if self.validation_volumes < 0 or (self.holdout or 2) < 2:
            raise UserError(
                f"data.validation_volumes is {self.validation_volumes} and "
                f"data.holdout {self.holdout}, expected 0 or more and 2 or more (5: "
                "every fifth subject), or None to train on all"
            )


@dataclasses.dataclass(frozen=True)
class SamLoading:
    """How scans become what the network sees, and with what means.

    Attributes:
      ct_window: Hounsfield units that CT is cut off at; they keep their place in SAM's
        scale.
      quantile_range: the quantiles of an MR scan that become the ends of SAM's scale;
        the minimum and the 0.99 quantile if None.
      cache_dir: folder of decoded scans, 16 bits a voxel; None reads the files anew.
      cache_limit_gb: size of the cache (10^9 bytes), None for what the disk takes.
      workers: see `loading.Loading`.
      read_threads: see `loading.Loading`.
      prefetch: see `loading.Loading`.
    """

    ct_window: tuple[float, float] = sam.HU_RANGE
    quantile_range: tuple[float, float] | None = None
    cache_dir: str | os.PathLike[str] | None = None
    cache_limit_gb: float | None = None
    workers: int = 0
    read_threads: int = 2
    prefetch: int = 2

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: one is out of its range.
        """
        self.of_views((2, 2, 2))

    def of_views(self, shape: tuple[int, int, int]) -> Loading:
        """Returns what the pipeline needs to hand over views, D H W."""
        return Loading(
            shape=shape,
            ct_window=self.ct_window,
            quantile_range=self.quantile_range,
            axes="spl",
            workers=self.workers,
            read_threads=self.read_threads,
            prefetch=self.prefetch,
        )

    def rule(self, modality: str) -> preprocess.IntensityRule:
        """Returns the intensity rule of a modality."""
        return preprocess.IntensityRule(
            modality_lib.kind(modality), self.ct_window, self.quantile_range
        )


@dataclasses.dataclass(frozen=True)
class SamTrain:
    """How a batch becomes a step.

    Attributes:
      batch: volumes of the global batch, two views of each.
      steps: in all.
      steps_per_epoch: what the loop calls an epoch, for validation and checkpoints.
      ema: decay of the moving average of parameters and batch statistics, 0 for none.
      parallel: see `training.parallel.make_layout`; under "pmap" each device finds its
        negatives among its own volumes and has batch statistics of its own, as each GPU
        of the original; on a mesh both are of the whole batch.
      seed: of weights, order, views and choices.
      start: SAM weights to start from: a checkpoint folder or a PyTorch file; fresh
        ones if None.
    """

    batch: int = 3
    steps: int = 20_000
    steps_per_epoch: int = 1000
    ema: float = 0.0
    parallel: Literal["auto", "single", "mesh", "pmap"] = "auto"
    seed: int = 0
    start: str | None = None

    def __post_init__(self):
        """Checks the values.

        Raises:
          UserError: a number is out of its range.
        """
        for name, least in (("batch", 2), ("steps", 1), ("steps_per_epoch", 1),
                            ("seed", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(
                    f"train.{name} is {getattr(self, name)}, expected at least {least}"
                    + ": some negatives come from other volumes" * (name == "batch")
                )
        if not 0 <= self.ema < 1:
            raise UserError(
                f"train.ema is {self.ema}, expected a decay of at least 0 and below 1"
            )


@dataclasses.dataclass(frozen=True)
class SamExperiment:
    """Everything that a training run of SAM is made of.

    Attributes:
      name: of the run.
      paper: what it follows, with the section.
      licence: of the weights that come out, as the training data have it.
      model: the network.
      data: the scans.
      loading: how they become what the network sees.
      views: how two views of a scan are drawn.
      contrast: what is minimised.
      optimizer: update rule and learning rate.
      train: batch, steps, devices.
      loop: logging, validation, checkpoints.
    """

    name: str
    paper: str = ""
    licence: str = "not stated; that of the training data and of the starting weights"
    model: SamConfig = SamConfig()
    data: SamData = SamData()
    loading: SamLoading = SamLoading()
    views: ViewConfig = ViewConfig()
    contrast: ContrastiveConfig = ContrastiveConfig()
    optimizer: OptimizerConfig = RELEASED_RULE
    train: SamTrain = SamTrain()
    loop: LoopConfig = LoopConfig(validate_every=1, image_every=1, metric="loss")

    def __post_init__(self):
        """Checks what spans sections.

        Raises:
          UserError: a score to choose by that there is not, or views in which the
            coarse embedding has fewer than two voxels.
        """
        if self.loop.metric == "dice":
            raise UserError(
                "loop.metric is dice, but SAM aligns no label maps; give loss"
            )
        d, h, w = self.views.shape
        if d < 4 or (d // 4) * -(-h // 16) * -(-w // 16) < 2:
            raise UserError(
                f"views.shape is {self.views.shape}, on which the coarse embedding has "
                "fewer than two voxels of 4 x 16 x 16; give at least 8,16,16"
            )


def override(experiment: SamExperiment, changes: Any) -> SamExperiment:
    """Returns the experiment with some leaves changed; see `overrides.override`."""
    return fields.changed(experiment, changes)


def records_of(
    experiment: SamExperiment,
) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """Returns the scans that train, and those that validate.

    Raises:
      UserError: there is no manifest, one cannot be read, or fewer scans train than
        make a batch, or fewer validate, but some.
    """
    data, batch = experiment.data, experiment.train.batch
    if not data.manifests:
        raise UserError(
            "there are no scans to train on; give `data.manifests` with manifest "
            "files or folders of scans"
        )
    train: list[Record] = []
    held: list[Record] = []
    for path in data.manifests:
        found = read.read_manifest(path, holdout=data.holdout)
        train += found.of_split("train")
        held += found.of_split("val")
    if len(train) < batch:
        raise UserError(
            f"{len(train)} scans train, fewer than train.batch {batch}; lower that, or "
            "give more scans"
        )
    count = min(data.validation_volumes, len(held)) // batch * batch
    chosen = _spread(held, count)
    if data.validation_volumes and held and not count:
        raise UserError(
            f"{min(data.validation_volumes, len(held))} scans validate, fewer than "
            f"train.batch {batch}; raise data.validation_volumes or give more scans, "
            "or `data.validation_volumes` 0"
        )
    return tuple(train), tuple(chosen)


def _spread(records: Sequence[Record], count: int) -> list[Record]:
    """Returns so many records, of every dataset an equal share, spread over each."""
    by_dataset: dict[str, list[Record]] = {}
    for record in records:
        by_dataset.setdefault(record.dataset, []).append(record)
    several = list(by_dataset.values())
    shares = sampler.equal_shares([len(found) for found in several], count)
    chosen = [
        found[i * len(found) // share]
        for found, share in zip(several, shares, strict=True)
        for i in range(share)
    ]
    return chosen[:count]  # fewer than datasets: not one of each
