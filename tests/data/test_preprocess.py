"""Preprocessing against the reference arrays and by hand."""

import json
import warnings

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.data import modality, network_grid, preprocess
from jaxreg.data.preprocess import IntensityRule
from jaxreg.errors import UserError
from jaxreg.space import background, sampling
from jaxreg.space.grid import Grid, Volume

CT = IntensityRule("ct")
MRI = IntensityRule("mri")


def volume(array, source="scan.nii", *, spacing=2.0):
    affine = np.diag([spacing, spacing, spacing, 1.0])
    return Volume(array, Grid(array.shape, affine), source)


def example(shape=(7, 8, 6), seed=0):
    return np.random.default_rng(seed).normal(100, 30, shape).astype(np.float32)


@pytest.mark.golden
def test_golden_ct(golden):
    g = golden("gradicon_preprocess")
    got = preprocess.normalise(g["ct"], CT)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, g["ct_default"], atol=1e-6)
    window = IntensityRule("ct", ct_window=(-150, 250))
    got = preprocess.normalise(g["ct"], window)
    np.testing.assert_allclose(got, g["ct_window_m150_250"], atol=1e-6)


@pytest.mark.golden
def test_golden_mri(golden):
    g = golden("gradicon_preprocess")
    np.testing.assert_allclose(
        preprocess.normalise(g["mr"], MRI), g["mri_default"], atol=1e-6
    )
    quantiles = IntensityRule("mri", quantile_range=(0.01, 0.98))
    np.testing.assert_allclose(
        preprocess.normalise(g["mr"], quantiles), g["mri_quantile_01_98"], atol=1e-6
    )


@pytest.mark.golden
def test_golden_quantiles(golden):
    g = golden("gradicon_preprocess")
    got = [preprocess.quantile(g["mr"], q) for q in g["q"]]
    np.testing.assert_array_equal(got, g["q_values"])


@pytest.mark.golden
@pytest.mark.parametrize(
    ("image", "rule", "key"), [("mr", MRI, "mri_masked"), ("ct", CT, "ct_masked")]
)
def test_golden_masked(golden, image, rule, key):
    g = golden("gradicon_preprocess")
    shape = g[image].shape  # the scan's own grid: nothing is resized
    got = preprocess.network_image(
        volume(g[image]), shape, rule, mask=volume(g["mask"], "mask.nii")
    )
    np.testing.assert_allclose(got[0, ..., 0], g[key], atol=1e-6)


def resampling_error(shape):
    """The most by which two float32 programs differ in a linearly read [0, 1] image.

    Each axis' position, up to its n, is rounded a few times on the way (to 2^-24 of
    itself), and an image changes by at most 1 from voxel to voxel.
    """
    return 4 * 2.0**-24 * sum(shape)


@pytest.mark.golden
def test_golden_resizes(golden):
    g = golden("gradicon_preprocess")
    shape = tuple(int(n) for n in g["net_shape"])
    got = preprocess.network_image(volume(g["mr"]), shape, MRI)
    assert got.shape == (1, *shape, 1)
    assert got.dtype == np.float32
    wanted, error = (
        np.moveaxis(g["mri_resized"], 1, -1),
        resampling_error(g["mr"].shape),
    )
    np.testing.assert_allclose(got, wanted, rtol=0, atol=error)
    expected = np.moveaxis(g["mask_resized_nearest"], 1, -1)
    labels = preprocess.network_labels(volume(g["mask"]), shape)
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, expected)
    mask = preprocess.network_mask(volume(g["mask"]), shape)
    assert mask.dtype == np.float32
    np.testing.assert_array_equal(mask, expected > 0)


@pytest.mark.golden
@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("warp_border", {"outside": "edge"}),
        ("warp_zeros", {"outside": "zeros"}),
        ("warp_nearest_zeros", {"outside": "zeros", "order": 0}),
    ],
)
def test_golden_warps(golden, key, options):
    g = golden("gradicon_preprocess")
    image, points, expected = (
        np.moveaxis(g[name], 1, -1) for name in ("warp_image", "warp_phi", key)
    )
    got = np.asarray(sampling.sample(image, points, **options))
    off = np.abs(got - expected) > resampling_error(image.shape[1:4])
    # A point half-way between two voxels may take either.
    assert off.sum() <= (1e-3 * off.size if "nearest" in key else 0)


