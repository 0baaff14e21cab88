"""The smallest experiment with everything that a resumed run has to bring back.

Two stages, the second with one more U-Net; moving average, a schedule, augmentation,
validation by Dice, a checkpoint every step, and a log whose rows span checkpoints.
"""

from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """Returns the experiment: two stages of 6 and 4 steps."""
    return Experiment(
        name="two_stages",
        paper="none: a test",
        model=GradIconConfig((2, 4), (4,), downsampled_steps=0, fullres_steps=0),
        data=DataConfig(
            synthetic=("inter_mono",),
            synthetic_labels=2,
            pairs_per_epoch=16,
            validation_pairs=2,
        ),
        loading=Loading(shape=(9, 8, 8)),
        augment=Augmentation(noise=0.05),
        objective=Objective(similarity="ncc", dice_weight=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine"),
        train=TrainConfig(batch=8, ema=0.9),
        loop=LoopConfig(
            log_every=4, validate_every=2, checkpoint_every=1, keep_latest=20
        ),
        stages=(
            Stage("stage_1", epochs=3),
            Stage("stage_2", epochs=2, changes=(("model.fullres_steps", 1),)),
        ),
    )
