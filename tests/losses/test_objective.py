import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from jaxreg.data import network_grid
from jaxreg.errors import UserError
from jaxreg.losses import overlap, similarity
from jaxreg.losses.objective import Objective, TaskObjective
from jaxreg.space import fields, sampling
from jaxreg.space.transform import Displacement, Transform
from jaxreg.typing import Pair

SHAPE = (12, 10, 14)


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def channels_first(array):
    return np.moveaxis(array, -1, 1)


def smooth(rng, shape, sigma=2.0):
    noise = rng.standard_normal(shape)
    values = ndimage.gaussian_filter(noise, (0, sigma, sigma, sigma, 0))
    return (values / np.abs(values).max()).astype(np.float32)


def image(rng, batch=1):
    return 0.5 + 0.5 * smooth(rng, (batch, *SHAPE, 1), 1.0)


def random_case(seed, batch=1):
    """Images, masks, labels, displacements both ways, and noise."""
    rng = np.random.default_rng(seed)
    case = {name: image(rng, batch) for name in ("A", "B", "label_A", "label_B")}
    for name in "AB":
        case[f"mask_{name}"] = np.zeros((batch, *SHAPE, 1), np.float32)
        case[f"mask_{name}"][:, 2:9, 1:8, 3:-1] = rng.integers(0, 3)
        levels = 4 * image(rng, batch)
        case[f"seg_{name}"] = np.where(levels > 3, 7, np.floor(levels)).astype(np.uint8)
    case["mask_A"][:, 4:6], case["mask_B"][:, 3:5] = 1, 2
    case["disp_AB"], case["disp_BA"] = (
        0.15 * smooth(rng, (batch, *SHAPE, 3)) for _ in range(2)
    )
    case["noise"] = rng.standard_normal((1, *SHAPE, 3)).astype(np.float32)
    return case


def transforms(case):
    return tuple(
        Transform((Displacement(jnp.asarray(case[f"disp_{way}"])),))
        for way in ("AB", "BA")
    )


def with_onehot(pair, moving, fixed):
    classes = overlap.shared_labels(moving, fixed)
    hot = overlap.one_hot(moving, classes), overlap.one_hot(fixed, classes)
    return dataclasses.replace(
        pair,
        moving_onehot=hot[0],
        fixed_onehot=hot[1],
        valid=jnp.asarray(overlap.valid_classes(*hot)),
    )


def pair_of(case, *names):
    """The images of a case and whichever extras are named."""
    pair = Pair(case["A"], case["B"])
    if "mask" in names:
        pair = dataclasses.replace(
            pair, moving_mask=case["mask_A"], fixed_mask=case["mask_B"]
        )
    if "label" in names:
        pair = dataclasses.replace(
            pair, moving_target=case["label_A"], fixed_target=case["label_B"]
        )
    if "seg" in names:
        pair = with_onehot(pair, case["seg_A"], case["seg_B"])
    return pair


# Small arrays: compiling takes longer than running.
FAST_COMPILE = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


def evaluate(objective, forward, backward, pair, noise):
    call = jax.jit(
        lambda *arguments: objective(*arguments), compiler_options=FAST_COMPILE
    )
    return call(forward, backward, pair, noise)


def value_and_gradient(objective, case, pair, noise):
    """((loss, parts), gradients with respect to both displacement fields)."""

    def loss_of(displacements, pair, noise):
        moved = [Transform((Displacement(u),)) for u in displacements]
        return objective(*moved, pair, noise)

    # The images are arguments: as constants they would be folded while compiling.
    call = jax.jit(
        jax.value_and_grad(loss_of, has_aux=True), compiler_options=FAST_COMPILE
    )
    return call([jnp.asarray(case[k]) for k in ("disp_AB", "disp_BA")], pair, noise)


# name of the reference variant: objective, what the pair holds
VARIANTS = {
    "eval_lncc": (Objective(), ()),
    "eval_lncc2": (Objective(similarity="lncc2"), ()),
    "eval_mind": (Objective(similarity="mind"), ()),
    "eval_lncc2_mask": (Objective(similarity="lncc2", loss_masking=True), ("mask",)),
    "eval_lncc2_label": (Objective(similarity="lncc2"), ("label",)),
    "eval_lncc_dice": (Objective(dice_weight=0.7), ("seg",)),
    "eval_lncc_ic": (Objective(intensity_conservation=True), ()),
    "icon_dense": (Objective(stride=1, noise_scale=1.0, outside="edge"), ()),
    "icon_sparse": (Objective(outside="edge"), ()),
}


