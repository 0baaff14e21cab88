"""UniReg: one network whose head is made for the region and the type of each task.

Paper: Li et al., UniReg, 2025, section 3: SGD with momentum 0.99 at 5e-5, 120,000
iterations of one pair, tasks drawn alike, NCC + lambda * diffusion + Dice with lambda
0.05 (head and neck), 1 (chest), 0.1 (abdomen) and 10 (liver, within subjects), moving
onto fixed alone; 2 mm, 192 x 192 x 160 voxels, -800 to 400 HU. The weight of Dice is
not in the paper.
Data: one manifest per task, CT with labels, and SAM weights. Nobody is held out and the
last weights are kept, unless a manifest has a column split: train trains, val chooses
the best weights, test (the paper's test pairs) does neither and is what `jaxreg
evaluate --split test` may report.

    python train.py --config configs/unireg.py --train.sam runs/sam/weights \
        --data.manifests headneck.csv,chest.csv,abdomen.csv,liver.csv --out runs/unireg

Memory: not measured; the same command with --dry-run prints that of a step.
Time: not measured. Metric: not measured.

Without SAM: --model.features mind, which correlates descriptors; and for MR, whose
intensities are no Hounsfield units, --model.backbone_window None as well.

Scans are loaded from -1024 to 3071 HU, which SAM sees; the U-Net is shown -800 to 400
HU, and the similarity compares the same, as the paper does, in training as in use. A
Task may have a network_window and a similarity_window of its own.

Scans are taken as they are stored. The paper aligns those of two subjects first: do so
once for each, onto one of them, by `jaxreg register --prealign affine --model none
--io-iterations None --warped-moving-out ...`, and with --prealign in use.

A user's own tasks are a copy of this file with other TASKS; each may have a similarity
and labels of its own. A network that is conditional on lambda at registration has
smoothness_range=SmoothnessRange(0.05, 10.0) in its UniRegConfig.
"""

from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

TASKS = (
    Task("headneck", pairing="inter", smoothness=0.05),
    Task("chest", pairing="inter", smoothness=1.0),
    Task("abdomen", pairing="inter", smoothness=0.1),
    Task("liver", pairing="intra", smoothness=10.0),
)


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="unireg",
        paper="Li et al., UniReg, 2025, section 3",
        model=UniRegConfig(),
        data=DataConfig(tasks=TASKS, holdout=None, pairs_per_epoch=1000),
        loading=Loading(
            shape=(160, 192, 192),
            ct_window=(-1024.0, 3071.0),
            resize="pad_crop",
            axes="spl",
        ),
        augment=None,
        objective=Objective(
            similarity="ncc",
            inverse_consistency_weight=0.0,
            smoothness_weight=1.0,
            dice_weight=1.0,
            directions="forward",
        ),
        optimizer=OptimizerConfig("sgd", learning_rate=5e-5, momentum=0.99),
        train=TrainConfig(batch=1),
        loop=LoopConfig(log_every=100, validate_every=5),
        stages=(Stage("stage_1", epochs=120),),
    )
