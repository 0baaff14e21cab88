"""PromptReg: one network for several domains, with a bank of prompts.

Paper: Xie et al., PromptReg, MICCAI 2025, section 3: Adam with AMSGrad, 1e-4 falling
with power 0.9, 300 epochs of 100 pairs per dataset, batch 1, 160 x 160 x 160, MIND-SSC,
smoothness 0.1, orthogonality and task similarity 0.001 each, moving onto fixed alone.
Intensities as in the paper: CT from -1000 to 1000 HU, others to the 0.99 quantile.
Data: one manifest per domain. Nobody is held out, as in the paper's training, and the
last weights are kept, unless a manifest has a column split: train trains, val chooses
the best weights, test does neither and is what `jaxreg evaluate --split test` may
report.

    python train.py --config configs/promptreg.py \
        --data.manifests abdomen.csv,brain.csv,hippocampus.csv --out runs/promptreg

Memory: not measured; the same command with --dry-run prints that of a step.
Time: not measured. Metric: not measured at this size; configs/hippocampus_promptreg.py
has figures of a small one.

The prompt has the paper's spatial form, which reaches the decoder; the released code's
pooled one is almost without effect (--model.readout pooled_attention
--model.static_block true --model.temperature 0.5 gives weights that it can load).

Table 1, a domain left out of training and registered nevertheless:

    python train.py --config configs/promptreg.py --data.manifests ... \
        --data.exclude hippocampus --data.pairs_per_epoch 400 --out runs/without

Table 2, without the two regularisers: --objective.orthogonality_weight 0
--objective.task_weight 0. Without prompts (RDP): configs/rdp.py.
"""

from jaxreg.data.loading import Loading
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.promptreg import AS_PAPER
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

DATASETS = 5


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="promptreg",
        paper="Xie et al., PromptReg, MICCAI 2025, section 3",
        model=AS_PAPER,
        data=DataConfig(pairs_per_epoch=100 * DATASETS, holdout=None),
        loading=Loading(shape=(160, 160, 160), resize="aligned", axes="ijk"),
        augment=None,
        objective=Objective(
            similarity="mind",
            inverse_consistency_weight=0.0,
            smoothness_weight=0.1,
            orthogonality_weight=0.001,
            task_weight=0.001,
            directions="forward",
        ),
        optimizer=OptimizerConfig(
            "amsgrad", learning_rate=1e-4, schedule="polynomial", power=0.9
        ),
        train=TrainConfig(batch=1, seed=42),
        loop=LoopConfig(log_every=100, validate_every=10),
        stages=(Stage("stage_1", epochs=300),),
    )
