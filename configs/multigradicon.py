"""multiGradICON: registration within and across modalities.

Paper: Demir et al., multiGradICON, WBIR 2024, section 3, with its erratum. The network
and the two stages are uniGradICON's. The similarity is 1 - LNCC^2 (the released script
leaves LNCC). Where a dataset has aligned modalities, the network sees one of them of
each subject, drawn independently, and the similarity compares both subjects in one
modality, drawn independently of that (strategy F; `randomise` B or R for the others).
Pairs are drawn by the number of anatomical regions and modality combinations, 4000 per
epoch. The third stage trains 100 epochs further on ten datasets, weighted so that each
region counts alike, without inverted CT and with COPDGene's lungs masked.
Data: one manifest per dataset, NAME.csv, in the working directory. ABCD is two sets:
abcd_dti.csv lists FA and MD, for the first two stages, and abcd.csv T1, T2, FA and MD,
for the third.

    python train.py --config configs/multigradicon.py --out runs/multigradicon

Memory: not measured; the same command with --dry-run prints that of a step.
Time: not measured. Metric: not measured.

The release's script draws from fewer scans and normalises some datasets twice, which is
not copied. The order of COPDGene's scans, that nobody is held out, and which split is
which, are as in the recipe `unigradicon`. To change what the third stage has of its
own, its manifests above all, name it: --stages.further.data.manifests a.csv,b.csv.
"""

from jaxreg.data.augment import Augmentation
from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.data.sampler import region_weights
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig

# Datasets: regions x modality combinations of the paper's table; inverted CT is a
# modality. The two images of an inter pair are independent draws that may coincide, as
# in the original: ThoraxCBCT's 42 scans give 42^2 pairs.
TASKS = (
    Task("copdgene", weight=1, pairing="intra"),
    Task("brats", weight=10, pairing="intra", randomise="F"),
    Task(
        "abdomen",
        weight=3,
        pairing="inter",
        randomise="F",
        invert_ct=True,
        distinct=False,
    ),
    Task("hcp", weight=3, pairing="inter", randomise="F", distinct=False),
    Task("abcd_dti", weight=3, pairing="inter", randomise="F", distinct=False),
    Task("oai", weight=3, pairing="inter", distinct=False),
    Task("mrct", weight=6, pairing="inter", invert_ct=True, distinct=False),
    Task("ukb", weight=18, pairing="inter", randomise="F", distinct=False),
)

# Anatomies of the further training's datasets, for their weights.
REGIONS = {
    "pancreas": ("abdomen",),
    "thorax_cbct": ("lung",),
    "abcd": ("brain",),
    "copdgene": ("lung",),
    "brats": ("brain",),
    "abdomen": ("abdomen",),
    "hcp": ("brain",),
    "oai": ("knee",),
    "mrct": ("abdomen",),
    "ukb": ("abdomen", "lung", "knee"),
}
_WITHIN = ("pancreas", "copdgene", "brats")
# Where modalities of one subject are aligned. ABCD's structural scans are not aligned
# with its maps of diffusion, and the set has no randomisation in the table.
_RANDOMISED = ("brats", "abdomen", "hcp", "ukb")
FURTHER = tuple(
    Task(
        name,
        weight=weight,
        pairing="intra" if name in _WITHIN else "inter",
        randomise="F" if name in _RANDOMISED else "B",
        distinct=name in _WITHIN,
    )
    for name, weight in region_weights(REGIONS).items()
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
            holdout=None,
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
            Stage("stage_1", epochs=800, changes=(("model.fullres_steps", 0),)),
            Stage("stage_2", epochs=200, changes=(("model.fullres_steps", 1),)),
            Stage(
                "further",
                epochs=100,
                changes=(
                    ("data.manifests", tuple(f"{name}.csv" for name in REGIONS)),
                    ("data.tasks", FURTHER),
                    ("loading.mask_inputs", True),
                ),
            ),
        ),
    )
