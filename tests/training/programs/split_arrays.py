"""Samplers, filters and layers of volumes split over four devices and whole, as JSON.

Standard output: by name, the L2 distance to the whole volume's result and gradients,
the larger one, relative to these; and the types of `kernel_gradient_types`. Run in its
own process, see `same_gradient.py`.
"""

import json
import re

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)

import jax.numpy as jnp
import numpy as np

from jaxreg.nn.conv import api
from jaxreg.space import filters, sampling
from jaxreg.training import parallel
from jaxreg.xla import splitting

N, D, H, W = 2, 11, 7, 6  # four devices have unequal shares of D, and of H
FEATURES = 16


def functions(rng):
    """Returns name: (function, its arrays, each N D H W C)."""

    def array(*shape):
        return rng.uniform(size=shape).astype("f4")

    image, field = array(N, D, H, W, 1), array(N, D, H, W, 3)
    features = array(N, D, H, W, FEATURES)
    points = array(N, 9, 5, 6, 3) * 1.4 - 0.2
    bands = [filters.box_matrix(n, 2) for n in (D, H, W)]

    def blurred(image):
        return jnp.moveaxis(
            filters.along_axes(jnp.moveaxis(image, -1, 1), bands), 1, -1
        )

    def sample(values, points, outside="edge"):
        return sampling.sample(values, points, outside=outside)

    return {
        "sample": (sample, (field, points)),
        "sample zeros": (lambda *a: sample(*a, "zeros"), (field, points)),
        "sample one for all": (sample, (field[:1], points)),
        "sample at one set": (sample, (field, points[:1])),
        "sample features": (sample, (features, points)),
        "blur": (blurred, (image,)),
        "resize": (lambda x: sampling.resize_aligned(x, (17, 9, 8)), (field,)),
        "shrink": (lambda x: sampling.resize_half_pixel(x, (5, 4, 3)), (field,)),
        "pool": (api.average_pool2, (features,)),
        "edges": (lambda x: splitting.edged(x, 1, 1), (field,)),
        "double": (api.upsample2, (features,)),
        "repeat": (api.repeat2, (features,)),
        "unfold": (api.depth_to_space, (features,)),
        "fold": (api.space_to_depth, (features[:, :10, :6],)),
        "largest": (api.max_pool2, (features[:, :10, :6],)),
    }


def kernel_gradient_types() -> list[str]:
    """Returns in which types a bfloat16 network's kernel gradient is summed.

    Of the program before it is compiled: XLA's CPU backend widens bfloat16 by itself.
    """
    rng = np.random.default_rng(1)
    kernel = rng.normal(size=(3, 3, 3, FEATURES, 4)).astype("f4")
    arrays = tuple(rng.normal(size=(N, D, H, W, c)).astype("f4") for c in (FEATURES, 4))

    def step(kernel, arrays):
        x, weight = (splitting.along(a.astype(jnp.bfloat16), 1) for a in arrays)

        def loss(kernel):
            narrow, bias = kernel.astype(jnp.bfloat16), jnp.zeros(4, jnp.bfloat16)
            parts = (x[..., :3], x[..., 3:])
            y = api.conv3(parts, narrow, bias, form="native")
            return jnp.sum((y * weight).astype(jnp.float32))

        return kernel, jax.grad(loss)(kernel)

    compiled, placed = prepared(step, 4, kernel, arrays)
    text = compiled.lower(*placed).as_text()
    return re.findall(r"stablehlo.convolution.*-> tensor<3x3x3x\d+x4x(\w+)>", text)


def prepared(step, count, state, arrays):
    """Returns a step for so many devices, and its arguments on them."""
    devices = jax.devices()[:count]
    layout = parallel.make_layout("mesh", space=count, devices=devices)
    compiled = parallel.compile_step(step, layout, donate=False)
    # On one "data" device, whose share is all of the batch.
    return compiled, [parallel.place_state(a, layout) for a in (state, arrays)]


def results(step, count, arrays):
    """Returns the arrays that a step gives on so many devices."""
    compiled, placed = prepared(step, count, (), arrays)
    return jax.tree.leaves(jax.tree.map(np.asarray, compiled(*placed)[1]))


def folded_forms() -> list[bool]:
    """Whether TPU's form is taken on one device and where volumes are split."""
    seen = []

    def step(state, arrays):
        seen.append(api.is_folded("folded", (64, 64, 64)))
        return state, (arrays, arrays)

    for count in (1, 4):
        results(step, count, (np.zeros((N, D, H, W, 1), np.float32),))
    return seen


def distance(a, b) -> float:
    """L2 distance, relative to the first."""
    return float(np.linalg.norm(a - b) / np.linalg.norm(a))


def main() -> None:
    """Prints one JSON object."""
    rng = np.random.default_rng(0)
    found = {}
    for name, (function, arrays) in functions(rng).items():
        shape = jax.eval_shape(function, *arrays).shape
        weight = rng.normal(size=shape).astype("f4")

        def loss(arrays, function=function, weight=weight):
            result = splitting.along(function(*arrays), 1)
            return jnp.sum(result * weight), result

        def step(state, arrays, loss=loss):
            arrays = tuple(splitting.along(a, 1) for a in arrays)
            (_, result), slopes = jax.value_and_grad(loss, has_aux=True)(arrays)
            return state, (result, slopes)

        given = [results(step, count, arrays) for count in (1, 4)]
        found[name] = max(map(distance, *given))
    print(json.dumps({
        "distances": found,
        "types": kernel_gradient_types(),
        "folded": folded_forms(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
