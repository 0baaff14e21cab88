import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxreg.errors import UserError
from jaxreg.losses import overlap

SHAPE = (5, 6, 7)


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def labels(seed, highest=4, batch=1):
    rng = np.random.default_rng(seed)
    return rng.integers(0, highest, (batch, *SHAPE, 1))


@pytest.mark.golden
def test_dice_matches_reference(golden):
    g = golden("gradicon_losses")
    a, b = channels_last(g["dice_label_A"]), channels_last(g["dice_label_B"])
    classes = overlap.shared_labels(a, b)
    assert classes == tuple(g["dice_shared_classes"])
    hot_a, hot_b = overlap.one_hot(a, classes), overlap.one_hot(b, classes)
    valid = overlap.valid_classes(hot_a, hot_b)
    loss = jax.jit(overlap.dice_loss)
    close = dict(rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        loss(hot_a, hot_b, valid), g["dice_loss_unwarped"], **close
    )
    np.testing.assert_allclose(loss(hot_a, hot_b), g["dice_loss_no_valid"], **close)
    soft = channels_last(g["dice_soft_pred"])
    np.testing.assert_allclose(loss(soft, hot_b, valid), g["dice_loss_soft"], **close)


@pytest.mark.golden
def test_dice_of_a_batch_with_an_absent_class_matches_reference(golden):
    g = golden("gradicon_losses")
    first, second, b = (
        channels_last(g[f"dice_label_{k}"]) for k in ("A", "A_second", "B")
    )
    a, b = np.concatenate([first, second]), np.concatenate([b, b])
    classes = overlap.shared_labels(a, b)
    hot_a, hot_b = overlap.one_hot(a, classes), overlap.one_hot(b, classes)
    valid = overlap.valid_classes(hot_a, hot_b)
    np.testing.assert_array_equal(valid, g["dice_valid_batch"])
    np.testing.assert_allclose(
        overlap.dice_loss(hot_a, hot_b, valid), g["dice_loss_batch"], rtol=1e-5
    )


def test_shared_labels_leaves_out_background_and_negative_labels():
    a, b = np.array([-1, 0, 3, 9, 7]), np.array([9, 3, 0, -1, 5], np.int16)
    assert overlap.shared_labels(a, b) == (3, 9)


def test_shared_labels_names_what_it_found():
    with pytest.raises(UserError, match=r"moving has \[1\], fixed has \[2\]"):
        overlap.shared_labels(np.array([0, 1]), np.array([0, 2]))


@pytest.mark.parametrize("odd", [0.5, np.nan])
def test_shared_labels_refuses_fractions(odd):
    with pytest.raises(UserError, match=f"fixed segmentation contains {odd}"):
        overlap.shared_labels(np.array([0, 1]), np.array([0.0, 1.0, odd]))


def test_one_hot_drops_unlisted_labels():
    values = np.array([-2, 0, 1, 2, 5]).reshape(1, 5, 1, 1, 1)
    hot = np.asarray(overlap.one_hot(values, (2, 5)))
    assert hot.shape == (1, 5, 1, 1, 2)
    np.testing.assert_array_equal(hot[0, :, 0, 0], [[0, 0]] * 3 + [[1, 0], [0, 1]])


def test_valid_classes_names_the_pair_without_one():
    a, b = labels(0, batch=2), labels(1, batch=2)
    a[1] = 0
    with pytest.raises(UserError, match="pair 1"):
        overlap.valid_classes(overlap.one_hot(a, (1, 2)), overlap.one_hot(b, (1, 2)))


def test_dice_loss_leaves_out_a_pair_without_valid_class():
    a, b = (overlap.one_hot(labels(i, batch=2), (1, 2, 3)) for i in (0, 1))
    valid = np.array([[True, False, True], [False] * 3])
    np.testing.assert_allclose(
        overlap.dice_loss(a, b, valid),
        overlap.dice_loss(a[:1], b[:1], valid[:1]),
        rtol=1e-6,
    )
    assert np.isfinite(jax.grad(overlap.dice_loss)(a, b, valid & False)).all()


def test_dice_loss_checks_shapes():
    with pytest.raises(ValueError, match="target"):
        overlap.dice_loss(np.zeros((1, 2, 2, 2, 1)), np.zeros((1, 2, 2, 2, 2)))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_dice_loss_lies_between_zero_and_one(seed, softness):
    hot = np.asarray(overlap.one_hot(labels(seed), (1, 2, 3)))
    other = np.asarray(overlap.one_hot(labels(seed + 1), (1, 2, 3)))
    loss = overlap.dice_loss(softness * other + (1 - softness) * hot, hot)
    assert -1e-6 <= loss <= 1
    np.testing.assert_allclose(overlap.dice_loss(hot, hot), 0.0, atol=1e-6)