@pytest.mark.parametrize(
    ("q", "expected"),
    [(0, 10), (0.19, 10), (0.2, 10), (0.4, 20), (0.59, 20), (0.99, 40), (1, 50)],
)
def test_quantile_is_the_kth_value(q, expected):
    # Five values: k is 1, 1, 1, 2, 2, 4, 5.
    values = np.array([30.0, 50.0, 10.0, 20.0, 40.0])
    assert preprocess.quantile(values, q) == expected


def test_quantiles_of_the_foreground_are_of_voxels_above_0():
    values = np.r_[np.zeros(900), np.arange(1, 101)].reshape(10, 10, 10)
    rule = IntensityRule("mri", quantile_range=(0.1, 0.9), foreground=True)
    expected = (values.clip(10, 90) - 10) / 80
    np.testing.assert_allclose(preprocess.normalise(values, rule), expected, rtol=1e-6)
    assert IntensityRule(**rule.to_dict()) == rule
    # Of nothing above 0 it is all voxels.
    below = np.arange(1000.0).reshape(10, 10, 10) - 2000
    np.testing.assert_array_equal(
        preprocess.normalise(below, rule),
        preprocess.normalise(below, quantiles((0.1, 0.9))),
    )


def test_quantile_counts_the_background():
    assert preprocess.quantile(np.r_[np.zeros(98), 5.0, 9.0], 0.98) == 0
    assert preprocess.quantile(np.r_[np.zeros(98), 5.0, 9.0], 0.99) == 5


def test_mask_comes_after_scaling_and_counts_above_zero():
    array = example()
    inside = np.zeros(array.shape, np.int16)
    inside[2:5] = 2
    inside[0] = -1
    got = preprocess.network_image(
        volume(array), array.shape, MRI, mask=volume(inside, "mask.nii")
    )[0, ..., 0]
    np.testing.assert_allclose(got, preprocess.normalise(array, MRI) * (inside > 0))


def test_resize_uses_neither_spacing_nor_direction():
    array = example()
    plain = volume(array)
    turned = Volume(
        array, Grid(array.shape, np.diag([-0.5, 3.0, 1.0, 1.0])[[1, 0, 2, 3]])
    )
    a, b = (preprocess.network_image(v, (5, 5, 5), MRI) for v in (plain, turned))
    np.testing.assert_array_equal(a, b)


def test_masks_sit_half_a_voxel_off_the_images():
    # Source index floor(i * 4 / 2) is 0, 2; a half-pixel rule would read 1, 3.
    labels = np.zeros((4, 2, 2), np.uint8)
    labels[:, 0, 0] = [1, 2, 3, 4]
    got = preprocess.network_labels(volume(labels), (2, 2, 2))
    np.testing.assert_array_equal(got[0, :, 0, 0, 0], [1, 3])


def test_rule_travels_as_json():
    for rule in (CT, MRI, IntensityRule("ct", (-150, 250)), quantiles((0.01, 1))):
        assert IntensityRule(**json.loads(json.dumps(rule.to_dict()))) == rule


def quantiles(pair):
    return IntensityRule("mri", quantile_range=pair)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"modality": "CT"}, 'modality is "CT", expected "ct" or "mri"'),
        ({"ct_window": (5, 1)}, "ct_window is 5 1, expected minimum < maximum"),
        ({"ct_window": (1, 1)}, "ct_window is 1 1"),
        ({"ct_window": (1,)}, "ct_window is .* expected two numbers"),
        ({"ct_window": (0, np.inf)}, "ct_window is 0 inf, expected finite"),
        ({"quantile_range": (0.9, 0.1)}, "quantile_range is 0.9 0.1, expected 0 <="),
        ({"quantile_range": (-5, 7)}, "quantile_range is -5 7"),
        ({"quantile_range": "ab"}, "quantile_range is ab, expected two numbers"),
    ],
)
def test_wrong_rules_get_one_sentence(fields, expected):
    with pytest.raises(UserError, match=expected):
        IntensityRule(**fields)


@pytest.mark.parametrize(
    ("array", "rule", "expected"),
    [
        (np.full((3, 3, 3), 5.0), MRI, "head.nii is constant .5 everywhere."),
        (np.full((3, 3, 3), 5.0), CT, "head.nii is constant .5 everywhere."),
        (np.r_[np.zeros(999), 1.0], MRI, "head.nii is constant within .* quantiles 0"),
        (np.linspace(2000, 3000, 27), CT, "head.nii is constant within .* ct_window"),
        (np.linspace(-3000, -1000, 27), CT, "run from -3000 to -1000"),
    ],
)
def test_constant_images_are_refused(array, rule, expected):
    with pytest.raises(UserError, match=expected):
        preprocess.normalise(array, rule, source="head.nii")


