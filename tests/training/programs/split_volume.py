"""The map of one pair of volumes, split over devices and whole, as JSON.

Standard output: by number of devices, the largest difference from the whole's map, the
bytes that each device needs for intermediate results, and the depths of the arrays that
convolutions give. Run in its own process, see `same_gradient.py`.
"""

import json
import re

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import numpy as np

from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.training import parallel
from jaxreg.typing import Pair

SHAPE = (31, 24, 24)  # neither 2 nor 4 divides the depth
MODEL = GradIcon(GradIconConfig((2, 8), (8,), 1, 0, form="native"))


def program(layout):
    """Returns the compiled ``map(variables, batch)``, N D H W 3."""

    def map_of(variables, batch):
        pair = parallel.constrain(Pair(**batch), layout)
        prediction, _ = MODEL.apply(variables, pair.moving, pair.fixed)
        return prediction.transform.on_grid(SHAPE)

    def step(variables, batch):
        return variables, map_of(variables, batch)

    return parallel.compile_step(step, layout, donate=False)


def main() -> None:
    """Prints one JSON object."""
    rng = np.random.default_rng(0)
    images = {
        name: rng.uniform(size=(1, *SHAPE, 1)).astype("f4")
        for name in ("moving", "fixed")
    }
    variables = jax.tree.map(
        lambda a: np.float32(a + 0.05 * rng.normal(size=a.shape)),
        MODEL.init(jax.random.key(0)),
    )
    whole, found = None, {}
    for space in (1, 2, 4):
        layout = parallel.make_layout(
            "mesh", space=space, devices=jax.devices()[:space]
        )
        arguments = (
            parallel.place_state(variables, layout),
            parallel.place_batch(images, layout),
        )
        compiled = program(layout).lower(*arguments).compile()
        points = np.asarray(compiled(*arguments)[1])
        whole = points if whole is None else whole
        text = compiled.as_text()
        found[space] = {
            "difference": float(np.abs(points - whole).max()),
            "moved": float(np.abs(np.diff(points, axis=1)).max()),
            "bytes": compiled.memory_analysis().temp_size_in_bytes,
            "depths": [
                int(depth)
                for depth in re.findall(r"= f32\[1,(\d+),\d+.*? convolution\(", text)
            ],
            "exchanges": text.count(" collective-permute("),
        }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
