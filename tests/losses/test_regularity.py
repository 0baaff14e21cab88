import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.losses import regularity
from jaxreg.space import sampling
from jaxreg.space.transform import Affine, Displacement, Transform

SHAPE = (6, 5, 7)
few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**31)


def random_affine(rng, size=0.3):
    matrix = np.eye(4)
    matrix[:3] += size * rng.standard_normal((3, 4))
    return matrix


def noise(seed=0, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal((1, *shape, 3)).astype(dtype)


def test_points_are_the_grid_plus_noise_scaled_by_the_last_axis():
    jitter = noise()
    points = regularity.gradicon_points(SHAPE, jitter)
    assert points.shape == (1, 3, 3, 4, 3)
    i = (2, 4, 6)
    expected = np.asarray(i) / (np.asarray(SHAPE) - 1) + 2 * jitter[(0, *i)] / SHAPE[-1]
    np.testing.assert_allclose(points[0, 1, 2, 3], expected, rtol=1e-5)


def test_dense_points():
    jitter = noise()
    points = regularity.gradicon_points(SHAPE, jitter, stride=1, noise_scale=1.0)
    expected = sampling.identity(SHAPE) + jitter / SHAPE[-1]
    np.testing.assert_allclose(points, expected, atol=1e-7)


def test_points_check_the_noise():
    with pytest.raises(ValueError, match="expected"):
        regularity.gradicon_points(SHAPE, noise(shape=(5, 6, 7)))


@few
@given(seeds)
def test_gradicon_of_linear_maps_is_the_frobenius_norm(seed):
    rng = np.random.default_rng(seed)
    outer, inner = random_affine(rng), random_affine(rng)
    expected = np.sum((np.eye(3) - (outer @ inner)[:3, :3]) ** 2) / 3
    with jax.enable_x64(True):
        points = regularity.gradicon_points(SHAPE, jnp.asarray(noise(1), jnp.float64))
        value = regularity.gradicon(Affine(outer), Affine(inner), points)
    np.testing.assert_allclose(value, expected, rtol=1e-8)


def test_gradicon_of_linear_maps_in_float32():
    rng = np.random.default_rng(2)
    outer, inner = (random_affine(rng).astype(np.float32) for _ in range(2))
    expected = np.sum((np.eye(3) - (outer @ inner)[:3, :3]) ** 2) / 3
    points = regularity.gradicon_points(SHAPE, noise(1))
    value = jax.jit(regularity.gradicon, static_argnums=(0, 1))(
        Transform((Affine(jnp.asarray(outer)),)).map_points,
        Transform((Affine(jnp.asarray(inner)),)).map_points,
        points,
    )
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, expected, rtol=1e-3)


@few
@given(seeds)
def test_gradicon_of_a_map_and_its_inverse_is_zero(seed):
    matrix = random_affine(np.random.default_rng(seed), 0.1)
    points = regularity.gradicon_points(SHAPE, noise(seed))
    inverse = np.linalg.inv(matrix).astype(np.float32)
    value = regularity.gradicon(
        Affine(jnp.asarray(matrix, jnp.float32)), Affine(jnp.asarray(inverse)), points
    )
    assert 0 <= value < 1e-5  # rounding, divided by delta and squared


def test_gradicon_measures_the_order_forward_after_backward():
    points = regularity.gradicon_points(SHAPE, noise(3))
    seen = []

    def note(name):
        def identity(x):
            seen.append((name, x.shape))
            return x

        return identity

    assert regularity.gradicon(note("forward"), note("backward"), points) == 0
    stacked = (*points.shape[:3], 4 * points.shape[3], 3)
    assert seen == [("backward", stacked), ("forward", stacked)]


