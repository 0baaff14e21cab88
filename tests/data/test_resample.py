"""The NumPy resizes against those of `space.sampling` and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.data import resample
from jaxreg.space import sampling

axis = st.integers(1, 9)
shapes = st.tuples(axis, axis, axis)


@settings(max_examples=6, deadline=None)
@given(shapes, shapes, st.integers(0, 99))
def test_both_equal_the_device_versions(source, target, seed):
    array = np.random.default_rng(seed).random(source, np.float32)
    got = resample.half_pixel(array, target)
    assert got.dtype == np.float32 and got.flags.c_contiguous
    expected = sampling.resize_half_pixel(array[None, ..., None], target)
    np.testing.assert_allclose(got, np.asarray(expected)[0, ..., 0], atol=1e-6)
    labels = (array * 40000).astype(np.int32)
    expected = sampling.resize_nearest_floor(labels[None, ..., None], target)
    np.testing.assert_array_equal(
        resample.nearest_floor(labels, target), np.asarray(expected)[0, ..., 0]
    )


@pytest.mark.golden
def test_golden(golden):
    g = golden("gradicon_preprocess")
    shape = tuple(int(n) for n in g["net_shape"])
    got = resample.half_pixel(g["mri_default"].astype(np.float32), shape)
    # Positions, up to n, are float32 in either program, and rounded a few times; the
    # image, in [0, 1], changes by at most 1 from voxel to voxel.
    error = 4 * 2.0**-24 * sum(g["mri_default"].shape)
    np.testing.assert_allclose(got, g["mri_resized"][0, 0], rtol=0, atol=error)
    np.testing.assert_array_equal(
        resample.nearest_floor(g["mask"], shape), g["mask_resized_nearest"][0, 0]
    )


def test_large_sources_find_the_same_voxels():
    # floor(i * n / m) in float32, as PyTorch counts: last bits matter on long axes.
    n, m = 1911, 175
    got = resample.nearest_floor(np.arange(n).reshape(n, 1, 1), (m, 1, 1))
    step = np.float32(n / m)
    expected = np.floor(np.arange(m, dtype=np.float32) * step).astype(int)
    np.testing.assert_array_equal(got[:, 0, 0], expected)


def test_a_ramp_stays_one_and_is_not_changed_in_place():
    ramp = np.broadcast_to(np.arange(8, dtype=np.float32), (3, 4, 8))
    before = ramp.copy()
    got = resample.half_pixel(ramp, (3, 2, 4))
    np.testing.assert_allclose(got[1, 1], [0.5, 2.5, 4.5, 6.5])
    np.testing.assert_array_equal(ramp, before)