@functools.cache
def net_case(golden):
    g = golden("unigradicon_net_small")
    names = ("A", "B", "mask_A", "mask_B", "seg_A", "seg_B", "label_A", "label_B")
    case = {name: channels_last(g[name]) for name in (*names, "noise")}
    grid = np.asarray(sampling.identity(case["A"].shape[1:4]))
    for way in ("AB", "BA"):
        case[f"disp_{way}"] = channels_last(g[f"phi_{way}"]) - grid
    return g, case


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_parts_match_reference(golden, variant):
    # Not the inverse consistency: the stored maps know the network's function only at
    # the grid's voxels, that term asks for it in between.
    g, case = net_case(golden)
    objective, extras = VARIANTS[variant]
    pair = pair_of(case, *extras)
    loss, parts = evaluate(objective, *transforms(case), pair, case["noise"])
    expected = {
        "similarity": "similarity_loss",
        "transform_magnitude": "transform_magnitude",
        "dice": "dice_loss",
    }
    for name in set(parts) & set(expected):
        np.testing.assert_allclose(
            parts[name], g[f"{variant}/{expected[name]}"], rtol=1e-5, err_msg=name
        )
    # A cell of almost no volume may change sign by the rounding of phi - grid.
    np.testing.assert_allclose(parts["folds"], g[f"{variant}/flips"], atol=2)
    assert ("dice" in parts) == (f"{variant}/dice_loss" in g)
    total = (
        objective.inverse_consistency_weight * parts["inverse_consistency"]
        + parts["similarity"]
        + objective.dice_weight * parts.get("dice", 0.0)
    )
    np.testing.assert_allclose(loss, total, rtol=1e-6)
    np.testing.assert_allclose(loss, parts["loss"], rtol=0)


@pytest.mark.golden
@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_match_reference(golden, variant):
    g = golden("unigradicon_net_small")
    objective, _ = VARIANTS[variant]
    part = {k.split("/")[1]: v for k, v in g.items() if k.startswith(f"{variant}/")}
    total = (
        objective.inverse_consistency_weight * part["inverse_consistency_loss"]
        + part["similarity_loss"]
        + objective.dice_weight * part.get("dice_loss", 0.0)
    )
    np.testing.assert_allclose(total, part["all_loss"], rtol=1e-5)


@pytest.mark.golden
def test_warps_match_reference(golden):
    g, case = net_case(golden)
    close = dict(rtol=1e-5, atol=1e-6)
    for image_name, way in (("A", "AB"), ("B", "BA")):
        warped = fields.warp(
            case[image_name], channels_last(g[f"phi_{way}"]), outside="zeros"
        )
        np.testing.assert_allclose(
            warped, channels_last(g[f"warped_{image_name}"]), **close
        )
    warped = fields.warp(case["label_A"], channels_last(g["phi_AB"]))
    np.testing.assert_allclose(warped, channels_last(g["warped_label_A"]), **close)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["lncc", "lncc2", "mind"])
def test_similarity_of_the_warped_images_matches_reference(golden, name):
    g, case = net_case(golden)
    measure = similarity.SIMILARITIES[name]
    value = measure(channels_last(g["warped_A"]), case["B"]) + measure(
        channels_last(g["warped_B"]), case["A"]
    )
    np.testing.assert_allclose(value, g[f"eval_{name}/similarity_loss"], rtol=1e-5)
    double = g.get(f"eval_{name}_f64/similarity_loss", np.nan)
    if np.isfinite(double):
        np.testing.assert_allclose(value, double, rtol=1e-5)


LIVE = {
    "lncc": (Objective(), ()),
    "lncc2_sigma3": (Objective("lncc2", (("sigma", 3),)), ()),
    "mind": (Objective("mind", (("radius", 1), ("dilation", 3))), ()),
    "mask": (Objective(loss_masking=True), ("mask",)),
    "mind_mask": (Objective("mind", loss_masking=True), ("mask",)),
    "label": (Objective("lncc2"), ("label",)),
    "dice": (Objective(dice_weight=0.3), ("seg",)),
    "conservation": (Objective(intensity_conservation=True), ()),
    "everything": (
        Objective(
            "lncc2",
            inverse_consistency_weight=0.4,
            dice_weight=2.0,
            loss_masking=True,
            intensity_conservation=True,
        ),
        ("mask", "label", "seg"),
    ),
    "icon_sparse": (Objective(outside="edge"), ()),
    "icon_dense": (Objective(stride=1, noise_scale=1.0, outside="edge"), ()),
    "icon_ncc": (Objective("ncc", outside="edge"), ()),
    "icon_mse": (Objective("mse", outside="edge"), ()),
}


