"""SAM as its released code trains it, on unlabelled CT of any part of the body.

Paper: Yan et al., SAM: Self-supervised learning of pixel-wise anatomical embeddings in
radiological images, IEEE TMI 2022, section III. The released configuration for several
data sets: 20,000 steps of 3 volumes, two views of 32 x 96 x 96 voxels of 2 mm each. It
leaves the blur of views out, as this does.
Data: a manifest of CT scans. Every fifth scan validates (val) and chooses the best
weights by the loss, unless the manifest has a column split; test scans do neither.

    python train.py --config configs/sam.py --data.manifests scans.csv --out runs/sam

Memory: not measured; the same command with --dry-run prints that of a step.
Time: not measured. Metric: not measured.
"""

from jaxreg.data.sam_views import ViewConfig
from jaxreg.experiments.sam_config import RELEASED_RULE, SamExperiment, SamTrain
from jaxreg.losses.contrastive import ContrastiveConfig
from jaxreg.models.sam import SamConfig
from jaxreg.training.loop import LoopConfig


def get_config() -> SamExperiment:
    """Returns the experiment."""
    return SamExperiment(
        name="sam",
        paper="Yan et al., SAM, IEEE TMI 2022, section III",
        model=SamConfig(),
        views=ViewConfig(blur_mm=0.0),
        contrast=ContrastiveConfig(),
        optimizer=RELEASED_RULE,
        train=SamTrain(batch=3, steps=20_000, steps_per_epoch=1000),
        loop=LoopConfig(validate_every=1, image_every=1, metric="loss"),
    )
