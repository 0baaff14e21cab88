"""Augmentation against the reference arrays, against PyTorch and by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.data import augment
from jaxreg.data.augment import Augmentation
from jaxreg.errors import UserError
from jaxreg.space import sampling

SHAPE = (6, 7, 5)
COUNT = 4
CLASSES = (1, 3, 9)
PLAIN = Augmentation(noise=0.0)
STRONG = Augmentation(noise=0.1)


def key(number=0):
    return jax.random.key(number)


def smooth(seed, count=COUNT, shape=SHAPE):
    """Ramps of random direction, N D H W 1, in [0, 1]."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.arange(n) / n for n in shape], indexing="ij"))
    ramps = np.einsum("nc,cdhw->ndhw", rng.normal(size=(count, 3)), places)
    low = ramps.min((1, 2, 3), keepdims=True)
    ramps = (ramps - low) / np.ptp(ramps, (1, 2, 3), keepdims=True)
    return ramps[..., None].astype(np.float32)


@pytest.fixture(scope="module")
def batch():
    moving, fixed = smooth(0), smooth(1)
    labels = (moving > 0.5) + 2 * (fixed > 0.5)
    return {
        "moving": moving,
        "fixed": fixed,
        "moving_target": 0.5 * moving + 0.25,
        "fixed_target": 0.3 * fixed,
        "moving_labels": labels.astype(np.int32),
        "fixed_labels": (9 * (fixed > 0.5)).astype(np.int32),
        "moving_mask": (2 * (moving > 0.5)).astype(np.uint8),
        "fixed_mask": (fixed > 0.5).astype(np.uint8),
        "task": np.arange(COUNT, dtype=np.int32),
        "index": np.arange(COUNT),
        "something_else": np.zeros(3),
    }


# Compiled as a whole: operation by operation takes longer.
_draw = jax.jit(augment.draw, static_argnums=2)
transform_image = jax.jit(augment.transform_image, static_argnames=("order", "aligned"))


@functools.partial(jax.jit, static_argnums=(2,), static_argnames=("classes",))
def to_pair(arrays, number, config, classes=CLASSES):
    return augment.to_pair(arrays, jax.random.key(number), config, classes=classes)


def draw(key, count, config, first=0):
    return _draw(key, np.arange(first, first + count), config)


@pytest.fixture(scope="module")
def augmented(batch):
    return jax.device_get(to_pair(batch, 5, STRONG))


# --- reading through a matrix ---------------------------------------------------------


@pytest.mark.golden
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize(("name", "order"), [("image", 1), ("label", 0)])
def test_golden(golden, name, order, aligned):
    g = golden("gradicon_preprocess")
    array, expected = (
        np.moveaxis(g[k], 1, -1)
        for k in (f"aug_{name}", f"aug_{name}_align_{str(aligned).lower()}")
    )
    got = transform_image(array, g["aug_theta"], order=order, aligned=aligned)
    assert got.dtype == array.dtype
    # A point half-way between two voxels may take either.
    off = np.abs(np.asarray(got) - expected) > 1e-5
    assert off.sum() <= (0 if order else 1e-3 * off.size)


@pytest.mark.golden
def test_axes_of_the_golden_file_matter(golden):
    """The check above would see two axes swapped."""
    g = golden("gradicon_preprocess")
    image = np.moveaxis(g["aug_image"], 1, -1)
    expected = np.moveaxis(g["aug_image_align_true"], 1, -1)
    got = transform_image(image, g["aug_theta"][:, [1, 0, 2]], aligned=True)
    assert np.abs(np.asarray(got) - expected).max() > 0.1


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:Since version 1.3.0")  # on axes of one voxel
@pytest.mark.parametrize("aligned", [True, False])
def test_torch(aligned):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(2)
    thin = (5, 8, 1)  # one axis of a single voxel
    for size, order, mode in (
        (SHAPE, 1, "bilinear"), (SHAPE, 0, "nearest"), (thin, 1, "bilinear")
    ):  # fmt: skip
        image = rng.random((2, *size, 2), np.float32)
        theta = draw(key(int(aligned)), 2, Augmentation(noise=0.3))[0]
        source = torch.tensor(np.moveaxis(image, -1, 1))
        grid = torch.nn.functional.affine_grid(
            torch.tensor(np.asarray(theta)), list(source.shape), align_corners=aligned
        )
        expected = torch.nn.functional.grid_sample(
            source, grid, mode=mode, padding_mode="border", align_corners=aligned
        )
        got = transform_image(image, theta, order=order, aligned=aligned)
        got = np.moveaxis(np.asarray(got), -1, 1)
        np.testing.assert_allclose(got, expected.numpy(), atol=1e-5)


