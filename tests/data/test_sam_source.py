"""Scans as pairs of their own views: order, repeatability, cache."""

import dataclasses

import nibabel as nib
import numpy as np
import pytest

from jaxreg.data import cache, sam_source, sam_views
from jaxreg.data.batches import Batches
from jaxreg.data.loading import Loading
from jaxreg.data.manifest.records import Record
from jaxreg.data.preprocess import IntensityRule
from jaxreg.errors import UserError
from jaxreg.matching import points

CONFIG = sam_views.ViewConfig(
    shape=(8, 16, 16), spacing_mm=1.0, least_overlap=(2, 4, 4), body_above=None
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scans")
    found = []
    for number in range(5):
        array = np.random.default_rng(number).normal(size=(24, 28, 16))
        path = folder / f"s{number}.nii.gz"
        affine = np.diag([-1.0, 1.2, 1.5, 1.0])
        nib.save(nib.Nifti1Image(array.astype(np.float32), affine), path)
        found.append(Record(path, f"s{number}", "set"))
    return found


def source(records, **changes):
    made = sam_source.ViewSource(
        records, 2, lambda modality: IntensityRule("mri"), points.in_sam_range, CONFIG
    )
    return dataclasses.replace(made, **changes)


def test_an_epoch_shows_each_scan_once_and_no_batch_one_twice(records):
    made = source(records)
    for epoch in range(3):
        seen = [made.record(4 * epoch + i).subject for i in range(4)]
        assert len(set(seen)) == 4
    order = [[made.record(4 * e + i).subject for i in range(4)] for e in range(6)]
    assert len({tuple(o) for o in order}) > 1
    # What one epoch leaves out comes in another.
    assert {name for o in order for name in o} == {r.subject for r in records}


def test_views_depend_on_seed_and_index_alone(records):
    one, again = source(records)[7], source(records)[7]
    other = source(records, seed=1)[7]
    assert one["moving"].shape == (8, 16, 16, 1)
    assert one["fixed_places"].shape == (8, 16, 16, 3)
    for name, array in one.items():
        np.testing.assert_array_equal(array, again[name])
    assert np.abs(one["moving"] - other["moving"]).max() > 0


def test_held_out_scans_are_always_seen_alike(records):
    made = source(records, shuffled=False)
    assert [made.record(i).subject for i in range(6)] == [
        "s0", "s1", "s2", "s3", "s4", "s0"
    ]  # fmt: skip
    np.testing.assert_array_equal(made[1]["fixed"], made[6]["fixed"])


def test_views_show_the_turned_scan_in_sams_range(records):
    quiet = dataclasses.replace(CONFIG, noise=0.0, blur_mm=0.0)
    found = source(records, config=quiet)[0]
    values = found["moving"][found["moving_valid"] > 0]
    assert values.min() >= -50 and values.max() <= 205 and values.std() > 5
    # 16 slices of 1.5 mm, towards superior; 24 voxels of 1 mm to the left.
    places = found["moving_places"][found["moving_valid"][..., 0] > 0]
    assert (places.max(0) <= [15.5 * 1.5, 27.5 * 1.2, 23.5]).all()
    assert (places.min(0) >= -0.75).all()


def test_a_cache_changes_nothing_but_rounding(records, tmp_path):
    plain = source(records)[3]
    for _ in range(2):
        kept = source(records, cache=cache.Cache(tmp_path))[3]
        np.testing.assert_allclose(kept["moving"], plain["moving"], atol=0.01)
        np.testing.assert_array_equal(kept["fixed_places"], plain["fixed_places"])
    assert len(list((tmp_path / "entries").glob("*.npy"))) == 1


def test_batches_hand_them_over(records):
    loading = Loading(shape=CONFIG.shape, prefetch=0)
    made = source(records)
    with Batches(made, loading, batch_size=2, start=1, stop=2) as batches:
        batch = next(batches)
        assert batches.named(3).startswith("image ")
    np.testing.assert_array_equal(batch["index"], [2, 3])
    np.testing.assert_array_equal(batch["fixed"][1], made[3]["fixed"])
    assert batch["moving_valid"].shape == (2, 8, 16, 16, 1)


def test_a_constant_scan_is_named(records, tmp_path):
    path = tmp_path / "flat.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((9, 9, 9), np.float32), np.eye(4)), path)
    made = source([Record(path, "flat", "set")] * 2)
    with pytest.raises(UserError, match=r"flat.nii.gz is constant"):
        made[0]
