"""PromptReg on the hippocampus set (Task04), at the size of hippocampus_gradicon.

Method: Xie et al., PromptReg, MICCAI 2025, section 2; a pyramid of 8 channels on grids
of 32 x 48 x 32 voxels, which two CPU cores can train. Similarity, inverse consistency,
augmentation and data as in configs/hippocampus_gradicon.py, so that the networks alone
differ.

    python train.py --config configs/hippocampus_promptreg.py \
        --data.manifests Task04_Hippocampus --out runs/hippocampus_promptreg
"""

import dataclasses
import pathlib

from jaxreg import experiment
from jaxreg.experiment import Experiment
from jaxreg.models.promptreg import PromptRegConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    whole = experiment.load(pathlib.Path(__file__).with_name("hippocampus_gradicon.py"))
    return dataclasses.replace(
        whole,
        name="hippocampus_promptreg",
        paper="Xie et al., PromptReg, MICCAI 2025, section 2",
        model=PromptRegConfig(
            channels=8,
            temperature=0.1,
            readout="spatial",
            static_block=False,
            task_loss_on="weighted",
        ),
        objective=dataclasses.replace(
            whole.objective, orthogonality_weight=0.001, task_weight=0.001
        ),
    )
