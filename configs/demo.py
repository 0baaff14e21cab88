"""A network for synthetic anatomies: no data needed, minutes on a laptop.

Four kinds of pair take turns: two subjects or one, in one contrast or in two. The
similarity is MIND, which bears a change of contrast.

    python train.py --config configs/demo.py --out runs/demo

Another start for an own configuration: `configs/finetune.py`, with own scans.
"""

from jaxreg.data.augment import Augmentation
from jaxreg.data.pipeline import Loading
from jaxreg.experiment import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    return Experiment(
        name="demo",
        paper="data in the manner of Hoffmann et al., SynthMorph, IEEE TMI 2022",
        model=GradIconConfig((2, 8, 16, 16), (8, 8, 16), halvings=1, refinements=0),
        data=DataConfig(
            synthetic=("inter_mono", "inter_multi", "intra_mono", "intra_multi"),
            pairs_per_epoch=64,
            validation_pairs=8,
        ),
        loading=Loading(shape=(24, 24, 24)),
        augment=Augmentation(noise=0.02),
        objective=Objective(
            similarity="mind", similarity_options=(("radius", 1), ("dilation", 1))
        ),
        optimizer=OptimizerConfig(learning_rate=2e-3, schedule="cosine"),
        train=TrainConfig(batch=2),
        loop=LoopConfig(validate_every=2, image_every=2),
        stages=(Stage("stage_1", epochs=10),),
    )
