"""PromptReg on the hippocampus set of the Medical Segmentation Decathlon (Task04).

Paper: Xie et al., PromptReg, MICCAI 2025, section 2; a pyramid of 4 channels on grids
of 32 x 48 x 32 voxels, which two CPU cores can train. The method's own smoothness
term, moving onto fixed alone.
Data: Task04_Hippocampus; splits, augmentation and similarity are those of
configs/hippocampus_gradicon.py.

    python train.py --config configs/hippocampus_promptreg.py \
        --data.manifests Task04_Hippocampus --out runs/hippocampus_promptreg

Memory: 0.09 GB for a step on a grid of 32 x 32 x 32 (CPU; --dry-run prints it).
Time: 37 minutes for 2800 steps on one CPU core by itself.
Metric: Dice 74.4 % over the 123 pairs of the split val, 59.6 % where
scans are only resized.
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
