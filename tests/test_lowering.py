"""Every network and training step lowers for TPU and GPU, in forms made for them.

Programs are traced on abstract arrays and lowered; nothing is compiled or run. What is
looked for is read off the text of the lowered program.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export, lax

from jaxreg.losses.objective import Objective
from jaxreg.models import sam, unireg
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.models.promptreg import AS_PAPER, PromptReg, PromptRegConfig
from jaxreg.models.rdp import Rdp, RdpConfig
from jaxreg.models.unireg import UniReg, UniRegConfig
from jaxreg.models.unireg_rpn import UniRegRpn, UniRegRpnConfig
from jaxreg.training import step
from jaxreg.typing import Pair

SHAPE = (32, 16, 16)
ODD = (9, 11, 10)  # GradICON takes any size
KEY = jax.random.key(0)
ONE_WAY = {"inverse_consistency_weight": 0.0, "directions": "forward"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A network and what it is trained by.

    Attributes:
      loops: reads the repetitions that its definition has, see `loops_of`.
    """

    model: Any
    objective: Objective
    shape: tuple[int, int, int] = SHAPE
    loops: int = 0
    frozen_sam: bool = False


SMALL_SAM = sam.SamConfig((2, 2, 4, 4), 4)
CASES = {
    "gradicon": Case(
        GradIcon(GradIconConfig((2, 4), (4,), halvings=1, refinements=0)),
        Objective(),
        ODD,
    ),
    "gradicon in bfloat16": Case(
        GradIcon(
            GradIconConfig(
                (2, 4), (4,), halvings=0, refinements=0, precision="bfloat16"
            )
        ),
        Objective(similarity="lncc2"),
        ODD,
    ),
    "rdp": Case(Rdp(RdpConfig(1)), Objective("mse", **ONE_WAY), loops=1),
    "promptreg": Case(
        PromptReg(dataclasses.replace(AS_PAPER, channels=1, tasks=2)),
        Objective(
            "mind",
            smoothness_weight=0.1,
            orthogonality_weight=0.1,
            task_weight=0.1,
            **ONE_WAY,
        ),
        loops=1,
    ),
    "promptreg as released": Case(
        PromptReg(PromptRegConfig(channels=1, tasks=2)),
        Objective("nmi", **ONE_WAY),
        loops=1,
    ),
    "unireg with mind": Case(
        UniReg(UniRegConfig(features="mind")),
        Objective("ncc", smoothness_weight=1.0, **ONE_WAY),
        loops=1,
    ),
    "unireg with sam": Case(
        UniReg(UniRegConfig(features="sam")),
        Objective("box_ncc", smoothness_weight=1.0, **ONE_WAY),
        loops=1,
        frozen_sam=True,
    ),
    "same": Case(UniReg(unireg.SAME), Objective("ncc", **ONE_WAY), loops=1,
                 frozen_sam=True),
    "unireg-rpn": Case(UniRegRpn(UniRegRpnConfig(2)), Objective("box_ncc", **ONE_WAY)),
}  # fmt: skip
