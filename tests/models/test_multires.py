"""Which map acts first, and what each step sees."""

import jax.numpy as jnp
import numpy as np

from jaxreg.models import multires
from jaxreg.nn.conv import api
from jaxreg.space import fields, sampling
from jaxreg.space.transform import Displacement

SHAPE = (6, 7, 5)


def image(seed):
    values = np.random.default_rng(seed).random((2, *SHAPE, 1))
    return jnp.asarray(values, jnp.float32)


def recorded(field_of, seen):
    """A field network that notes its inputs."""

    def network(moving, fixed):
        seen.append((moving, fixed))
        return field_of(moving.shape[1:4])

    return network


def constant(*shift):
    return lambda shape: jnp.broadcast_to(jnp.asarray(shift), (2, *shape, 3))


def stretch(factor):
    """The field of x to factor x, along the first axis."""

    def field_of(shape):
        x = sampling.identity(shape) * jnp.asarray([factor - 1, 0.0, 0.0])
        return jnp.broadcast_to(x, (2, *shape, 3))

    return field_of


def test_field_step_adds_the_field():
    transform = multires.field_step(recorded(constant(0.1, 0.0, -0.2), []))(
        image(0), image(1)
    )
    points = jnp.full((1, 3, 3), 0.5)
    np.testing.assert_allclose(
        transform.map_points(points),
        np.broadcast_to([0.6, 0.5, 0.3], (2, 3, 3)),
        atol=1e-6,
    )


def test_the_second_map_meets_the_point_first():
    network = multires.two_step(
        multires.field_step(recorded(stretch(0.5), [])),
        multires.field_step(recorded(constant(0.2, 0.0, 0.0), [])),
    )
    transform = network(image(0), image(1))
    mapped = transform.map_points(jnp.full((1, 1, 3), 0.4))
    # first(second(x)) = 0.5 (0.4 + 0.2), not 0.5 * 0.4 + 0.2
    np.testing.assert_allclose(mapped[:, 0, 0], [0.3, 0.3], atol=1e-6)
    assert [type(step) for step in transform.steps] == [Displacement] * 2


def test_the_second_step_sees_the_moving_image_warped():
    seen = []
    first = multires.field_step(recorded(stretch(0.7), seen))
    second = multires.field_step(recorded(constant(0.0, 0.0, 0.0), seen))
    moving, fixed = image(0), image(1)
    multires.two_step(first, second)(moving, fixed)
    np.testing.assert_array_equal(seen[0][0], moving)
    points = sampling.identity(SHAPE) + stretch(0.7)(SHAPE)
    warped = fields.warp(moving, points, outside="edge")
    np.testing.assert_allclose(seen[1][0], warped, atol=1e-6)
    np.testing.assert_array_equal(seen[1][1], fixed)


def test_downsample_pools_both_images_and_keeps_the_coordinates():
    seen = []
    inner = multires.field_step(recorded(stretch(0.7), seen))
    moving, fixed = image(0), image(1)
    transform = multires.downsample(inner)(moving, fixed)
    np.testing.assert_array_equal(seen[0][0], api.average_pool2(moving))
    np.testing.assert_array_equal(seen[0][1], api.average_pool2(fixed))
    (step,) = transform.steps
    assert step.field.shape[1:4] == (3, 4, 3)  # rounded up
    # Corners are 0 and 1 at every resolution, so the map is the same function.
    wanted = sampling.identity(SHAPE) + stretch(0.7)(SHAPE)
    np.testing.assert_allclose(transform.on_grid(SHAPE), wanted, atol=1e-6)


def test_coarse_to_fine():
    seen = []
    network = multires.field_step(recorded(constant(0.1, 0.0, 0.0), seen))
    for shift in (0.02, 0.003):
        second = multires.field_step(recorded(constant(shift, 0.0, 0.0), seen))
        network = multires.two_step(multires.downsample(network), second)
    transform = network(image(0), image(1))
    # In order of execution: a quarter, half, full; the finest acts on the point first.
    assert [moving.shape[1:4] for moving, _ in seen] == [(2, 2, 2), (3, 4, 3), SHAPE]
    first = [float(step.field[0, 0, 0, 0, 0]) for step in transform.steps]
    np.testing.assert_allclose(first, [0.003, 0.02, 0.1], rtol=1e-6)
    mapped = transform.map_points(jnp.full((1, 1, 3), 0.5))
    np.testing.assert_allclose(mapped[0, 0], [0.623, 0.5, 0.5], atol=1e-6)
