"""Two views of a volume: where they were read, how much they share, what they show."""

import dataclasses

import numpy as np
import pytest

from jaxreg.data import sam_views
from jaxreg.errors import UserError

SMALL = sam_views.ViewConfig(
    shape=(8, 12, 10), spacing_mm=1.0, least_overlap=(2, 3, 3), body_above=None
)
PLAIN = dataclasses.replace(SMALL, noise=0.0, blur_mm=0.0)
SPACING = (1.5, 0.8, 1.0)


def volume(shape=(32, 48, 32), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def drawn(config, seed=0, image=None, spacing=SPACING):
    image = volume() if image is None else image
    return sam_views.two_crops(image, spacing, np.random.default_rng(seed), config)


def read_at(image, index):
    """Trilinear interpolation at one place, edges repeated."""
    total = 0.0
    index = [min(max(i, 0), n - 1) for i, n in zip(index, image.shape, strict=True)]
    for corner in np.ndindex(2, 2, 2):
        low = [int(np.floor(i)) for i in index]
        at = [
            min(a + c, n - 1) for a, c, n in zip(low, corner, image.shape, strict=True)
        ]
        parts = [
            i - a if c else 1 - (i - a)
            for i, a, c in zip(index, low, corner, strict=True)
        ]
        total += np.prod(parts) * image[tuple(at)]
    return total


@pytest.mark.parametrize("seed", range(4))
def test_views_show_what_lies_at_their_places(seed):
    image, found = volume(), drawn(PLAIN, seed)
    rng = np.random.default_rng(seed)
    for view in (0, 1):
        for _ in range(40):
            at = tuple(rng.integers(0, PLAIN.shape))
            index = found.places_mm[view][at] / SPACING
            expected = read_at(image, index)
            assert found.images[view][at][0] == pytest.approx(expected, abs=1e-4)


def test_shapes_and_types():
    found = drawn(SMALL)
    shape = (2, *SMALL.shape)
    assert found.images.shape == found.valid.shape == (*shape, 1)
    assert found.places_mm.shape == (*shape, 3)
    arrays = (found.images, found.places_mm, found.valid)
    assert all(a.dtype == np.float32 for a in arrays)


def test_each_view_has_one_spacing_of_its_own():
    seen = []
    for seed in range(20):
        for places in drawn(PLAIN, seed).places_mm:
            steps = [np.diff(places, axis=a)[..., a] for a in range(3)]
            step = steps[0].flat[0]
            for s in steps:
                np.testing.assert_allclose(s, step, rtol=1e-4)
            seen.append(step)
    assert min(seen) >= 0.8 and max(seen) <= 1.2 and np.ptp(seen) > 0.3
    assert len(set(np.round(seen, 4))) == 40


def test_views_of_a_large_volume_lie_in_it():
    extent = np.array(volume().shape) * SPACING
    for seed in range(50):
        found = drawn(PLAIN, seed)
        assert found.valid.all()
        assert (found.places_mm > -np.array(SPACING) / 2).all()
        assert (found.places_mm < extent).all()


def test_a_small_volume_leaves_voxels_that_show_nothing():
    image = volume((6, 48, 9))
    found = drawn(PLAIN, 1, image, (1.0, 1.0, 1.0))
    index = found.places_mm
    outside = (index < -0.5) | (index > np.array(image.shape) - 0.5)
    np.testing.assert_array_equal(found.valid[..., 0] == 0, outside.any(-1))
    assert 0 < found.valid.mean() < 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_overlaps_are_drawn_in_their_ranges(axis):
    config, rng = sam_views.ViewConfig(), np.random.default_rng(axis)
    size = (34, 101, 101)[axis]

    def many(room):
        return np.array(
            [sam_views._overlap(axis, room, size, rng, config) for _ in range(3000)]
        )

    wide = many(60)
    near = wide[wide > 0]
    assert 0.77 < len(near) / len(wide) < 0.83
    assert near.min() == config.least_overlap[axis] and near.max() == size - 3
    gaps = wide[wide <= 0]
    assert (gaps.min(), gaps.max()) == ((-59, -2), (-59, -51), (-59, -51))[axis]
    tight = many(-20)
    low, high = ((21, size - 1), (21, size - 2), (25, size - 3))[axis]
    assert (tight.min(), tight.max()) == (low, high)


def test_crops_share_at_least_what_was_drawn_and_lie_in_their_box():
    extent = np.array([120, 130, 140])
    config = dataclasses.replace(sam_views.ViewConfig(), overlapping=1.0)
    rng, shared = np.random.default_rng(0), []
    for _ in range(300):
        scales = rng.uniform(0.8, 1.2, 2)
        starts, sizes = sam_views._crops(extent, scales, rng, config)
        np.testing.assert_array_equal(
            sizes[:, 1], [np.ceil(1.05 * np.ceil(96 * s)) for s in scales]
        )
        assert (starts >= 0).all() and (starts + sizes <= extent).all()
        shared.append((starts + sizes).min(0) - starts.max(0))
    assert np.min(shared, 0)[0] >= 5 and np.min(shared) > 0


def test_body_bounds_the_crops():
    image = np.zeros((40, 40, 40), np.float32)
    image[10:30, 12:32, 15:35] = 5.0
    config = dataclasses.replace(PLAIN, shape=(6, 6, 6), body_above=1.0)
    for seed in range(10):
        found = drawn(config, seed, image, (1.0, 1.0, 1.0))
        assert (found.images == 5.0).all()
    first, last = sam_views._body(image, 1.0)
    assert first.tolist() == [10, 12, 15] and last.tolist() == [30, 32, 35]
    assert sam_views._body(image, 9.0)[1].tolist() == [40, 40, 40]


def test_same_seed_same_views():
    one, same, other = (drawn(SMALL, seed) for seed in (3, 3, 4))
    for field in dataclasses.fields(sam_views.Crops):
        left, right = getattr(one, field.name), getattr(same, field.name)
        np.testing.assert_array_equal(left, right)
    assert not np.array_equal(one.images, other.images)


def test_contrast_has_one_exponent_per_view_over_the_volumes_range():
    image = volume()
    low, high = image.min(), image.max()
    plain = drawn(PLAIN, 0, image).images
    found = drawn(dataclasses.replace(PLAIN, gamma=2.0), 0, image).images
    exponents = []
    for before, after in zip(plain, found, strict=True):
        x, y = ((i.ravel().astype(float) - low) / (high - low) for i in (before, after))
        middle = np.abs(x - 0.5).argmin()
        exponents.append(np.log(y[middle]) / np.log(x[middle]))
        np.testing.assert_allclose(y, x.clip(0, 1) ** exponents[-1], atol=1e-5)
    assert all(0.5 <= exponent <= 2.0 for exponent in exponents)
    assert exponents[0] != pytest.approx(exponents[1])
    flat = np.full((32, 48, 32), 7.0, np.float32)
    again = drawn(dataclasses.replace(PLAIN, gamma=2.0), 0, flat).images
    np.testing.assert_array_equal(again, 7.0)


def test_noise_and_blur():
    flat = np.full((32, 48, 32), 7.0, np.float32)
    noisy = drawn(dataclasses.replace(PLAIN, noise=2.0), 0, flat).images
    deviations = noisy.std((1, 2, 3, 4))
    assert (deviations < 2.1).all() and deviations[0] != pytest.approx(deviations[1])
    blurred = drawn(dataclasses.replace(PLAIN, blur_mm=4.0), 0, flat).images
    np.testing.assert_allclose(blurred, 7.0, rtol=1e-6)
    rough, smooth = (
        np.abs(np.diff(drawn(c, 0).images, axis=2)).mean((1, 2, 3, 4))
        for c in (PLAIN, dataclasses.replace(PLAIN, blur_mm=4.0))
    )
    assert (smooth < 0.9 * rough).all()


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (0, 4, 4)},
        {"scale": (1.2, 0.8)},
        {"noise": -1.0},
        {"gamma": 0.5},
        {"spacing_mm": 0.0},
    ],
)
def test_settings_that_are_refused(change):
    with pytest.raises(UserError, match="expected positive sizes"):
        sam_views.ViewConfig(**change)


def test_channels_are_refused():
    with pytest.raises(UserError, match="expected D H W"):
        drawn(SMALL, image=np.zeros((4, 4, 4, 1)))
