"""Evaluates a list on one device and on all; prints both tables' rows as JSON.

Argument: a list of pairs, one of which cannot be read.
"""

import dataclasses
import json
import pathlib
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import pair_list
from jaxreg.evaluation import run
from jaxreg.evaluation.sharing import Share
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import options as options_lib
from jaxreg.space.transform import Displacement, Transform
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo


@dataclasses.dataclass(frozen=True)
class Bending(RegistrationModel):
    """Depends on both images, and on a mean over all that is seen at once."""

    def apply(self, variables, moving, fixed, **_):
        step = (moving - fixed) * variables["params"]["scale"] / (1 + jnp.mean(moving))
        return Prediction(Transform((Displacement(step.repeat(3, -1)),))), {}


def main(listed: pathlib.Path) -> None:
    warnings.simplefilter("ignore")
    variables = {"params": {"scale": np.full((), 0.3, np.float32)}}
    rule = {"shape": [9, 8, 10], "orientation": "any"}
    bundle = bundle_lib.Bundle(variables, "gradicon", {}, rule, "a test", "none")
    model = zoo.LoadedModel("bending", Bending(), variables, bundle)
    options = options_lib.Options(io_iterations=2, io_lr=1e-2, io_sim="mind")
    tables, saved = [], []
    for devices in (jax.local_devices()[:1], jax.local_devices()):
        counts: list[int] = []
        share = Share(keep=lambda r, c=counts: c.append(len(r.rows)), devices=devices)
        found = run.evaluate(
            pair_list.read_pairs(listed),
            model,
            options,
            with_optimisation=True,
            share=share,
        )
        tables.append([dataclasses.asdict(row) for row in found.rows])
        saved.append(counts)
    print(json.dumps({"tables": tables, "saved": saved}))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
