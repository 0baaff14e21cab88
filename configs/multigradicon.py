"""multiGradICON: registration within and across modalities.

Paper: Demir et al., multiGradICON, WBIR 2024, section 3, with its erratum. The network
and the two stages are uniGradICON's. The similarity is 1 - LNCC^2 (the released script
leaves LNCC). Where a dataset has aligned modalities, the network sees one of them of
each subject, drawn independently, and the similarity compares both subjects in one
modality, drawn independently of that (strategy F; `randomise` B or R for the others).
Pairs are drawn by the number of anatomical regions and modality combinations, 4000 per
epoch. The third stage, 100 epochs, has ten datasets in the paper, weighted by region
(`data.pairs.region_weights`), and COPDGene with lung masks: run it as
configs/finetune.py with the manifests of that stage.

    python train.py --config configs/multigradicon.py --out runs/multigradicon \
        --data.manifests copdgene.csv,brats.csv,abdomen.csv,hcp.csv,abcd.csv,oai.csv,\
mrct.csv,ukb.csv
"""

from jaxreg.data.augment import Augmentation
from jaxreg.data.pairs import Task
from jaxreg.data.pipeline import Loading
from jaxreg.experiment import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

# regions x modality combinations of the paper's table; inverted CT is a modality.
TASKS = (
    Task("copdgene", weight=1, pairing="intra"),
    Task("brats", weight=10, pairing="intra", randomise="F"),
    Task("abdomen", weight=3, randomise="F", invert_ct=True),
    Task("hcp", weight=3, randomise="F"),
    Task("abcd", weight=3, randomise="F"),
    Task("oai", weight=3),
    Task("mrct", weight=6, invert_ct=True),
    Task("ukb", weight=18, randomise="F"),
)


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="multigradicon",
        paper="Demir et al., multiGradICON, WBIR 2024, section 3",
        model=GradIconConfig(),
        data=DataConfig(
            manifests=tuple(f"{task.dataset}.csv" for task in TASKS),
            tasks=TASKS,
            schedule="weighted",
            pairs_per_epoch=4000,
        ),
        loading=Loading(shape=(175, 175, 175), cache_dir="cache"),
        augment=Augmentation(noise=0.05, aligned=False),
        objective=Objective(
            similarity="lncc2",
            similarity_options=(("sigma", 5),),
            inverse_consistency_weight=1.5,
        ),
        optimizer=OptimizerConfig(name="adam", learning_rate=5e-5),
        train=TrainConfig(batch=16, replicas=4),
        loop=LoopConfig(validate_every=20, image_every=20),
        stages=(
            Stage("stage_1", epochs=800, changes=(("model.refinements", 0),)),
            Stage("stage_2", epochs=200, changes=(("model.refinements", 1),)),
        ),
    )