def test_mask_that_leaves_nothing_is_refused():
    array = example()
    mask = volume(np.zeros(array.shape, np.uint8), "mask.nii")
    with pytest.raises(UserError, match="mask mask.nii leaves nothing of .* scan.nii"):
        preprocess.network_image(volume(array), (5, 5, 5), MRI, mask=mask)


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (np.array([-1, 0, 1]), "seg.nii has negative labels .down to -1."),
        (np.array([0, 1, 2**40]), "seg.nii has labels up to 1099511627776"),
    ],
)
def test_labels_that_do_not_index_are_refused(labels, expected):
    labels = volume(labels.reshape(3, 1, 1), "seg.nii")
    with pytest.raises(UserError, match=expected):
        preprocess.network_labels(labels, (2, 2, 2))


def test_other_grids_are_refused_with_both_names():
    scan = volume(example())
    mask = np.ones((7, 8, 6), np.uint8)
    preprocess.check_same_grid(volume(mask, "mask.nii"), scan)
    with pytest.raises(
        UserError, match="mask.nii .* image scan.nii .6 x 8 x 8 voxels "
    ):
        preprocess.check_same_grid(volume(np.ones((8, 8, 6)), "mask.nii"), scan)
    with pytest.raises(UserError, match="segmentation seg.nii .* at another place"):
        preprocess.check_same_grid(
            volume(mask, "seg.nii", spacing=2.1), scan, what="segmentation"
        )


@pytest.mark.parametrize("spacing", [0.2, 1.0, 5.0])
@pytest.mark.parametrize("axis", range(3))
def test_grids_are_compared_in_voxels(spacing, axis):
    """A rounded origin is one, whatever the voxel's size; half a voxel never is."""
    sizes = np.roll([1.0, 3.0, 4.0], axis) * spacing

    def at(voxels, name):
        affine = np.diag([*sizes, 1.0])
        affine[axis, 3] = voxels * sizes[axis]
        return Volume(np.ones((6, 7, 8)), Grid((6, 7, 8), affine), name)

    scan = at(0.0, "scan.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preprocess.check_same_grid(at(0.009, "mask.nii"), scan)
    for voxels in (0.011, -0.24):
        said = (
            f"mask mask.nii lies up to {abs(voxels):.2g} of a voxel .* image scan.nii"
        )
        with pytest.warns(UserWarning, match=said):
            preprocess.check_same_grid(at(voxels, "mask.nii"), scan)
    said = (
        f"mask.nii lies on another grid .*up to 0.5 of a voxel \\({sizes[axis] / 2:.2g}"
    )
    with pytest.raises(UserError, match=said):
        preprocess.check_same_grid(at(0.5, "mask.nii"), scan)


def test_pair():
    moving, fixed = volume(example()), volume(example((6, 9, 8), seed=1) * 9, "f.nii")
    inside = np.zeros((7, 8, 6), np.uint8)
    inside[2:] = 1
    masks = {
        "moving_mask": volume(inside, "m.nii"),
        "fixed_mask": volume(np.ones((6, 9, 8), np.uint8), "n.nii"),
    }
    rules = {"moving_rule": MRI, "fixed_rule": CT}
    shape = (5, 4, 6)

    def pair(**options):
        return preprocess.network_pair(moving, fixed, shape, **rules, **options)

    plain = pair()
    np.testing.assert_array_equal(
        plain.moving, preprocess.network_image(moving, shape, MRI)
    )
    np.testing.assert_array_equal(
        plain.fixed, preprocess.network_image(fixed, shape, CT)
    )
    assert plain.moving_mask is plain.fixed_mask is None
    unused = pair(**masks)  # masks alone change nothing
    np.testing.assert_array_equal(unused.moving, plain.moving)
    assert unused.moving_mask is None
    loss = pair(**masks, mask_loss=True)
    np.testing.assert_array_equal(loss.moving, plain.moving)
    np.testing.assert_array_equal(
        loss.moving_mask, preprocess.network_mask(masks["moving_mask"], shape)
    )
    assert loss.fixed_mask.shape == (1, *shape, 1)
    inputs = pair(**masks, mask_inputs=True)
    assert not np.array_equal(inputs.moving, plain.moving)
    np.testing.assert_array_equal(inputs.fixed, plain.fixed)
    assert inputs.moving_mask is None
    one = pair(moving_mask=masks["moving_mask"], mask_inputs=True)
    np.testing.assert_array_equal(one.moving, inputs.moving)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"mask_loss": True}, "loss masking needs a mask of both images, got 0"),
        ({"mask_inputs": True}, "input masking needs a mask, got none"),
        ({"fixed_mask": True, "mask_loss": True}, "both images, got 1"),
        ({"fixed_mask": False}, "mask mask.nii lies on another grid"),
    ],
)
def test_pair_checks_its_masks(options, expected):
    scan = volume(example())
    if "fixed_mask" in options:
        shape = scan.array.shape if options["fixed_mask"] else (4, 4, 4)
        options = options | {"fixed_mask": volume(np.ones(shape), "mask.nii")}
    with pytest.raises(UserError, match=expected):
        preprocess.network_pair(
            scan, scan, (5, 5, 5), moving_rule=MRI, fixed_rule=MRI, **options
        )


