"""Matrices that filter along an axis; the descriptor is tested with its loss."""

import numpy as np
import pytest
from scipy import ndimage

from jaxreg.space import filters


@pytest.mark.parametrize("size", [1, 3, 9])
def test_window_sums_have_zeros_beyond_the_axes(size):
    volume = np.random.default_rng(0).random((5, 6, 7))
    matrices = [filters.window_matrix(n, size) for n in volume.shape]
    expected = ndimage.uniform_filter(volume, size, mode="constant") * size**3
    np.testing.assert_allclose(
        filters.along_axes(volume, matrices), expected, rtol=1e-5
    )


def test_box_means_repeat_the_edge():
    volume = np.random.default_rng(0).random((5, 6, 7))
    matrices = [filters.box_matrix(n, 1) for n in volume.shape]
    expected = ndimage.uniform_filter(volume, 3, mode="nearest")
    np.testing.assert_allclose(
        filters.along_axes(volume, matrices), expected, rtol=1e-5
    )
