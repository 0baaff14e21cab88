"""The smallest experiment that a run of several processes can share."""

from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """Returns the experiment: 4 steps of 4 pairs, validated twice.

    Gradient descent: Adam's first steps are the gradient's signs, which rounding turns.
    """
    return Experiment(
        name="one_stage",
        paper="none: a test",
        model=GradIconConfig(
            (2, 4), (4,), downsampled_steps=0, fullres_steps=0, form="native"
        ),
        data=DataConfig(
            synthetic=("inter_mono",),
            synthetic_labels=2,
            pairs_per_epoch=8,
            validation_pairs=3,
        ),
        loading=Loading(shape=(10, 8, 9)),
        augment=Augmentation(noise=0.05),
        objective=Objective(
            similarity_options=(("sigma", 1),),
            inverse_consistency_weight=0.1,
            dice_weight=0.1,
        ),
        optimizer=OptimizerConfig(name="sgd", learning_rate=0.03),
        train=TrainConfig(batch=4),
        loop=LoopConfig(log_every=2, validate_every=1, keep_latest=9),
        stages=(Stage("stage_1", epochs=2),),
    )