def test_gradicon_broadcasts_one_set_of_points_over_the_batch():
    rng = np.random.default_rng(4)
    fields = (0.05 * rng.standard_normal((2, 2, *SHAPE, 3))).astype(np.float32)
    points = regularity.gradicon_points(SHAPE, noise(5))
    together = regularity.gradicon(
        Displacement(fields[0]), Displacement(fields[1]), points
    )
    single = [
        regularity.gradicon(
            Displacement(fields[0, i : i + 1]), Displacement(fields[1, i : i + 1]),
            points,
        )
        for i in range(2)
    ]  # fmt: skip
    np.testing.assert_allclose(together, np.mean(single), rtol=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("dense", [False, True])
def test_gradicon_matches_icon_registration(icon, dense):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(6)
    displacements = (0.1 * rng.standard_normal((2, 1, *SHAPE, 3))).astype(np.float32)
    tensors = [
        torch.tensor(np.moveaxis(u, -1, 1), requires_grad=True) for u in displacements
    ]

    class Known(torch.nn.Module):
        calls = 0

        def forward(self, image_a, image_b):
            self.calls += 1
            return tensors[(self.calls - 1) % 2]

    wrapper = icon.losses.GradientICON if dense else icon.losses.GradientICONSparse
    model = wrapper(icon.FunctionFromVectorField(Known()), icon.losses.ssd, lmbda=1.0)
    model.assign_identity_map([1, 1, *SHAPE])
    image = torch.zeros(1, 1, *SHAPE)
    torch.manual_seed(7)
    jitter = np.moveaxis(torch.randn(1, 3, *SHAPE).numpy(), 1, -1)
    torch.manual_seed(7)
    expected = model(image, image).inverse_consistency_loss
    gradients = torch.autograd.grad(expected, tensors)

    def loss(fields, jitter):
        options = {"stride": 1, "noise_scale": 1.0} if dense else {}
        points = regularity.gradicon_points(SHAPE, jitter, **options)
        return regularity.gradicon(
            Displacement(fields[0]), Displacement(fields[1]), points
        )

    value, gradient = jax.jit(jax.value_and_grad(loss))(
        jnp.asarray(displacements), jitter
    )
    np.testing.assert_allclose(value, expected.item(), rtol=1e-4)
    for ours, theirs in zip(gradient, gradients, strict=True):
        theirs = np.moveaxis(theirs.numpy(), 1, -1)
        assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)


def test_diffusion_of_a_linear_field():
    matrix = np.random.default_rng(8).standard_normal((3, 3))
    field = sampling.identity(SHAPE) @ jnp.asarray(matrix.T, jnp.float32)
    expected = np.sum(matrix**2) / 3
    np.testing.assert_allclose(regularity.diffusion(field), expected, rtol=1e-5)


def test_diffusion_averages_over_the_batch():
    field = sampling.identity(SHAPE)
    both = jnp.concatenate([field, 2 * field])
    np.testing.assert_allclose(regularity.diffusion(both), 2.5, rtol=1e-5)


def test_an_axis_of_one_voxel_adds_nothing():
    x = np.asarray(sampling.identity((6, 1, 7)), np.float32)
    np.testing.assert_allclose(regularity.diffusion(x), 2 / 3, rtol=1e-5)
    assert regularity.folding(-2 * x) == 0


@pytest.mark.parametrize(
    ("scale", "expected"), [(1.0, 0.0), (0.5, 0.0), (0.05, 0.05), (-1.0, 1.1)]
)
def test_folding_is_what_the_determinant_lacks(scale, expected):
    """A map that scales one axis has this determinant everywhere."""
    x = np.asarray(sampling.identity(SHAPE), np.float64)
    displacement = x * np.array([0, scale - 1, 0])
    found = regularity.folding(jnp.asarray(displacement, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)


def test_one_folded_point_is_seen_by_the_cells_behind_it():
    displacement = np.zeros((1, 5, 5, 5, 3), np.float32)
    displacement[0, 2, 2, 2, 0] = 1.5 / 4  # past its neighbour
    # In four cells the edge between the two, at two corners, has turned: 1 - 1.5.
    found = regularity.folding(jnp.asarray(displacement))
    np.testing.assert_allclose(found, 4 * 2 * 0.6 / (4**3 * 8), rtol=1e-5)


def test_a_shear_of_any_size_folds_nothing():
    x = np.asarray(sampling.identity(SHAPE))
    sheared = np.zeros_like(x)
    sheared[..., 0] = 3 * x[..., 1]
    assert regularity.folding(jnp.asarray(sheared)) == 0


@pytest.mark.golden
def test_cropped_smoothness_matches_reference(golden):
    g = golden("unireg_rpn_small")
    flow = np.moveaxis(g["flow"], 1, -1)
    found = regularity.smoothness(flow, cropped=True)
    np.testing.assert_allclose(found, g["loss/grad_l2"], rtol=1e-5)
    assert abs(regularity.smoothness(flow) / found - 1) > 1e-3


def test_diffusion_of_a_shear_is_that_of_space():
    """A field of 3 mm over 40 mm costs the same however the grid samples it."""
    for shape, lengths in (((5, 6, 7), (1.0, 2.0, 0.5)), ((9, 4, 12), (1.0, 2.0, 0.5))):
        place = np.asarray(sampling.identity(shape)) * lengths
        field = np.zeros_like(place)
        field[..., 0] = 0.3 * place[..., 1] - 0.2 * place[..., 2]
        found = regularity.diffusion(jnp.asarray(field), lengths)
        assert float(found) == pytest.approx((0.3**2 + 0.2**2) / 3, rel=1e-4)
