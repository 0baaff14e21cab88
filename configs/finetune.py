"""Finetune published weights on own scans.

Paper: Demir et al., multiGradICON, WBIR 2024, section 3 (further training: 100 epochs,
learning rate 5e-5); settings otherwise those of `unigradicon-finetune`, whose JSON
manifests are read as they are; each dataset has as many pairs, its weight there being
1.
Data: a manifest or a folder of scans. Unlike there, where training images validate,
every fifth subject is held out if the manifest has no split (--data.holdout None:
nobody). These, the split val, choose the best weights; scores to report are of the
split test, which a manifest gives in its column split and `jaxreg evaluate --split
test` reads.

    python train.py --config configs/finetune.py --out runs/finetuned \
        --data.manifests my_scans.csv --train.start unigradicon

Memory: not measured; the same command with --dry-run prints that of a step.
Time and metric: not measured; they depend on the scans.

With label maps in the manifest add a Dice term, --objective.dice_weight 0.5
--data.classes 1,2,3; for scans of several modalities take --objective.similarity lncc2
and --train.start multigradicon.
"""

from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="finetune",
        paper="Demir et al., multiGradICON, WBIR 2024, section 3",
        model=GradIconConfig(),
        data=DataConfig(
            manifests=("scans.csv",), schedule="per_dataset", pairs_per_epoch=1000
        ),
        loading=Loading(shape=(175, 175, 175), cache_dir="cache"),
        augment=Augmentation(noise=0.05, aligned=True),
        objective=Objective(similarity="lncc", similarity_options=(("sigma", 5),)),
        optimizer=OptimizerConfig(name="adam", learning_rate=5e-5),
        train=TrainConfig(batch=4, start="unigradicon"),
        loop=LoopConfig(validate_every=10, image_every=10),
        stages=(Stage("finetune", epochs=100),),
    )