def live_similarity(icon, objective):
    options = {"lncc": {"sigma": 5}, "lncc2": {"sigma": 5}}
    options["mind"] = {"radius": 2, "dilation": 2}
    name = objective.similarity
    chosen = options.get(name, {}) | dict(objective.similarity_options)
    losses = icon.losses
    classes = {"lncc": losses.LNCC, "lncc2": losses.SquaredLNCC, "mse": losses.SSD}
    classes |= {"mind": losses.MINDSSC, "ncc": losses.NCC}
    return classes[name](**chosen)


def live_loss(icon, unigradicon, objective, extras, case):
    """The PyTorch program on a network that predicts the case's displacements.

    Returns its record, the gradients of the loss, and the noise that it drew.
    """
    torch = pytest.importorskip("torch")
    tensor = {k: torch.tensor(channels_first(v)) for k, v in case.items()}
    predicted = [tensor[k].requires_grad_() for k in ("disp_AB", "disp_BA")]

    class Known(torch.nn.Module):
        calls = 0

        def forward(self, image_a, image_b):
            self.calls += 1
            return predicted[(self.calls - 1) % 2]

    network = icon.FunctionFromVectorField(Known())
    measure = live_similarity(icon, objective)
    weight = objective.inverse_consistency_weight
    inputs = [tensor["A"], tensor["B"]]
    keywords = {}
    if objective.outside == "edge":
        dense = objective.stride == 1
        kind = icon.losses.GradientICON if dense else icon.losses.GradientICONSparse
        model = kind(network, measure, lmbda=weight)
    else:
        model = unigradicon.GradientICONSparse(
            network,
            measure,
            lmbda=weight,
            use_label="label" in extras,
            apply_intensity_conservation_loss=objective.intensity_conservation,
            dice_loss_weight=objective.dice_weight,
            loss_function_masking=objective.loss_masking,
        )
        keywords = {"mask": "mask", "label": "label", "seg": "segmentation"}
        keywords = {
            f"{keywords[extra]}_{side}": tensor[f"{extra}_{side}"]
            for extra in extras
            for side in "AB"
        }
    model.assign_identity_map([1, 1, *SHAPE])
    torch.manual_seed(0)
    noise = torch.randn(1, 3, *SHAPE).numpy()
    torch.manual_seed(0)
    record = model(*inputs, **keywords)
    gradients = torch.autograd.grad(record.all_loss, predicted)
    return record, [channels_last(g.numpy()) for g in gradients], channels_last(noise)


BATCHES_OF_TWO = ("mind", "everything", "icon_dense")
# Compiling the derivative is most of this file's time; these cover every term.
WITH_GRADIENT = {("lncc", 1), ("icon_ncc", 1), ("mind", 2), ("everything", 2)}


@pytest.mark.torch
@pytest.mark.parametrize(
    ("variant", "batch"), [*((v, 1) for v in LIVE), *((v, 2) for v in BATCHES_OF_TWO)]
)
def test_objective_matches_live_program(icon, unigradicon, variant, batch):
    objective, extras = LIVE[variant]
    case = random_case(1, batch)
    record, gradients, noise = live_loss(icon, unigradicon, objective, extras, case)
    pair = pair_of(case, *extras)
    if (variant, batch) in WITH_GRADIENT:
        (loss, parts), gradient = value_and_gradient(objective, case, pair, noise)
        for ours, theirs in zip(gradient, gradients, strict=True):
            assert np.linalg.norm(ours - theirs) < 1e-3 * np.linalg.norm(theirs)
    else:
        loss, parts = evaluate(objective, *transforms(case), pair, noise)
    # The inverse consistency divides float32 differences by 1e-3.
    np.testing.assert_allclose(loss, record.all_loss.item(), rtol=1e-4)
    np.testing.assert_allclose(
        parts["inverse_consistency"], record.inverse_consistency_loss.item(), rtol=1e-4
    )
    np.testing.assert_allclose(
        parts["similarity"], record.similarity_loss.item(), rtol=2e-5
    )
    np.testing.assert_allclose(
        parts["transform_magnitude"], record.transform_magnitude.item(), rtol=1e-5
    )
    np.testing.assert_allclose(parts["folds"], record.flips.item(), atol=1)
    if objective.dice_weight:
        np.testing.assert_allclose(parts["dice"], record.dice_loss.item(), rtol=1e-5)


