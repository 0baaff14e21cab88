"""uniGradICON: one network for lung CT, knee MR, brain MR and abdomen CT.

Paper: Tian et al., uniGradICON, MICCAI 2024, section 3 (data, training in two stages).
Stage 1 trains three U-Nets for 800 epochs, stage 2 adds the last U-Net at full
resolution and trains all of them for 200, with a fresh optimiser. An epoch has 1000
pairs of each dataset. On four GPUs, with 4 pairs and batch statistics of its own on
each, as the original.
Data: one manifest per dataset (see "Your own data" in docs/train.md), COPDGene with
pairing intra and lung masks, OAI, HCP and L2R-Abdomen with pairing inter. Nobody is
held out, as there, where training pairs validate: without a split the last weights are
kept. Splits, if a manifest has the column: train trains, val chooses the best weights
(--data.holdout 5 makes one), test does neither, and is what `jaxreg evaluate --split
test` may report as held out.

    python train.py --config configs/unigradicon.py --out runs/unigradicon \
        --data.manifests copdgene.csv,oai.csv,hcp.csv,abdomen.csv

Memory: 1.9 GB for a step of one pair on a grid of 64 x 64 x 64 (CPU); at the recipe's
not measured, the same command with --dry-run prints it.
Time: not measured. Metric: not measured.

Where the release differs from the paper: its loops run 801 and 201 epochs, and 3899
pairs, because COPDGene has 899 subjects. Where this recipe differs from the release:
COPDGene's two scans are drawn in either order, there always expiration first.
"""

from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="unigradicon",
        paper="Tian et al., uniGradICON, MICCAI 2024, section 3",
        model=GradIconConfig(),
        data=DataConfig(
            manifests=("copdgene.csv", "oai.csv", "hcp.csv", "abdomen.csv"),
            tasks=(
                Task("copdgene", pairing="intra"),
                # Two independent draws that may coincide, as in the original.
                Task("oai", distinct=False),
                Task("hcp", distinct=False),
                Task("abdomen", distinct=False),
            ),
            holdout=None,
            schedule="per_dataset",
            pairs_per_epoch=4000,
        ),
        loading=Loading(shape=(175, 175, 175), cache_dir="cache", mask_inputs=True),
        augment=Augmentation(noise=0.05, aligned=False),
        objective=Objective(
            similarity="lncc",
            similarity_options=(("sigma", 5),),
            inverse_consistency_weight=1.5,
        ),
        optimizer=OptimizerConfig(name="adam", learning_rate=5e-5),
        train=TrainConfig(batch=16, replicas=4),
        loop=LoopConfig(validate_every=20, image_every=20),
        stages=(
            Stage("stage_1", epochs=800, changes=(("model.fullres_steps", 0),)),
            Stage("stage_2", epochs=200, changes=(("model.fullres_steps", 1),)),
        ),
    )