# --- where the network's voxels lie ---------------------------------------------------


def test_aligned_resize_reads_the_scan_at_its_corners_and_between():
    rng = np.random.default_rng(5)
    array = rng.uniform(size=(5, 7, 6)).astype("f4")
    shape = (9, 4, 6)
    found = network_grid.ResamplingRule("aligned").image(
        array, Grid(array.shape, np.eye(4)), shape
    )
    at = [np.linspace(0, n - 1, m) for n, m in zip(array.shape, shape, strict=True)]
    at = np.stack(np.meshgrid(*at, indexing="ij"))
    expected = ndimage.map_coordinates(array.astype(np.float64), at, order=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_aligned_labels_are_the_nearest_voxels():
    labels = np.arange(4 * 5 * 3).reshape(4, 5, 3)
    shape = (7, 5, 2)
    found = network_grid.ResamplingRule("aligned").labels(
        labels, Grid(labels.shape, np.eye(4)), shape
    )
    at = [np.linspace(0, n - 1, m) for n, m in zip(labels.shape, shape, strict=True)]
    index = [np.floor(a + 0.5).astype(int) for a in at]
    np.testing.assert_array_equal(found, labels[np.ix_(*index)])


@pytest.mark.parametrize("resize", ["half_pixel", "aligned", "pad_crop"])
@pytest.mark.parametrize("axes", ["kji", "ijk", "spl"])
def test_network_voxels_lie_where_they_were_read(resize, axes):
    # An image whose intensity is a world coordinate keeps it on every grid.
    affine = np.eye(4)
    affine[:3, :3] = [[0, 0.2, 2.0], [0.1, 1.5, 0], [1.2, 0, 0.3]]
    affine[:3, 3] = (-5.0, 4.0, 10.0)
    grid = Grid((9, 11, 8), affine)
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    placement = network_grid.ResamplingRule(resize, axes, spacing_mm=0.9)
    volume = placement.reoriented(Volume(world[..., 0].astype("f4"), grid))
    shape = (6, 5, 7)
    found = placement.image(volume.array, volume.grid, shape)
    network = placement.grid(volume.grid, shape)
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    expected = (index @ network.affine_mm[:3, :3].T + network.affine_mm[:3, 3])[..., 0]
    inside = (slice(1, -1),) * 3  # beyond the outermost centres, half-pixel clamps
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-4)
    if resize == "aligned":
        np.testing.assert_allclose(found, expected, atol=1e-4)
    if resize == "pad_crop":
        np.testing.assert_allclose(network.spacing_mm, 0.9)
        centres = [
            g.affine_mm @ [*((np.array(g.shape) - 1) / 2), 1] for g in (network, grid)
        ]
        np.testing.assert_allclose(*centres)
    # The array axes lie along z, y and x in this order.
    turned = {"kji": grid.shape, "ijk": grid.shape[::-1], "spl": grid.shape}
    assert volume.array.shape == turned[axes]
    if axes == "spl":
        directions = np.array([volume.grid.affine_mm[2 - i, i] for i in range(3)])
        assert np.all(np.sign(directions) == [1, -1, -1])