def test_identity_transforms_of_one_image_cost_almost_nothing():
    case = random_case(2)
    case["disp_AB"], case["disp_BA"] = 0 * case["disp_AB"], 0 * case["disp_BA"]
    case["B"], case["seg_B"] = case["A"], case["seg_A"]
    objective = Objective("mse", dice_weight=1.0, intensity_conservation=True)
    loss, parts = evaluate(
        objective, *transforms(case), pair_of(case, "seg"), case["noise"]
    )
    assert set(parts) == {
        "loss", "inverse_consistency", "similarity", "transform_magnitude", "folds",
        "dice",
    }  # fmt: skip
    assert all(value.shape == () for value in parts.values())
    assert abs(loss) < 1e-5
    assert parts["folds"] == 0


def test_conservation_offset_pairs_determinant_and_voxel():
    case = random_case(3)
    pair, noise = pair_of(case), case["noise"]
    forward, backward = transforms(case)
    corrected = Objective(
        "mse", intensity_conservation=True, original_conservation_offset=False
    )
    original = dataclasses.replace(corrected, original_conservation_offset=True)
    value = evaluate(corrected, forward, backward, pair, noise)[1]["similarity"]
    expected = 0.0
    for moving, transform, fixed in (
        (case["A"], forward, case["B"]),
        (case["B"], backward, case["A"]),
    ):
        points = transform.map_points(sampling.identity(SHAPE))
        determinant = fields.jacobian_determinant(points)[..., None]
        warped = fields.warp(moving, points, outside="zeros")
        inside = (slice(None), *[slice(1, None)] * 3)
        expected += jnp.mean((warped[inside] * determinant - fixed[inside]) ** 2)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    quirk = evaluate(original, forward, backward, pair, noise)[1]["similarity"]
    assert abs(quirk - value) > 1e-3 * value


def test_one_target_image_switches_both_warps_to_the_edge_rule():
    case = random_case(4)
    forward, backward = transforms(case)
    pair = Pair(case["A"], case["B"], moving_target=case["A"])
    labelled = evaluate(Objective(), forward, backward, pair, case["noise"])
    edge = evaluate(
        Objective(outside="edge"), forward, backward, pair_of(case), case["noise"]
    )
    zeros = evaluate(Objective(), forward, backward, pair_of(case), case["noise"])
    assert labelled[0] == edge[0]
    assert labelled[0] != zeros[0]


@pytest.mark.parametrize("name", similarity.SIMILARITIES)
def test_every_similarity_has_a_finite_gradient(name):
    case = random_case(5)
    pair, noise = pair_of(case, "mask"), case["noise"]
    objective = Objective(name, loss_masking=True)
    for part in value_and_gradient(objective, case, pair, noise)[1]:
        assert np.isfinite(part).all()
        assert np.abs(part).max() > 0


def test_objective_is_a_static_argument():
    assert hash(Objective("lncc", (("sigma", 3),))) == hash(
        Objective("lncc", (("sigma", 3),))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "lcc"}, "unknown similarity 'lcc'; choose one of lncc, lncc2"),
        ({"dice_weight": -1.0}, "dice_weight is -1.0"),
        ({"inverse_consistency_weight": float("nan")}, "must be >= 0"),
        (
            {"similarity_options": (("radius", 2),)},
            "lncc takes no option radius, only sigma; give .* sigma=5 or None",
        ),
        (
            {"similarity": "ncc", "similarity_options": (("sigma", 5),)},
            "ncc takes no option sigma; give `objective.similarity_options` None",
        ),
        (
            {"similarity": "mind", "similarity_options": (("axis", "data"),)},
            "no option axis, only radius, dilation",
        ),
        ({"similarity_options": (("sigma", 2.5),)}, "sigma .* is 2.5, .* at least 1"),
        ({"similarity_options": (("sigma", True),)}, "sigma .* is True"),
        ({"similarity": "nmi", "similarity_options": (("bins", 3),)}, "at least 4"),
        (
            {"similarity": "nmi", "similarity_options": (("intensity_range", (1, 0)),)},
            "two numbers, the lower first",
        ),
    ],
)
def test_choices_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        Objective(**options)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (Objective(loss_masking=True), "needs a mask"),
        (Objective(dice_weight=0.5), "Dice weight of 0.5 needs a segmentation"),
    ],
)
def test_missing_parts_of_the_pair_are_named(objective, message):
    case = random_case(6)
    with pytest.raises(UserError, match=message):
        objective(*transforms(case), pair_of(case), case["noise"])


