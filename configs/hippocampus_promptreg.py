"""PromptReg on the hippocampus set (Task04), in the time of hippocampus_gradicon.

Method: Xie et al., PromptReg, MICCAI 2025, section 2; a pyramid of 4 channels on grids
of 32 x 48 x 32 voxels, which two CPU cores can train. Data, splits, augmentation and
similarity as in configs/hippocampus_gradicon.py; the method's own smoothness term,
moving onto fixed alone.

    python train.py --config configs/hippocampus_promptreg.py \
        --data.manifests Task04_Hippocampus --out runs/hippocampus_promptreg
"""

import dataclasses
import pathlib

from jaxreg.experiments import files
from jaxreg.experiments.config import Experiment, Stage, TrainConfig
from jaxreg.models.promptreg import AS_PAPER
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    whole = files.load(pathlib.Path(__file__).with_name("hippocampus_gradicon.py"))
    return dataclasses.replace(
        whole,
        name="hippocampus_promptreg",
        paper="Xie et al., PromptReg, MICCAI 2025, section 2",
        model=dataclasses.replace(AS_PAPER, channels=4),
        objective=dataclasses.replace(
            whole.objective,
            inverse_consistency_weight=0.0,
            smoothness_weight=0.3,
            directions="forward",
        ),
        optimizer=OptimizerConfig(
            "amsgrad", learning_rate=5e-4, schedule="polynomial", warm_up=40
        ),
        train=TrainConfig(batch=1),
        stages=(Stage("stage_1", epochs=14),),
    )