def test_scans_are_padded_with_air_and_labels_with_background():
    array = np.full((4, 4, 4), 50.0, "f4")
    array[1:3] = 200.0
    scan = volume(array, spacing=1.0)
    placement = network_grid.ResamplingRule("pad_crop", spacing_mm=1.0)
    rule = preprocess.IntensityRule("ct", ct_window=(-1024.0, 1024.0))
    found = preprocess.network_image(scan, (8, 4, 2), rule, placement=placement)
    found = found[0, ..., 0]
    np.testing.assert_allclose(found[[0, 1, 6, 7]], 24 / 2048)
    scaled = (array + 1024) / 2048
    np.testing.assert_allclose(found[2:6], scaled[:, :, 1:3], rtol=1e-6)
    labels = preprocess.network_labels(
        volume(array.astype("i4"), spacing=1.0), (8, 4, 2), placement=placement
    )
    assert set(np.unique(labels)) == {0, 50, 200}
    np.testing.assert_array_equal(labels[0, 2:6, ..., 0], array[:, :, 1:3])
    inverted = preprocess.network_image(
        scan, (8, 4, 2), rule, placement=placement, inverted=True
    )
    np.testing.assert_allclose(inverted[0, ..., 0], 1 - found, atol=1e-6)


def test_padding_shifts_by_whole_voxels_and_resamples_between():
    rng = np.random.default_rng(1)
    array = rng.uniform(size=(6, 5, 7)).astype("f4")
    grid = Grid(array.shape, np.diag([1.5, 1.0, 3.0, 1.0]))
    placement = network_grid.ResamplingRule("pad_crop", spacing_mm=2.0)
    found = placement.image(array, grid, (7, 4, 9), outside=-1.0)
    at = [
        (np.arange(m) - (m - 1) / 2) * 2.0 / spacing + (n - 1) / 2
        for n, m, spacing in zip(array.shape, found.shape, (1.5, 1, 3), strict=True)
    ]
    points = np.stack(np.meshgrid(*at, indexing="ij"))
    expected = ndimage.map_coordinates(
        array.astype(np.float64), points, order=1, mode="nearest"
    )
    ends = np.array(array.shape).reshape(3, 1, 1, 1) - 0.5
    beyond = ((points < -0.5) | (points > ends)).any(0)
    assert 0 < beyond.sum() < beyond.size
    np.testing.assert_allclose(found, np.where(beyond, -1, expected), atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"resize": "cubic"}, 'resize is "cubic", expected one of half_pixel'),
        ({"axes": "lps"}, 'axes is "lps"'),
        ({"spacing_mm": 0}, "spacing_mm is 0"),
    ],
)
def test_placements_that_do_not_exist_are_refused(fields, said):
    with pytest.raises(UserError, match=said):
        network_grid.ResamplingRule(**fields)


@pytest.mark.parametrize("resize", ["half_pixel", "aligned", "pad_crop"])
@pytest.mark.parametrize("axes", ["kji", "ijk", "spl"])
def test_placement_survives_in_words(resize, axes):
    placement = network_grid.ResamplingRule(
        resize, axes, 1.25 if resize == "pad_crop" else 2.0
    )
    assert network_grid.ResamplingRule.of_weights(placement.to_dict()) == placement
    assert network_grid.ResamplingRule.of_weights({}) == network_grid.AS_GRADICON


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("ct", "CT", True), ("ct", "mri", False), ("t1", "ct", False),
        ("t1", "T1w", True), ("t1", "t2", False), ("t1c", "t1", False),
        ("mr", "mri", True), ("mri", "t2", True), ("t2", "MR", True),
        ("fat", "water", False), ("swi", "SWI", True), ("swi", "t1", False),
        ("ct", "cbct", True), ("us", "trus", True), ("us", "mri", False),
        ("pet", "mr", False), ("pet", "ct", False), ("us", "t2", False),
    ],
)  # fmt: skip
def test_same_contrast(first, second, same):
    assert modality.same_contrast(first, second) is same
    assert modality.same_contrast(second, first) is same


