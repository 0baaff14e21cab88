"""GradICON on the hippocampus set of the Medical Segmentation Decathlon (Task04).

Paper: Tian et al., GradICON, CVPR 2023, section 3; a network of 733,514 parameters for
grids of 32 x 48 x 32 voxels, which two CPU cores can train.
Data: the folder Task04_Hippocampus. Every fifth subject is held out (split val), and is
the fixed image for the next three. 41 of these 123 pairs choose the best weights, so
that scores of the split val are a little too good: with --loop.metric last nothing is
chosen and they are held out, or give a manifest whose column split has train, val and
test, and report `jaxreg evaluate --split test`.

    python train.py --config configs/hippocampus_gradicon.py \
        --data.manifests Task04_Hippocampus --out runs/hippocampus

Memory: not measured; the same command with --dry-run prints that of a step.
Time: 44 minutes for 2400 steps on two CPU cores with other jobs beside it.
Metric: Dice 72.5 % over the 123 pairs of the split val, 59.6 % where
scans are only resized.

With labels, from the weights of the first run (with one more run, of a network with a
refinement, Dice 81.7 %; see benchmarks/README.md):

    python train.py --config configs/hippocampus_gradicon.py \
        --data.manifests Task04_Hippocampus --out runs/hippocampus_dice \
        --train.start runs/hippocampus/weights --objective.dice_weight 3
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
        name="hippocampus_gradicon",
        paper="Tian et al., GradICON, CVPR 2023, section 3",
        licence="CC-BY-SA 4.0, as the data: Medical Segmentation Decathlon, Task04",
        model=GradIconConfig(
            (2, 16, 32, 32, 32), (16, 16, 32, 32), downsampled_steps=1, fullres_steps=0
        ),
        data=DataConfig(pairs_per_epoch=200, classes=(1, 2), validation_pairs=41),
        loading=Loading(shape=(32, 48, 32)),
        # Hippocampi all look one way here: no flips, no permutations.
        augment=Augmentation(permute=False, flip=False, noise=0.05, shared_noise=0.05),
        objective=Objective(similarity_options=(("sigma", 2),)),
        optimizer=OptimizerConfig(learning_rate=1e-3, schedule="cosine"),
        train=TrainConfig(batch=2),
        loop=LoopConfig(log_every=20, validate_every=2, image_every=5),
        stages=(Stage("stage_1", epochs=24),),
    )
