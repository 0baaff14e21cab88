"""A network for synthetic anatomies, from which an own configuration may start.

Paper: data in the manner of Hoffmann et al., SynthMorph, IEEE TMI 2022. Four kinds of
pair take turns: two subjects or one, in one contrast or in two, under deformations of
up to a quarter of the image. The similarity is LNCC^2, which bears a change of
contrast, and labels are compared besides, as SynthMorph does.
Data: none needed; the anatomies are drawn.

    python train.py --config configs/demo.py --out runs/demo

Memory: not measured; the same command with --dry-run prints that of a step.
Time: about 3 minutes of processor time (one run).
Metric: validation Dice 0.705 after 320 steps, 0.604 before (that run), of 16 pairs of
other subjects, on which nothing was trained and which choose nothing, since the last
weights are kept.

Another start for an own configuration: `configs/finetune.py`, with own scans.
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
        name="demo",
        paper="data in the manner of Hoffmann et al., SynthMorph, IEEE TMI 2022",
        model=GradIconConfig(
            (2, 16, 32, 32), (16, 16, 32), downsampled_steps=1, fullres_steps=0
        ),
        data=DataConfig(
            synthetic=("inter_mono", "inter_multi", "intra_mono", "intra_multi"),
            synthetic_deformation=6.0,
            pairs_per_epoch=64,
            validation_pairs=16,
        ),
        loading=Loading(shape=(24, 24, 24)),
        augment=Augmentation(noise=0.02),
        objective=Objective(
            similarity="lncc2", similarity_options=(("sigma", 2),), dice_weight=2.0
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, schedule="cosine"),
        train=TrainConfig(batch=2),
        loop=LoopConfig(validate_every=2, image_every=2, metric="last"),
        stages=(Stage("stage_1", epochs=10),),
    )
