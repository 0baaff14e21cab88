import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import interpolate, ndimage

from jaxreg.losses import similarity
from jaxreg.space import filters

SHAPE = (9, 8, 10)
MEASURES = {
    "lncc": similarity.lncc,
    "lncc2": similarity.squared_lncc,
    "mind": similarity.mind_ssc,
}
few = settings(max_examples=8, deadline=None)
seeds = st.integers(0, 2**31)


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def random_image(seed, shape=SHAPE, batch=1, smooth=1.0):
    noise = np.random.default_rng(seed).random((batch, *shape, 1))
    image = ndimage.gaussian_filter(noise, (0, smooth, smooth, smooth, 0))
    image -= image.min()
    return (image / image.max()).astype(np.float32)


def relative_l2(value, reference):
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


def check(value, reference):
    assert value.dtype == np.float32
    # 1 - mean(.) of a mean near 1 loses digits: the absolute part is float32's step.
    np.testing.assert_allclose(value, reference, rtol=1e-5, atol=2e-7)


@pytest.mark.golden
@pytest.mark.parametrize("name", MEASURES)
def test_measure_matches_reference(golden, name):
    g = golden("gradicon_losses")
    a, b, mask = (channels_last(g[k]) for k in ("A", "B", "mask_B"))
    measure = jax.jit(MEASURES[name])
    check(measure(a, b), g[name])
    check(measure(a, b, mask=mask), g[f"{name}_masked"])
    check(measure(a, b, mask=np.zeros_like(mask)), g[f"{name}_empty_mask"])
    if np.isfinite(g[f"{name}_f64"]):  # NaN says: not available
        check(measure(a, b), g[f"{name}_f64"])


@pytest.mark.golden
@pytest.mark.parametrize("name", MEASURES)
def test_measure_of_a_batch_matches_reference(golden, name):
    g = golden("gradicon_losses")
    a, b, mask = (channels_last(g[f"batch_{k}"]) for k in ("A", "B", "mask_B"))
    measure = jax.jit(MEASURES[name])
    check(measure(a, b), g[f"{name}_batch"])
    check(measure(a, b, mask=mask), g[f"{name}_batch_masked"])


@pytest.mark.golden
@pytest.mark.parametrize("name", MEASURES)
def test_gradient_matches_reference(golden, name):
    g = golden("gradicon_losses")
    a, b = channels_last(g["A"]), channels_last(g["B"])
    gradient = jax.jit(jax.grad(MEASURES[name]))(a, b)
    assert relative_l2(gradient, channels_last(g[f"{name}_gradA"])) < 1e-4


@pytest.mark.golden
def test_options_match_reference(golden):
    g = golden("gradicon_losses")
    a, b = channels_last(g["A"]), channels_last(g["B"])
    check(similarity.lncc(a, b, sigma=3), g["lncc_sigma3"])
    check(similarity.mind_ssc(a, b, radius=1, dilation=3), g["mind_r1_d3"])


@pytest.mark.golden
def test_global_measures_match_reference(golden):
    g = golden("gradicon_losses")
    a, b, batch_a, batch_b = (
        channels_last(g[k]) for k in ("A", "B", "batch_A", "batch_B")
    )
    check(similarity.ncc(a, b), g["ncc"])
    check(similarity.ncc(batch_a, batch_b), g["ncc_batch"])
    check(similarity.mse(a, b), g["ssd"])