def test_ties_go_to_the_even_voxel():
    labels = np.arange(5, dtype=np.int32).reshape(1, 5, 1, 1, 1)
    theta = np.eye(3, 4, dtype=np.float32)[None]
    theta[0, 2, 3] = 0.25  # half of the distance between five aligned voxels, along D
    got = transform_image(labels, theta, order=0, aligned=True)
    np.testing.assert_array_equal(np.ravel(got), [0, 2, 2, 4, 4])


def test_identity_leaves_the_image():
    image = smooth(3)
    theta = jnp.tile(jnp.eye(3, 4), (COUNT, 1, 1))
    got = transform_image(image, theta)
    np.testing.assert_allclose(got, image, atol=1e-6)
    points = augment.source_points(theta[:1], SHAPE, aligned=True)
    np.testing.assert_allclose(points, sampling.identity(SHAPE), atol=1e-6)


def test_permutation_stretches_unequal_axes():
    # x and z exchanged: what ran along W now runs along D, from corner to corner.
    ramp = np.broadcast_to(np.linspace(0, 1, 5), SHAPE)[None, ..., None]
    theta = np.eye(3, 4)[[2, 1, 0]][None].astype(np.float32)
    got = transform_image(ramp.astype(np.float32), theta, aligned=True)
    expected = np.broadcast_to(np.linspace(0, 1, 6)[:, None, None], SHAPE)
    np.testing.assert_allclose(got[0, ..., 0], expected, atol=1e-6)
    # Edge to edge: voxel i of 6 reads (i + 0.5) * 5 / 6 - 0.5.
    got = transform_image(ramp.astype(np.float32), theta)
    expected = np.clip((np.arange(6) + 0.5) * 5 / 6 - 0.5, 0, 4) / 4
    np.testing.assert_allclose(got[0, :, 0, 0, 0], expected, atol=1e-6)


# --- what is drawn --------------------------------------------------------------------


def test_all_signed_permutations_occur_and_are_shared():
    moving, fixed = draw(key(), 4800, PLAIN)
    np.testing.assert_array_equal(moving, fixed)
    np.testing.assert_array_equal(moving[..., 3], 0)
    found, counts = np.unique(
        np.asarray(moving[..., :3]).reshape(-1, 9), axis=0, return_counts=True
    )
    expected = {
        tuple((np.diag(signs) @ np.eye(3)[list(order)]).ravel())
        for order in itertools.permutations(range(3))
        for signs in itertools.product((-1, 1), repeat=3)
    }
    assert {tuple(row) for row in found} == expected
    assert len(expected) == 48
    # 100 expected of each; 5 standard deviations.
    assert counts.min() > 50
    assert counts.max() < 150


@pytest.mark.parametrize(
    ("config", "kinds"),
    [
        (Augmentation(permute=False, noise=0), 8),
        (Augmentation(flip=False, noise=0), 6),
        (Augmentation(permute=False, flip=False, noise=0), 1),
    ],
)
def test_permutations_and_flips_can_be_left_out(config, kinds):
    theta = np.asarray(draw(key(1), 200, config)[0])
    assert len(np.unique(theta.reshape(-1, 12), axis=0)) == kinds
    if not config.permute:
        np.testing.assert_array_equal(np.abs(theta), np.eye(3, 4)[None].repeat(200, 0))
    if not config.flip:
        assert theta.min() == 0