# --- one direction, smoothness, a prompt bank's terms ---------------------------------


def test_forward_alone_is_the_first_half_and_needs_no_backward():
    case = random_case(20)
    forward, backward = transforms(case)
    pair = pair_of(case)
    one = Objective(
        similarity="mse", inverse_consistency_weight=0.0, directions="forward"
    )
    loss, parts = evaluate(one, forward, None, pair, case["noise"])
    warped = fields.warp(pair.moving, forward.on_grid(SHAPE), outside="zeros")
    np.testing.assert_allclose(loss, similarity.mse(warped, pair.fixed), rtol=1e-5)
    turned = Pair(pair.fixed, pair.moving)
    other = evaluate(one, backward, None, turned, case["noise"])[0]
    both = dataclasses.replace(one, directions="both")
    whole = evaluate(both, forward, backward, pair, case["noise"])[0]
    np.testing.assert_allclose(whole, loss + other, rtol=1e-5)
    assert parts["inverse_consistency"] == 0


def test_smoothness_is_the_mean_squared_difference_in_voxels():
    case = random_case(21)
    forward, backward = transforms(case)
    noise = case["noise"]
    plain = Objective(similarity="mse", inverse_consistency_weight=0.0)
    smooth_one = dataclasses.replace(plain, smoothness_weight=0.25)
    before = evaluate(plain, forward, backward, pair_of(case), noise)[0]
    loss, parts = evaluate(smooth_one, forward, backward, pair_of(case), noise)
    expected = 0.0
    for way in ("AB", "BA"):
        voxels = case[f"disp_{way}"].astype(np.float64) * (np.array(SHAPE) - 1)
        squares = [np.mean(np.diff(voxels, axis=axis) ** 2) for axis in (1, 2, 3)]
        expected += np.mean(squares)
    np.testing.assert_allclose(parts["smoothness"], expected, rtol=1e-5)
    np.testing.assert_allclose(loss, before + 0.25 * expected, rtol=1e-5)


def test_each_pair_may_have_its_own_weight_of_smoothness():
    case = random_case(23, batch=2)
    forward, _ = transforms(case)
    weights = (0.25, 3.0)
    plain = Objective(
        similarity="mse", inverse_consistency_weight=0.0, directions="forward"
    )
    pair = dataclasses.replace(pair_of(case), smoothness=jnp.array(weights))
    loss, parts = evaluate(plain, forward, None, pair, case["noise"])
    of_each = []
    for i, weight in enumerate(weights):
        one = jax.tree.map(lambda leaf, i=i: leaf[i : i + 1], (forward, pair_of(case)))
        weighted = dataclasses.replace(plain, smoothness_weight=weight)
        of_each.append(evaluate(weighted, one[0], None, one[1], case["noise"]))
    np.testing.assert_allclose(loss, np.mean([o[0] for o in of_each]), rtol=1e-5)
    np.testing.assert_allclose(
        parts["smoothness"], np.mean([o[1]["smoothness"] for o in of_each]), rtol=1e-5
    )
    # The same where each pair has its own objective.
    both = TaskObjective((plain, dataclasses.replace(plain, similarity="ncc")))
    chosen = dataclasses.replace(pair, objective=jnp.zeros(2, jnp.int32))
    again, parts_again = evaluate(both, forward, None, chosen, case["noise"])
    np.testing.assert_allclose(again, loss, rtol=1e-5)
    np.testing.assert_allclose(
        parts_again["smoothness"], parts["smoothness"], rtol=1e-5
    )


def test_a_models_own_terms_enter_with_their_weights():
    case = random_case(22, batch=2)
    objective = Objective(similarity="mse", orthogonality_weight=0.5, task_weight=2.0)
    aux = {
        "orthogonality": jnp.array([0.4, 0.4]),
        "task_similarity": jnp.array([1.0, 3.0]),
        "task_weights": jnp.ones((2, 3)) / 3,
    }
    arguments = (*transforms(case), pair_of(case), case["noise"])
    plain = evaluate(Objective(similarity="mse"), *arguments)[0]
    loss, parts = objective(*arguments, aux=aux)
    np.testing.assert_allclose(parts["orthogonality"], 0.4, rtol=1e-6)
    np.testing.assert_allclose(parts["task_similarity"], 2.0, rtol=1e-6)
    np.testing.assert_allclose(loss, plain + 0.5 * 0.4 + 2.0 * 2.0, rtol=1e-5)
    with pytest.raises(UserError, match="weight for orthogonality"):
        objective(*arguments)