NAMES = {
    "ct": "ct", "CT": "ct", " Ct ": "ct", "cbct": "ct", "CBCT": "ct", "fbct": "ct",
    "CECT": "ct", "CTA": "ct", "ldct": "ct", "CT_venous": "ct", "low-dose CT": "ct",
    "PET/CT": "mri", "spect-ct": "mri", "pet": "mri", "us": "mri", "TRUS": "mri",
    "mri": "mri", "MR": "mri", "t1": "mri", "T1w": "mri", "T1ce": "mri", "t2": "mri",
    "FLAIR": "mri", "pd": "mri", "DWI": "mri", "adc": "mri", "fa": "mri", "fat": "mri",
    "water": "mri", "swi": "mri", "contrast": "mri", "": "mri",
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_of_modalities(name):
    """Whose intensity rule holds for each, in lists, for a scan and beyond it."""
    rule = NAMES[name]
    assert modality.kind(name) == rule
    assert modality.kind(modality.canonical(name)) == rule
    scan = volume(np.linspace(-3000, 3000, 60).reshape(3, 4, 5))
    # Nothing is common at the border: air, or for other scans the minimum.
    expected = background.Background(-1000 if rule == "ct" else -3000)
    assert modality.background_of(name, scan) == expected
    seen = preprocess.normalise(
        scan.array, preprocess.IntensityRule(modality.kind(name)), source="scan"
    )
    expected = np.clip((scan.array + 1000) / 2000, 0, 1)
    assert np.allclose(seen, expected, atol=1e-6) == (rule == "ct")


def test_the_names_of_modalities():
    assert set(modality.CONTRASTS) <= {name.strip().lower() for name in NAMES} | {
        "t2w", "t1c", "t1gd",
    }  # fmt: skip
    words = ("CT", "T2w ", "swi", "MR", "CBCT", "CT_venous", "TRUS")
    known = ["ct", "t2w", "mri", "mr", "cbct", "ct", "trus"]
    assert [modality.canonical(word) for word in words] == known


@pytest.mark.parametrize("orientation", ["RAS", "LPS", "PIR", "ASL"])
@pytest.mark.parametrize("axes", ["kji", "ijk"])
def test_scans_are_turned_to_an_orientation_and_nothing_moves(orientation, axes):
    """Against nibabel's own reorientation of the same scan."""
    grid = Grid((4, 5, 6), np.array(
        [[0.1, 0.2, -1.5, 3], [0.3, 1.2, 0.1, -7], [2.0, -0.1, 0.2, 5], [0, 0, 0, 1.0]]
    ))  # fmt: skip
    array = np.random.default_rng(0).normal(size=grid.shape)
    placement = network_grid.ResamplingRule(axes=axes, orientation=orientation)
    got = placement.reoriented(Volume(array, grid))
    image = nib.Nifti1Image(array.T, grid.transposed().affine_mm)
    change = nib.orientations.ornt_transform(
        nib.orientations.io_orientation(image.affine),
        nib.orientations.axcodes2ornt(orientation),
    )
    expected = image.as_reoriented(change)
    assert network_grid.orientation_of(grid) == "".join(nib.aff2axcodes(image.affine))
    data = np.asarray(expected.dataobj)
    volume = got if axes == "ijk" else got.transposed()
    np.testing.assert_array_equal(volume.array, data)
    np.testing.assert_allclose(volume.grid.affine_mm, expected.affine, atol=1e-12)


def test_orientation_travels_with_the_placement():
    for orientation in (None, "RAS", "LPS"):
        placement = network_grid.ResamplingRule(orientation=orientation)
        assert network_grid.ResamplingRule.of_weights(placement.to_dict()) == placement
    said = {"orientation": network_grid.ANY_ORIENTATION}
    assert network_grid.ResamplingRule.of_weights(said).orientation is None
    with pytest.raises(UserError, match='orientation is "up", expected a letter'):
        network_grid.ResamplingRule(orientation="up")


def test_the_part_that_another_scan_can_meet_is_cut_out():
    large = Grid((60, 50, 40), np.diag([2.0, 2, 2, 1])[:, [2, 1, 0, 3]])
    affine = np.diag([1.0, 1, 1, 1])[:, [2, 1, 0, 3]]
    affine[:3, 3] = [30.0, 40.0, 50.0]
    small = Grid((20, 20, 20), affine)  # 10 voxels of the large one each way
    part = network_grid.part_near(large, small, np.eye(4))
    assert [(s.start, s.stop) for s in part] == [(22, 38), (17, 33), (12, 28)]
    rng = np.random.default_rng(0)
    volume = Volume(rng.random(large.shape), large)
    found = network_grid.cut(volume, part)
    np.testing.assert_array_equal(found.array, volume.array[part])
    first = large.affine_mm @ [22, 17, 12, 1]
    np.testing.assert_allclose(found.grid.affine_mm[:, 3], first)
    whole = tuple(slice(0, n) for n in small.shape)
    assert network_grid.part_near(small, large, np.eye(4)) == whole
    away = np.eye(4)
    away[:3, 3] = 1000.0
    nothing = network_grid.part_near(large, small, away)
    assert nothing == tuple(slice(0, n) for n in large.shape)
