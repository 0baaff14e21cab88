"""RDP: PromptReg's pyramid without prompts, the ablation of its Table 2.

Paper: Xie et al., PromptReg, MICCAI 2025, section 3.3; Wang et al., RDP, IEEE TMI 2024.
All as in configs/promptreg.py, but for the prompt generator and its two losses. RDP as
published has --model.slope 0.1.
Data: manifests and splits as for configs/promptreg.py.

    python train.py --config configs/rdp.py --data.manifests ... --out runs/rdp

Memory: not measured; the same command with --dry-run prints that of a step.
Time: not measured. Metric: not measured at this size.
"""

import dataclasses
import pathlib

from jaxreg.experiments import files
from jaxreg.experiments.config import Experiment
from jaxreg.models.rdp import RdpConfig


def get_config() -> Experiment:
    """Returns the experiment."""
    whole = files.load(pathlib.Path(__file__).with_name("promptreg.py"))
    return dataclasses.replace(
        whole,
        name="rdp",
        model=RdpConfig(),
        objective=dataclasses.replace(
            whole.objective, orthogonality_weight=0.0, task_weight=0.0
        ),
    )
