"""SAM on the hippocampus set of the Medical Segmentation Decathlon (Task04).

Paper: Yan et al., SAM, IEEE TMI 2022, section III; small views and a network for two
CPU cores, the distances scaled to scans of about 35 x 51 x 35 mm, voxels of 1 mm.
Data: Task04_Hippocampus, no labels. Every fifth subject is held out (split val); twelve
of them choose the best weights by the loss, and do not count as held out.

    python train.py --config configs/hippocampus_sam.py \
        --data.manifests Task04_Hippocampus --out runs/hippocampus_sam

Memory: not measured; the same command with --dry-run prints that of a step.
Time: 16 minutes of processor time for 1500 steps, all compilation included.
Metric: see "Points found again, SAM against MIND" in benchmarks/README.md.
"""

from jaxreg.data.sam_views import ViewConfig
from jaxreg.experiments.sam_config import SamData, SamExperiment, SamTrain
from jaxreg.losses.contrastive import ContrastiveConfig
from jaxreg.models.sam import SamConfig
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig


def get_config() -> SamExperiment:
    """Returns the experiment."""
    return SamExperiment(
        name="hippocampus_sam",
        paper="Yan et al., SAM, IEEE TMI 2022, section III",
        licence="CC-BY-SA 4.0, as the data: Medical Segmentation Decathlon, Task04",
        model=SamConfig(channels=(8, 16, 32, 32), embedding=32),
        data=SamData(validation_volumes=12),
        views=ViewConfig(
            shape=(16, 32, 32),
            spacing_mm=1.0,
            least_overlap=(5, 10, 10),
            gamma=1.5,
            noise=20.0,
            blur_mm=1.0,
            body_above=None,
        ),
        contrast=ContrastiveConfig(
            candidates=500,
            positives=100,
            hard=500,
            negatives=200,
            fine_positive_mm=1.5,
            fine_ignore_mm=1.5,
            coarse_positive_mm=8.0,
            coarse_positive_d_mm=(4.0, 4.0),
            coarse_ignore_mm=4.0,
            coarse_global=60,
            temperature=0.1,
        ),
        optimizer=OptimizerConfig(
            "sgd", learning_rate=0.05, momentum=0.9, weight_decay=1e-4,
            schedule="cosine", warm_up=50, warm_up_from=0.001,
        ),
        train=SamTrain(batch=3, steps=1500, steps_per_epoch=250),
        loop=LoopConfig(
            log_every=25, validate_every=1, image_every=0, keep_latest=1, metric="loss"
        ),
    )  # fmt: skip