def test_noise_has_its_size_and_is_each_images_own():
    linear = np.asarray(draw(key(2), 3000, PLAIN)[0])
    noise = [np.asarray(t) - linear for t in draw(key(2), 3000, Augmentation())]
    for one in noise:
        assert abs(one.mean()) < 1e-3
        np.testing.assert_allclose(one.std(0), 0.05, rtol=0.08)  # each of 12 entries
        np.testing.assert_allclose(one.std(), 0.05, rtol=0.02)
    assert abs(np.corrcoef(noise[0].ravel(), noise[1].ravel())[0, 1]) < 0.02
    shared = Augmentation(noise=0.03, shared_noise=0.04)
    noise = [np.asarray(t) - linear for t in draw(key(2), 3000, shared)]
    np.testing.assert_allclose(noise[0].std(), 0.05, rtol=0.02)
    np.testing.assert_allclose((noise[0] - noise[1]).std(), 0.03 * 2**0.5, rtol=0.02)


def test_a_pair_does_not_depend_on_how_the_batch_is_split():
    whole = draw(key(3), 6, Augmentation())
    parts = [
        draw(key(3), n, Augmentation(), first=first) for first, n in ((0, 2), (2, 4))
    ]
    for one, halves in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(one, np.concatenate(halves))
        assert len(np.unique(np.asarray(one).reshape(6, -1), axis=0)) == 6
    other = draw(key(4), 6, Augmentation())
    assert not np.array_equal(whole[0], other[0])


def test_split_batches_give_the_same_pairs(batch, augmented):
    part = {k: v[2:] for k, v in batch.items() if len(v) == COUNT}
    got = to_pair({**part, "index": np.arange(2, COUNT)}, 5, STRONG)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[2:], atol=1e-6), got, augmented
    )


@pytest.mark.parametrize(
    "fields", [{"noise": -0.1}, {"noise": float("nan")}, {"shared_noise": -1}]
)
def test_impossible_noise_is_refused(fields):
    with pytest.raises(UserError, match="noise is .* at least 0"):
        Augmentation(**fields)


# --- a batch becomes a pair -----------------------------------------------------------


def test_both_images_turn_alike_but_shift_apart(batch):
    same = {"moving": batch["moving"], "fixed": batch["moving"]}
    plain = to_pair(same, 5, PLAIN)
    np.testing.assert_array_equal(plain.moving, plain.fixed)
    assert not np.allclose(plain.moving, batch["moving"], atol=0.05)
    noisy = to_pair(same, 5, STRONG)
    assert np.abs(noisy.moving - noisy.fixed).max() > 0.02
    assert plain.moving_mask is plain.valid is plain.task is plain.moving_target is None


def test_targets_take_their_images_matrix(augmented):
    """And inputs stay inputs: the erratum of multiGradICON mixed the two up."""
    np.testing.assert_allclose(
        augmented.moving_target, 0.5 * augmented.moving + 0.25, atol=1e-6
    )
    np.testing.assert_allclose(augmented.fixed_target, 0.3 * augmented.fixed, atol=1e-6)
    assert augmented.moving.max() > 0.8
    assert augmented.moving.min() < 0.2


@pytest.mark.parametrize("side", ["moving", "fixed"])
def test_masks_and_labels_take_their_images_matrix(batch, augmented, side):
    image = getattr(augmented, side)
    mask = getattr(augmented, f"{side}_mask")
    assert set(np.unique(mask)) == {0.0, 1.0}
    # A ramp changes by less than this within half a voxel of each axis.
    steps = [np.abs(np.diff(batch[side], axis=a)).max((1, 2, 3, 4)) for a in (1, 2, 3)]
    margin = np.reshape(0.5 * sum(steps) + 1e-5, (-1, 1, 1, 1, 1))
    sure = np.abs(image - 0.5) > margin
    assert sure.mean() > 0.5
    np.testing.assert_array_equal(mask[sure], image[sure] > 0.5)
    onehot = getattr(augmented, f"{side}_onehot")
    inside = onehot[..., :2].sum(-1, keepdims=True) if side == "moving" else onehot
    inside = inside if side == "moving" else inside[..., 2:]
    np.testing.assert_array_equal(inside, mask)  # the same voxels, hence the same read


