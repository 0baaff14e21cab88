"""What lies beyond a scan: each rule, the padding of a CT, what labels look like."""

import dataclasses
import warnings

import numpy as np
import pytest

from jaxreg.space import background
from jaxreg.space.background import Background, find
from jaxreg.space.grid import Grid, Volume

SHAPE = (12, 20, 18)
GRID = Grid(SHAPE, np.eye(4))


def scan(around, inside=40.0, *, noise=0.0, dtype=np.int16, seed=0) -> Volume:
    """A cylinder of some brightness in air, the air and the body with noise."""
    _, h, w = np.indices(SHAPE)
    body = (h - 9.5) ** 2 + (w - 8.5) ** 2 < 30
    array = np.where(body, float(inside), float(around))
    drawn = np.random.default_rng(seed).normal(0, 1, SHAPE)
    array += drawn * np.where(body, 15.0, noise)
    return Volume(array.astype(dtype), GRID, "scan.nii")


def padded(volume: Volume, value: float, radius: float = 10.0) -> Volume:
    """The scan with a number of its own outside a circle of its slices."""
    _, h, w = np.indices(SHAPE)
    outside = (h - 9.5) ** 2 + (w - 8.5) ** 2 > radius**2
    array = np.where(outside, value, volume.array).astype(volume.array.dtype)
    return dataclasses.replace(volume, array=array)


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.float32, np.float64])
@pytest.mark.parametrize("ct", [True, None])
@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        (scan(-1024), -1024),  # stored from -1024 on, clipped there
        (scan(-1000), -1000),
        (scan(-990), -990),
        (scan(-1000, noise=40), -1000),  # no value is common, and some are lower
        (scan(-700), -700),  # no air around: the least that there is
    ],
    ids=["-1024", "-1000", "-990", "noise", "minimum"],
)
def test_a_ct_is_filled_with_its_own_air(volume, expected, ct, dtype):
    array = volume.array.astype(dtype)
    assert find(dataclasses.replace(volume, array=array), ct=ct) == Background(expected)


def test_what_is_a_ct_by_its_padding_alone_is_another_scan():
    assert find(scan(-2000, 400)) == Background(0, -2000)
    negative = scan(-2000, -100)
    least = float(negative.array[negative.array > -2000].min())
    assert find(negative) == Background(least, -2000)


@pytest.mark.parametrize("value", [-3024, -2048, -2000, -1500])
@pytest.mark.parametrize("air", [-1024, -1000])
@pytest.mark.parametrize("radius", [7.0, 9.0, 12.0])
def test_padding_is_no_air(value, air, radius):
    assert find(padded(scan(air), value, radius)) == Background(air, value)
    noisy = padded(scan(air, noise=30), value, radius)
    assert find(noisy) == Background(-1000, value)


def test_a_few_low_voxels_are_no_padding():
    volume = scan(-1024)
    volume.array[0, :2, 0] = -3024
    assert find(volume) == Background(-1024)
    # Noise below -1100 is a measurement: no value of it is common.
    assert find(scan(-1000, noise=80, dtype=np.float32)).padding is None


def test_two_kinds_of_padding():
    volume = padded(padded(scan(-1024), -2000, 8.0), -3024, 10.0)
    assert find(volume) == Background(-1024, -2000)


@pytest.mark.parametrize("ct", [False, None])
@pytest.mark.parametrize(
    ("volume", "expected"),
    [
        (scan(0), 0),
        (scan(90, 400), 0),  # bright around, but nothing is negative
        (scan(0, -20), 0),  # ringing, and nothing around
        (scan(-1.25, 0.5, dtype=np.float32), -1.25),  # standardised
        (scan(-50, noise=20), None),
    ],
    ids=["zero", "bright", "ringing", "standardised", "no common value"],
)
def test_other_scans(volume, expected, ct):
    expected = float(volume.array.min()) if expected is None else expected
    assert find(volume, ct=ct) == Background(expected)


def test_a_scan_that_is_no_ct_by_word_keeps_its_border():
    volume = scan(0, 2000)
    volume.array[4:6, 8:10, 6:8] = -900
    assert find(volume, ct=False) == Background(0)
    with pytest.warns(UserWarning, match="scan.nii goes down to -900 .* 0 is the comm"):
        assert find(volume) == Background(-900)


@pytest.mark.parametrize("values", [(0, 1, 2, 7), (-1000, -3, 0, 4), (5, 2**40, 3, 1)])
def test_label_maps_get_0(values):
    array = np.asarray(values, np.int64)[np.indices(SHAPE)[1] // 5]
    assert background.looks_like_labels(array)
    assert find(Volume(array, GRID), nearest=True) == Background(0.0)


def test_a_ct_that_is_read_by_nearest_neighbour_is_still_one():
    noisy = scan(-1000, noise=30)
    assert find(noisy, nearest=True) == Background(-1000)
    flat = scan(-1024)
    assert find(flat, nearest=True, ct=True) == Background(-1024)


def test_a_fill_of_the_user_s_own_leaves_padding_what_it_is():
    assert find(padded(scan(-1024), -3024), fill=-3024) == Background(-3024, -3024)
    assert find(scan(0), fill=7.0) == Background(7.0)
    labels = Volume(np.ones(SHAPE, np.uint8), GRID)
    assert find(labels, fill=9.0, nearest=True) == Background(9.0)


def test_unsigned_and_missing_numbers():
    assert find(Volume(np.full(SHAPE, 7, np.uint16), GRID)) == Background(0)
    array = scan(-1024, dtype=np.float32).array
    array[0, 0] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find(Volume(array, GRID)) == Background(-1024)


def test_the_eye_sees_no_padding():
    volume = padded(scan(-1024), -3024)
    shown = background.without_padding(volume)
    np.testing.assert_array_equal(
        shown.array, np.where(volume.array == -3024, -1024, volume.array)
    )
    assert shown.array.dtype == volume.array.dtype
    plain = scan(-1024)
    assert background.without_padding(plain) is plain


def test_what_looks_like_labels():
    assert background.looks_like_labels((scan(0, 200).array > 100).astype(np.float32))
    assert not background.looks_like_labels(scan(-1024).array)
    assert not background.looks_like_labels(scan(0, 0.5, dtype=np.float32).array)
    clipped = scan(-1000, 40, noise=300).array.clip(-1000, 100)
    assert not background.looks_like_labels(clipped)
    assert not background.looks_like_labels(np.zeros(SHAPE, np.uint8))


def test_label_maps_are_told_from_scans():
    rng = np.random.default_rng(0)
    d, h, w = np.indices((16, 18, 20))
    patches = 3 * (d // 4) + (h // 6) + 200 * ((w - 9) ** 2 + (h - 9) ** 2 < 40)
    for dtype in (np.int16, np.float32):
        assert background.looks_like_labels(patches.astype(dtype))
        assert background.looks_like_labels((d > 5).astype(dtype))
    scan = 100 * (d > 5) + rng.normal(0, 3, d.shape)
    brain = np.where((h - 9) ** 2 + (w - 10) ** 2 + (d - 8) ** 2 < 49, scan, 0)
    for array in (scan, brain, scan + 20 * np.sin(d)):
        assert not background.looks_like_labels(np.rint(array).astype(np.uint8))
        assert not background.looks_like_labels(array.astype(np.float32))
    assert not background.looks_like_labels(np.zeros((4, 4, 4), np.uint8))
