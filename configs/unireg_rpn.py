"""UniReg-RPN: the released form of UniReg, a residual pyramid with heads for each task.

Paper: Li et al., UniReg, 2025; network and numbers of the released code. First the
pyramid with static heads on brain MR alone: Adam, 1e-4, 80,000 steps. Then, from these
weights, with heads made for the task on six tasks: 1e-5, 150,000 steps, the gradient's
norm at most 1, tasks by weight. Batch 1, LNCC in boxes of 9 voxels, moving onto fixed
alone, no labels; CT from -150 to 250 HU, MR between the quantiles 0.005 and 0.995 of
the voxels above 0.
Data: one manifest per task. Nobody is held out and the last weights are kept, unless a
manifest has a column split: train trains, val chooses the best weights by the mean Dice
over tasks, as the release does, test does neither and is what `jaxreg evaluate --split
test` may report.

    python train.py --config configs/unireg_rpn.py --out runs/unireg_rpn \
        --data.manifests acdc.csv,liver.csv,head.csv,abdomen.csv,chest.csv,brain.csv

Memory: not measured; the same command with --dry-run prints that of a step.
Time: not measured. Metric: not measured.

Unlike the release: one grid of 160 x 192 x 192 for all tasks, where it has grids of
their own for the heart (16 x 128 x 128, boxes of 3 x 9 x 9) and the brain (192 x 224 x
160); single precision; tasks drawn by weight, not in a fixed cycle; scans as they are
stored, not pre-aligned (see configs/unireg.py).
UniReg-IIRPN is the same network in use: jaxreg register --level-iterations 10.
"""

from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.unireg.released import UniRegRpnConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

TASKS = (
    Task("acdc", 4.0, "intra", region="cardiac", smoothness=0.5),
    Task("liver", 2.0, "intra", smoothness=10.0),
    Task("head", 2.0, "inter", smoothness=1.0),
    Task("abdomen", 2.0, "inter", smoothness=1.0),
    Task("chest", 2.0, "inter", smoothness=1.0),
    Task("brain", 2.0, "inter", smoothness=1.0),
)
FIRST = "brain"


def get_config() -> Experiment:
    """Returns the experiment."""
    others = tuple(task.dataset for task in TASKS if task.dataset != FIRST)
    return Experiment(
        name="unireg_rpn",
        paper="Li et al., UniReg, 2025, section 3, and the released code",
        model=UniRegRpnConfig(),
        data=DataConfig(
            tasks=TASKS, schedule="weighted", holdout=None, pairs_per_epoch=1000
        ),
        loading=Loading(
            shape=(160, 192, 192),
            ct_window=(-150.0, 250.0),
            quantile_range=(0.005, 0.995),
            foreground=True,
            resize="aligned",
        ),
        augment=None,
        objective=Objective(
            similarity="box_ncc",
            similarity_options=(("window", 9),),
            inverse_consistency_weight=0.0,
            smoothness_weight=1.0,
            directions="forward",
        ),
        optimizer=OptimizerConfig("adam", learning_rate=1e-5, clip=1.0),
        train=TrainConfig(batch=1, seed=42),
        loop=LoopConfig(log_every=100),
        stages=(
            Stage(
                "static",
                epochs=80,
                changes=(
                    ("model.head", "static"),
                    ("data.exclude", others),
                    ("optimizer.learning_rate", 1e-4),
                    ("optimizer.clip", 0.0),
                ),
            ),
            Stage("dynamic", epochs=150),
        ),
    )