def test_inverse_consistency_in_one_direction_is_refused():
    with pytest.raises(UserError, match="inverse consistency needs both"):
        Objective(directions="forward")


# --- which intensities are compared ---------------------------------------------------

LOADED, SEEN = (-1024.0, 3071.0), (-800.0, 400.0)
AIR, SOFT, LIVER, BONE = -1000.0, 40.0, 120.0, 915.0


def abdomen(spine=0, liver=0):
    """A body in air with a liver and a spine, D H W, HU, moved by voxels along W."""
    shape = (32, 40, 40)
    place = np.moveaxis(np.indices(shape), 0, -1)

    def within(centre, radii):
        return np.sum(((place - centre) / radii) ** 2, -1) < 1

    hu = np.full(shape, AIR, np.float32)
    hu[within((16, 20, 20), (60, 17, 19))] = SOFT
    hu[within((16, 18, 12 + liver), (12, 9, 9))] = LIVER
    hu[within((16, 31, 20 + spine), (60, 3, 3))] = BONE
    return hu


def cost(moved, seen):
    """What displaced organs add to a global NCC, by the objective and by NumPy."""
    stored = [(a - LOADED[0]) / (LOADED[1] - LOADED[0]) for a in (moved, abdomen())]
    moving, fixed = (jnp.asarray(a)[None, ..., None] for a in stored)
    part = None
    if seen != LOADED:
        part = jnp.asarray([network_grid.part_of(seen, LOADED)], jnp.float32)
    pair = Pair(moving, fixed, similarity_range=part)
    objective = Objective("ncc", inverse_consistency_weight=0.0, directions="forward")
    noise = jnp.zeros((1, *fixed.shape[1:4], 3))
    _, parts = objective(Transform(()), None, pair, noise)
    cut = [np.clip(a, *seen).astype(np.float64).ravel() for a in (moved, abdomen())]
    expected = 1 - np.corrcoef(*cut)[0, 1]
    np.testing.assert_allclose(parts["similarity"], expected, atol=2e-6)
    return expected


def test_bone_does_not_drown_an_organ_in_the_window_that_is_compared():
    """A spine moved by 2 voxels against a liver moved as far."""
    ratios = [
        cost(abdomen(spine=2), seen) / cost(abdomen(liver=2), seen)
        for seen in (LOADED, SEEN)
    ]
    np.testing.assert_allclose(ratios, [58.5, 9.9], rtol=0.02)
    # In a global NCC an organ counts by the square of its contrast.
    contrast = (BONE - SOFT) / (SEEN[1] - SOFT)
    np.testing.assert_allclose(ratios[0] / ratios[1], contrast**2, rtol=0.02)


@pytest.mark.parametrize("targets", [False, True])
def test_the_similarity_sees_images_cut_before_they_are_warped(targets):
    """As if each pair had been loaded in its own window, also beyond the grid."""
    case = random_case(7, batch=2)
    ranges = np.float32([[0.1, 0.4], [0.3, 0.8]])
    low, high = (ranges[:, i].reshape(2, 1, 1, 1, 1) for i in (0, 1))
    images = {"moving": case["A"], "fixed": case["B"]}
    if targets:
        images |= {"moving_target": case["label_A"], "fixed_target": case["label_B"]}
    loaded = {n: np.clip((a - low) / (high - low), 0, 1) for n, a in images.items()}
    for name in ("ncc", "lncc", "mse", "box_ncc"):
        objective = Objective(name)
        several = TaskObjective((objective,))
        for score, own in ((objective, {}), (several, {"objective": np.array([0, 0])})):
            found, expected = (
                score(*transforms(case), Pair(**pair), case["noise"])[1]
                for pair in (
                    {**images, **own, "similarity_range": jnp.asarray(ranges)},
                    {**loaded, **own},
                )
            )
            for part, value in expected.items():
                np.testing.assert_allclose(found[part], value, rtol=1e-5, err_msg=part)