def test_one_matrix_read_separately_gives_the_same(batch, augmented):
    theta = draw(key(5), COUNT, STRONG)
    for side, matrix in zip(("moving", "fixed"), theta, strict=True):
        image = transform_image(batch[side], matrix)
        np.testing.assert_allclose(getattr(augmented, side), image, atol=1e-5)
        labels = transform_image(batch[f"{side}_labels"], matrix, order=0)
        onehot = np.asarray(labels) == np.asarray(CLASSES)
        assert (getattr(augmented, f"{side}_onehot") != onehot).mean() < 1e-3


def test_without_a_config_arrays_stay(batch):
    pair = augment.to_pair(batch, None, None, classes=CLASSES)
    for name in ("moving", "fixed", "moving_target", "fixed_target", "task"):
        np.testing.assert_array_equal(getattr(pair, name), batch[name])
    np.testing.assert_array_equal(pair.moving_mask, batch["moving_mask"] > 0)
    np.testing.assert_array_equal(
        pair.moving_onehot, batch["moving_labels"] == np.asarray(CLASSES)
    )
    assert pair.moving_onehot.dtype == pair.moving_mask.dtype == np.float32
    with pytest.raises(ValueError, match="needs a key"):
        augment.to_pair(batch, None, STRONG)


def test_16_bits_become_the_unit_range(batch):
    coarse = dict(batch, moving=np.rint(batch["moving"] * 65535).astype(np.uint16))
    pair = augment.to_pair(coarse, None, None)
    assert pair.moving.dtype == np.float32
    np.testing.assert_allclose(pair.moving, batch["moving"], atol=0.6 / 65535)
    assert pair.moving.max() == 1
    assert pair.moving_onehot is None  # labels without classes
    signed = dict(batch, fixed=batch["moving_labels"])
    with pytest.raises(ValueError, match="fixed is int32, expected float or unsigned"):
        augment.to_pair(signed, None, None)


def test_flags_invert(batch):
    flags = np.array([True, False, True, False])
    names = ["moving", "fixed_target"]
    arrays = dict(batch, **{f"{name}_inverted": flags for name in names})
    pair = augment.to_pair(arrays, None, None)
    for name in ("moving", "fixed", "moving_target", "fixed_target"):
        expected = batch[name].copy()
        if name in names:
            expected[flags] = 1 - expected[flags]
        np.testing.assert_allclose(getattr(pair, name), expected, atol=1e-7)
    # Inverting before and after reading is the same, at the border as well.
    turned, plain = (to_pair(a, 5, STRONG) for a in (arrays, batch))
    np.testing.assert_allclose(turned.moving[0], 1 - plain.moving[0], atol=1e-5)


def test_valid_classes_are_in_both_images(batch):
    moving, fixed = (np.zeros((COUNT, *SHAPE, 1), np.int32) for _ in range(2))
    moving[0, :3], fixed[0, :2] = 1, 1
    moving[1, 0], moving[1, 1], fixed[1, 2], fixed[1, 3] = 1, 3, 3, 9
    moving[2] = 9  # the third pair's fixed image has no labels, the fourth has none
    arrays = dict(batch, moving_labels=moving, fixed_labels=fixed)
    pair = augment.to_pair(arrays, None, None, classes=CLASSES)
    expected = [[1, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0]]
    np.testing.assert_array_equal(pair.valid, np.array(expected, bool))


def test_valid_sees_what_augmentation_left(batch, augmented):
    inside = [
        getattr(augmented, f"{side}_onehot").any((1, 2, 3))
        for side in ("moving", "fixed")
    ]
    np.testing.assert_array_equal(augmented.valid, inside[0] & inside[1])


def test_wrong_batches_are_refused(batch):
    with pytest.raises(UserError, match="classes are 0, 1, expected positive labels"):
        augment.to_pair(batch, None, None, classes=(0, 1))
    small = dict(batch, moving_target=batch["moving_target"][:, 1:])
    with pytest.raises(ValueError, match="moving and moving_target have shapes"):
        augment.to_pair(small, None, None)
