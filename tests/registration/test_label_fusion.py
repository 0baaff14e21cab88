"""Votes of atlases against label maps warped one by one, and against known answers."""

import numpy as np
import pytest
from scipy import ndimage

from jaxreg.data.preprocess import IntensityRule
from jaxreg.losses import similarity
from jaxreg.registration import label_fusion
from jaxreg.registration.label_fusion import Carried
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Transform

FIXED = Grid((7, 8, 9), np.diag([1.5, 1.0, 1.2, 1.0])[[2, 1, 0, 3]])
ATLAS = Grid((8, 9, 10), np.diag([1.3, 1.1, 1.0, 1.0])[[2, 1, 0, 3]])


def blocks(grid: Grid, seed: int, labels=(0, 3, 7, 200)) -> Volume:
    """Patches of labels, uint8."""
    coarse = np.random.default_rng(seed).choice(
        labels, [-(-n // 3) for n in grid.shape]
    )
    whole = np.kron(coarse, np.ones((3, 3, 3), int))
    return Volume(whole[tuple(map(slice, grid.shape))].astype(np.uint8), grid)


def turned(seed: int) -> Transform:
    rng = np.random.default_rng(seed)
    matrix = np.eye(4)
    matrix[:3, :3] += 0.08 * rng.standard_normal((3, 3))
    matrix[:3, 3] = rng.uniform(-0.7, 0.7, 3)
    return Transform((Affine(matrix),))


def one_hot_votes(atlas: Carried, label: int) -> np.ndarray:
    """One label's map of zeros and ones at the fixed voxels, by SciPy."""
    (step,) = atlas.transform.steps
    to_index = np.linalg.inv(ATLAS.affine_mm) @ step.matrix @ FIXED.affine_mm
    index = np.indices(FIXED.shape).reshape(3, -1)
    places = to_index[:3, :3] @ index + to_index[:3, 3:]
    map_ = (atlas.labels.array == label).astype(float)
    # Beyond the last centre the outer voxel goes on for half a voxel, then nothing.
    inside = (
        (places >= -0.5) & (places <= np.asarray(ATLAS.shape)[:, None] - 0.5)
    ).all(0)
    read = ndimage.map_coordinates(map_, places, order=1, mode="nearest") * inside
    return read.reshape(FIXED.shape)


@pytest.mark.parametrize("count", [1, 3])
def test_votes_are_those_of_each_label_warped_alone(count, monkeypatch):
    monkeypatch.setattr(label_fusion, "_MOST_VOTES", 4 * 8 * 9 * 2)  # in four parts
    rng = np.random.default_rng(9)
    atlases = [
        Carried(
            blocks(ATLAS, seed),
            turned(seed),
            None if count == 1 else rng.random(FIXED.shape).astype(np.float16),
        )
        for seed in range(count)
    ]
    shown = []
    found = label_fusion.fuse(
        FIXED, atlases, progress=lambda *done: shown.append(done)
    ).array
    labels = np.array([0, 3, 7, 200])
    votes = np.stack(
        [
            sum(
                one_hot_votes(a, label)
                * (1 if a.weight is None else a.weight.astype(float))
                for a in atlases
            )
            for label in labels
        ]
    )
    expected = labels[votes.argmax(0)]
    ordered = np.sort(votes, 0)
    # But for a rounding; or nobody votes.
    certain = (ordered[-1] - ordered[-2] > 1e-4) | (ordered[-1] == 0)
    assert certain.mean() > 0.9
    np.testing.assert_array_equal(found[certain], expected[certain])
    assert found.dtype == np.uint8
    assert shown == [(2, 7), (4, 7), (6, 7), (7, 7)]


def test_where_no_atlas_reaches_is_background():
    away = np.eye(4)
    away[0, 3] = 4.0  # mm along x, the last axis
    full = Volume(np.full(FIXED.shape, 5, np.int16), FIXED)
    found = label_fusion.fuse(FIXED, [Carried(full, Transform((Affine(away),)))]).array
    np.testing.assert_array_equal(found[..., :5], 5)  # 4.8 + 4 mm: before the last
    np.testing.assert_array_equal(found[..., 6:], 0)
    assert found.dtype == np.int16


def smooth(seed: int, shape) -> np.ndarray:
    noise = np.random.default_rng(seed).random(shape)
    return ndimage.gaussian_filter(noise, 1.5).astype(np.float32)


def test_each_half_is_labelled_by_the_atlas_that_resembles_it():
    """Two atlases, each right in one half, of an image that the other half differs."""
    shape = (10, 12, 60)
    grid = Grid(shape, np.eye(4)[[2, 1, 0, 3]])
    scan, other = smooth(0, shape), smooth(1, shape)
    left = np.arange(60) < 30
    truth = np.where(smooth(2, shape) > np.median(smooth(2, shape)), 2, 1)
    atlases = []
    for right_half in (left, ~left):
        image = np.where(right_half, scan, other)
        labels = np.where(right_half, truth, 3 - truth).astype(np.uint8)
        weight = label_fusion.local_weight(
            Volume(scan, grid), Volume(image, grid), Transform(()),
            (IntensityRule("mri"), IntensityRule("mri")),
        )  # fmt: skip
        atlases.append(Carried(Volume(labels, grid), Transform(()), weight))
    found = label_fusion.fuse(grid, atlases).array
    far = np.abs(np.arange(60) - 29.5) > 10  # two widths of the window
    np.testing.assert_array_equal(found[..., far], truth[..., far])


def test_the_weight_is_the_local_correlation_of_the_warped_atlas():
    shape = (9, 10, 11)
    grid = Grid(shape, np.eye(4)[[2, 1, 0, 3]])
    scan, atlas = smooth(3, shape), smooth(4, shape)
    shift = np.eye(4)
    shift[2, 3] = 1.0  # along z, the first axis: to the next slice
    rule = IntensityRule("mri", quantile_range=(0.0, 1.0))
    weight = label_fusion.local_weight(
        Volume(scan, grid), Volume(atlas, grid), Transform((Affine(shift),)),
        (rule, rule),
    )  # fmt: skip
    scan, atlas = ((a - a.min()) / (a.max() - a.min()) for a in (scan, atlas))
    warped = np.concatenate([atlas[1:], np.zeros_like(atlas[:1])])
    map_ = similarity.lncc_map(warped[None, ..., None], scan[None, ..., None])
    expected = np.clip(np.asarray(map_)[0, ..., 0] ** 4, 1e-3, 1)
    assert weight.dtype == np.float16
    np.testing.assert_allclose(weight, expected, rtol=2e-3)  # of float16