@pytest.mark.golden
def test_maps_match_reference(golden):
    g = golden("gradicon_losses")
    a, b = channels_last(g["A"]), channels_last(g["B"])
    np.testing.assert_allclose(
        similarity.gaussian_blur(a, 5), channels_last(g["blur_A"]), rtol=1e-5, atol=1e-6
    )
    # Near-flat windows divide float32 rounding by the 1e-5 in the denominator.
    np.testing.assert_allclose(
        similarity.lncc_map(a, b), channels_last(g["lncc_map"]), atol=1e-4
    )
    np.testing.assert_allclose(
        filters.mind_descriptor(channels_last(g["mind_image"])),
        channels_last(g["mind_descriptor"]),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.golden
def test_blur_of_an_impulse_is_the_reference_kernel(golden):
    kernel = golden("gradicon_losses")["kernel1d_sigma5"]
    n = 2 * len(kernel) + 1
    impulse = np.zeros((1, n, 1, 1, 1), np.float32)
    impulse[0, n // 2] = 1.0
    centre = kernel[len(kernel) // 2]  # the other axes have one voxel, zeros around it
    blurred = np.asarray(similarity.gaussian_blur(impulse, 5))[0, :, 0, 0, 0]
    expected = np.zeros(n)
    start = n // 2 - len(kernel) // 2
    expected[start : start + len(kernel)] = kernel * centre**2
    np.testing.assert_allclose(blurred, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("sigma", [1, 2, 5])
def test_blur_matches_scipy(sigma):
    image = random_image(0, batch=2, smooth=0.5)
    image = np.concatenate([image, image[:, ::-1]], -1)
    expected = ndimage.gaussian_filter(
        image.astype(np.float64), sigma, mode="constant", axes=(1, 2, 3), truncate=2.0
    )
    np.testing.assert_allclose(
        similarity.gaussian_blur(image, sigma), expected, rtol=1e-5, atol=1e-7
    )


def test_box_mean_matches_scipy():
    volumes = random_image(1, smooth=0.3)[..., 0]
    matrices = [filters.box_matrix(n, 2) for n in SHAPE]
    np.testing.assert_allclose(
        filters.along_axes(jnp.asarray(volumes), matrices)[0],
        ndimage.uniform_filter(volumes[0].astype(np.float64), 5, mode="nearest"),
        rtol=1e-5,
    )


def test_blur_refuses_a_fractional_sigma():
    with pytest.raises(ValueError, match="positive"):
        similarity.gaussian_blur(random_image(0), 2.5)


@pytest.mark.parametrize("name", similarity.SIMILARITIES)
def test_shapes_are_checked(name):
    image = random_image(0)
    measure = similarity.SIMILARITIES[name]
    with pytest.raises(ValueError, match="shape"):
        measure(image, image[:, 1:])
    with pytest.raises(ValueError, match="mask"):
        measure(image, image, mask=image[:, 1:])


@pytest.mark.parametrize("name", similarity.SIMILARITIES)
def test_constant_images_give_finite_values_and_gradients(name):
    measure = jax.jit(jax.value_and_grad(similarity.SIMILARITIES[name]))
    image, flat = random_image(0), np.full((1, *SHAPE, 1), 0.3, np.float32)
    for warped, target in (
        (flat, image),
        (image, flat),
        (flat, flat),
        (0 * flat, flat),
    ):
        value, gradient = measure(warped, target)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


# A full mask is not box_ncc without one: the mask ends where the image does.
@pytest.mark.parametrize("name", sorted(set(similarity.SIMILARITIES) - {"box_ncc"}))
def test_full_mask_equals_no_mask_and_any_nonzero_value_counts(name):
    measure = similarity.SIMILARITIES[name]
    a, b = random_image(1, batch=2), random_image(2, batch=2)
    mask = np.full((2, *SHAPE, 1), 7, np.int16)
    mask[:, ::2] = -1
    np.testing.assert_allclose(measure(a, b, mask=mask), measure(a, b), rtol=1e-5)


@pytest.mark.parametrize("name", ["lncc", "lncc2", "mse", "ncc", "nmi"])
def test_mask_covers_every_channel(name):
    measure = similarity.SIMILARITIES[name]
    a, b = random_image(1), random_image(2)
    mask = np.zeros((1, *SHAPE, 1), bool)
    mask[:, 2:6, 1:7] = True
    both = measure(np.concatenate([a, b], -1), np.concatenate([b, b], -1), mask=mask)
    single = (measure(a, b, mask=mask) + measure(b, b, mask=mask)) / 2
    np.testing.assert_allclose(both, single, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ncc", "nmi", "mse"])
def test_global_measures_ignore_voxels_outside_the_mask(name):
    measure = similarity.SIMILARITIES[name]
    a, b = random_image(1), random_image(2)
    mask = np.zeros((1, *SHAPE, 1), bool)
    mask[:, 2:6, 1:7] = True
    inside = measure(a[:, 2:6, 1:7], b[:, 2:6, 1:7])
    np.testing.assert_allclose(measure(a, b, mask=mask), inside, rtol=1e-5)


def test_ncc_matches_numpy():
    a, b = random_image(3), random_image(4)
    expected = 1 - np.corrcoef(a.ravel(), b.ravel())[0, 1]
    np.testing.assert_allclose(similarity.ncc(a, b), expected, rtol=1e-5)


@few
@given(seeds, seeds)
def test_lncc_is_symmetric(one, two):
    a, b = random_image(one), random_image(two)
    np.testing.assert_allclose(
        similarity.lncc(a, b), similarity.lncc(b, a), rtol=1e-5, atol=1e-6
    )


@few
@given(seeds, seeds, st.floats(1.0, 3.0), st.floats(-1.0, 1.0))
def test_lncc_hardly_changes_with_gain_and_offset(one, two, gain, offset):
    # Inside: an offset is not constant across the zeros around the image.
    a, b = random_image(one, (16, 16, 16)), random_image(two, (16, 16, 16))
    inner = (slice(None), *[slice(4, -4)] * 3)
    before = similarity.lncc_map(a, b, sigma=2)[inner]
    after = similarity.lncc_map(gain * a + offset, b, sigma=2)[inner]
    np.testing.assert_allclose(after, before, atol=0.02)


@few
@given(seeds)
def test_squared_lncc_is_blind_to_contrast_inversion(seed):
    a, b = random_image(seed), random_image(seed + 1)
    inner = (slice(None), *[slice(4, -4)] * 3)
    before = similarity.lncc_map(a, b, sigma=2)
    after = similarity.lncc_map(-a, b, sigma=2)
    np.testing.assert_allclose(after[inner], -before[inner], atol=1e-4)
    np.testing.assert_allclose(
        similarity.squared_lncc(-a, b), similarity.squared_lncc(a, b), rtol=1e-4
    )


@few
@given(seeds, st.floats(0.5, 2.0))
def test_mind_is_blind_to_contrast_inversion(seed, gain):
    a = random_image(seed)
    np.testing.assert_allclose(
        filters.mind_descriptor(1.0 - gain * a),
        filters.mind_descriptor(a),
        atol=2e-4,
    )


def test_mind_couples_the_samples_of_a_batch():
    a, b = random_image(1), random_image(2) * 1e-3
    together = np.asarray(filters.mind_descriptor(np.concatenate([a, b])))
    assert np.abs(together[1:] - filters.mind_descriptor(b)).max() > 1e-3


def test_mind_refuses_channels():
    image = random_image(0)
    with pytest.raises(ValueError, match="1 channel"):
        filters.mind_descriptor(np.concatenate([image, image], -1))


def mind_by_definition(image, radius, dilation):
    """Every voxel, neighbour and box written out; float64."""
    shape = image.shape
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)

    def read(volume, at):
        at = np.clip(at, 0, np.asarray(shape) - 1)
        return volume[at[..., 0], at[..., 1], at[..., 2]]

    channels = []
    for a, b in filters._MIND_PAIRS:
        assert np.sum((np.asarray(a) - np.asarray(b)) ** 2) == 2
        square = (
            read(image, index + dilation * np.asarray(a))
            - read(image, index + dilation * np.asarray(b))
        ) ** 2
        box = [
            read(square, index + np.asarray(o) - radius)
            for o in np.ndindex(*(2 * radius + 1,) * 3)
        ]
        channels.append(np.mean(box, 0))
    excess = np.stack(channels, -1)
    excess -= excess.min(-1, keepdims=True)
    variance = excess.mean(-1, keepdims=True)
    variance = np.clip(variance, variance.mean() / 1000, variance.mean() * 1000)
    return np.exp(-excess / variance)


@pytest.mark.parametrize(("radius", "dilation"), [(2, 2), (1, 3)])
def test_mind_matches_its_definition(radius, dilation):
    image = random_image(5)
    expected = mind_by_definition(image[0, ..., 0].astype(np.float64), radius, dilation)
    actual = filters.mind_descriptor(image, radius=radius, dilation=dilation)
    np.testing.assert_allclose(actual[0], expected, atol=2e-5)


def studholme(joint):
    """The measure of skimage.metrics.normalized_mutual_information."""
    joint = joint / joint.sum()

    def entropy(p):
        p = p[p > 0]
        return -np.sum(p * np.log(p))

    marginals = entropy(joint.sum(0)) + entropy(joint.sum(1))
    return marginals / entropy(joint.ravel())


def nmi_by_definition(warped, target, bins):
    spline = interpolate.BSpline.basis_element(np.arange(-2.0, 3.0), extrapolate=False)

    def windows(image):
        position = 1 + image.astype(np.float64).ravel() * (bins - 3)
        return np.nan_to_num(spline(position[:, None] - np.arange(bins)))

    return 2 - studholme(windows(warped).T @ windows(target))


@pytest.mark.parametrize("bins", [8, 32])
def test_nmi_matches_numpy(bins):
    a, b = random_image(6), random_image(7)
    b = 0.5 * a**2 + 0.5 * b
    np.testing.assert_allclose(
        similarity.nmi(a, b, bins=bins), nmi_by_definition(a, b, bins), rtol=1e-5
    )


def test_nmi_of_separated_levels_is_the_histogram_value():
    # Levels 5 bins apart: the windows add their own entropy h, once per image, to that
    # of a plain histogram.
    bins, rng = 32, np.random.default_rng(8)
    levels_a = rng.integers(0, 6, (1, *SHAPE, 1))
    levels_b = (levels_a // 2 + (rng.random(levels_a.shape) < 0.2)).astype(int)
    a, b = (5 * levels / (bins - 3) for levels in (levels_a, levels_b))
    joint = np.histogram2d(levels_a.ravel(), levels_b.ravel(), bins=(6, 4))[0]
    joint /= joint.sum()

    def entropy(p):
        p = p[p > 0]
        return -np.sum(p * np.log(p))

    h = entropy(np.array([1, 4, 1]) / 6)
    both = entropy(joint.ravel()) + 2 * h
    single = entropy(joint.sum(0)) + entropy(joint.sum(1)) + 2 * h
    np.testing.assert_allclose(
        similarity.nmi(a.astype(np.float32), b.astype(np.float32), bins=bins),
        2 - single / both,
        rtol=1e-4,
    )


def test_nmi_gradient_matches_finite_differences():
    a, b = random_image(9, smooth=2.0), random_image(10)
    a = 0.1 + 0.8 * a  # clear of the ends of the range, where the gradient stops
    direction, step = random_image(11) - 0.5, 1e-5
    slope = np.vdot(jax.grad(similarity.nmi)(a, b, bins=16), direction)
    up, down = (
        nmi_by_definition(a + sign * step * direction.astype(np.float64), b, 16)
        for sign in (1, -1)
    )
    np.testing.assert_allclose(slope, (up - down) / (2 * step), rtol=1e-3)


def test_nmi_prefers_a_relabelled_image_to_an_unrelated_one():
    a, b = random_image(12), random_image(13)
    assert similarity.nmi(1 - a**2, a) < 0.7 * similarity.nmi(b, a)
    assert 0 <= similarity.nmi(a, a) <= similarity.nmi(b, a) <= 1


def test_nmi_of_nothing_is_one():
    a = random_image(14)
    assert similarity.nmi(a, a, mask=np.zeros_like(a)) == 1.0
    np.testing.assert_allclose(similarity.nmi(np.zeros_like(a), a), 1.0, atol=1e-5)


def test_nmi_options_are_checked():
    a = random_image(15)
    with pytest.raises(ValueError, match="bins"):
        similarity.nmi(a, a, bins=3)
    with pytest.raises(ValueError, match="range"):
        similarity.nmi(a, a, intensity_range=(1.0, 1.0))
    scaled = similarity.nmi(100 * a, a * 100, intensity_range=(0.0, 100.0))
    np.testing.assert_allclose(scaled, similarity.nmi(a, a), rtol=1e-4)


# --- correlation in boxes ------------------------------------------------------------


UNIREG = "unireg_rpn_small"
BOX_MASK = "loss/masked_ncc9_mask_fixed_gt_"


@pytest.mark.golden
def test_box_ncc_matches_reference(golden):
    g = golden(UNIREG)
    warped, fixed = channels_last(g["warped"]), channels_last(g["fixed"])
    measure = jax.jit(similarity.box_ncc, static_argnames="window")
    check(measure(warped, fixed), g["loss/ncc9"])
    check(measure(warped, fixed, window=(3, 9, 9)), g["loss/ncc_3_9_9"])
    masked = [key for key in g if key.startswith(BOX_MASK)]
    assert masked
    for key in masked:
        mask = fixed > float(key.removeprefix(BOX_MASK))
        check(measure(warped, fixed, mask=mask), g[key])


@pytest.mark.parametrize("masked", [False, True])
def test_gradient_of_box_ncc_is_that_of_a_difference_quotient(masked):
    a, b, direction = (random_image(seed, (5, 6, 7)) for seed in (1, 2, 3))
    mask = random_image(4, (5, 6, 7)) > 0.4 if masked else None

    def total(step):
        moved = a + step * (direction - 0.5)
        return similarity.box_ncc(moved, b, mask=mask, window=(3, 5, 3))

    slope = float(jax.grad(total)(0.0))
    quotient = float(total(1e-2) - total(-1e-2)) / 2e-2
    assert slope == pytest.approx(quotient, rel=2e-2)


def box_ncc_by_hand(a, b, mask, edges):
    """Box by box, in double precision."""
    total, boxes = 0.0, 0
    for n, *at in np.ndindex(a.shape[:4]):
        box = (
            n,
            *(
                slice(max(i - e // 2, 0), i + e // 2 + 1)
                for i, e in zip(at, edges, strict=True)
            ),
        )
        m = mask[box].ravel().astype(np.float64)
        x, y = (v[box].ravel().astype(np.float64) for v in (a, b))
        count = max(m.sum(), 1e-5)
        if m.sum() < 0.25 * np.prod(edges):
            continue
        x, y = x - (m * x).sum() / count, y - (m * y).sum() / count
        cross, product = (m * x * y).sum(), (m * x * x).sum() * (m * y * y).sum()
        total, boxes = total + cross**2 / (product + 1e-5), boxes + 1
    return -total / max(boxes, 1)


def test_masked_box_ncc_is_that_of_its_boxes():
    a, b = (random_image(seed, (4, 6, 5), batch=2) for seed in (1, 2))
    mask = np.random.default_rng(3).random(a.shape) > 0.6
    mask[1, :, 3:] = False
    edges = (1, 3, 3)
    expected = box_ncc_by_hand(a, b, mask, edges)
    found = similarity.box_ncc(a, b, mask=mask, window=edges)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert similarity.box_ncc(a, b, mask=0 * mask) == 0
    with pytest.raises(ValueError, match="window is 4"):
        similarity.box_ncc(a, b, window=4)


def test_masked_box_ncc_of_a_split_batch_is_that_of_the_whole():
    a, b = (random_image(seed, (4, 6, 5), batch=2) for seed in (1, 2))
    mask = np.ones_like(a, bool)
    mask[1, :, 3:] = False

    def one(a, b, mask):
        return similarity.box_ncc(a[None], b[None], mask=mask[None], window=3, axis="n")

    parts = jax.vmap(one, axis_name="n")(a, b, mask)
    whole = similarity.box_ncc(a, b, mask=mask, window=3)
    np.testing.assert_allclose(parts.mean(), whole, rtol=1e-5)
    separate = [
        similarity.box_ncc(a[i:][:1], b[i:][:1], mask=mask[i:][:1], window=3)
        for i in (0, 1)
    ]
    assert abs(np.mean(separate) - whole) > 1e-4
