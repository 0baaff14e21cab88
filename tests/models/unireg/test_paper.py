"""UniReg and SAME against arrays of SAME's code, and against the published sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import ndimage

from jaxreg.errors import UserError
from jaxreg.losses.objective import Objective
from jaxreg.models import sam
from jaxreg.models.unireg import features as features_lib
from jaxreg.models.unireg import paper
from jaxreg.models.unireg.features import Features
from jaxreg.models.unireg.paper import UniReg, UniRegConfig
from jaxreg.nn import halved
from jaxreg.nn.conv import api
from jaxreg.nn.correlation import normalised
from jaxreg.registration.optimization import network as network_lib
from jaxreg.space import fields
from jaxreg.space.grid import unit_scale
from jaxreg.training import state, step
from jaxreg.typing import Pair
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import convert, load

NAME = "same_unet_small"
SAME_MODULES = {
    **{f"encoder.{i}.0.conv": ("unet", f"encoder_{i}", "conv") for i in range(4)},
    **{f"decoder.{i}.0.conv": ("unet", f"decoder_{i}", "conv") for i in range(4)},
    **{f"remaining.{i}.conv": ("unet", f"remaining_{i}", "conv") for i in range(3)},
}


def channels_last(array):
    return np.moveaxis(array, 1, -1)


def check(value, reference, tolerance=1e-4):
    value, reference = np.asarray(value), np.asarray(reference)
    assert value.shape == reference.shape
    assert np.abs(value - reference).max() <= tolerance * np.abs(reference).max()


def same_params(g):
    params = {"unet": {}, "flow": {}}
    names = {f"unet_model.{k}": path for k, path in SAME_MODULES.items()}
    for key, path in (names | {"flow": ("flow",)}).items():
        tree = params
        for name in path:
            tree = tree.setdefault(name, {})
        tree["kernel"] = g[f"state/{key}.weight"].transpose(2, 3, 4, 1, 0)
        tree["bias"] = g[f"state/{key}.bias"]
    assert sum(k.startswith("state/") for k in g) == len(jax.tree.leaves(params))
    return params


@pytest.mark.golden
def test_same_matches_reference(golden):
    g = golden(NAME)
    images = [channels_last(g[name]) for name in ("moving", "fixed")]
    features = [
        Features(*(channels_last(g[f"{level}_{side}"]) for level in ("fine", "coarse")))
        for side in ("source", "target")
    ]
    check(features_lib.correlated(*features), channels_last(g["sam_corr"]), 1e-5)
    network = paper.UniRegNetwork(paper.SAME)
    shape = images[0].shape[1:4]

    def run(params, moving, fixed, source, target):
        field, seen = network.apply(
            {"params": params},
            moving,
            fixed,
            source,
            target,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        moved = fields.integrate(field, paper.SAME.integrate_steps)
        # "Background": zeros beyond an image whose least value is zero.
        low = moving.min()
        warped = fields.warp_voxels(moving - low, moved) + low
        return field, moved, warped, seen["intermediates"]["unet"]["__call__"][0]

    found = jax.jit(run)(same_params(g), *images, *features)
    velocity, moved, warped, output = map(np.asarray, found)
    check(output[:, ::4, ::4, ::4], channels_last(g["unet_out_sub"]))
    check([output.mean(), output.std(ddof=1)], g["unet_out_stats"])
    canonical = 2.0 / unit_scale(shape)
    check(velocity * canonical, channels_last(g["velocity"]))
    check(moved * canonical, channels_last(g["phi"] - g["identity"]))
    check(warped, channels_last(g["warped"]))


# --- sizes ----------------------------------------------------------------------------


POOLED = {"downsample": "maxpool"}
FLOW = {"head": "flow"}


def parameters_of(config):
    shapes = jax.eval_shape(UniReg(config).init, jax.random.key(0))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))


@pytest.mark.parametrize(
    ("change", "parameters"),
    [
        ({}, 362_317),
        (POOLED, 355_389),
        (POOLED | FLOW, 350_659),
        (FLOW, 357_587),
        ({"residual": True}, 362_317),
    ],
)
def test_published_sizes(change, parameters):
    assert parameters_of(UniRegConfig(**change)) == parameters


def test_what_joins_decides_the_sizes():
    base = parameters_of(UniRegConfig(features="mind"))
    assert base == 362_317  # correlations have 27 channels, whatever is correlated
    for change, joining in (
        ({"features": "none"}, 0),
        ({"matching": "concatenation"}, 512),
        ({"features": "mind", "matching": "concatenation"}, 48),
    ):
        count = parameters_of(UniRegConfig(**change))
        assert count - base == 27 * 32 * (joining - 27)
    static = parameters_of(UniRegConfig(head="static"))
    assert base - static == 171 * (8 + 4 + 2)


# --- behaviour ------------------------------------------------------------------------


SHAPE = (16, 32, 16)
SMALL = UniRegConfig(form="native", regions=2, tasks=((1, "inter"), (0, "intra")))


def stand_in(variables, image):
    """In place of SAM: pooled intensities and their squares, times a weight."""
    x = jnp.concatenate([image, image**2 / 50, jnp.ones_like(image)], -1)
    x = x * variables["weight"]
    return Features(
        *(
            normalised(api.average_pool(x, size))
            for size in (features_lib.FINE, features_lib.COARSE)
        )
    )


def images(seed=0, batch=2):
    rng = np.random.default_rng(seed)
    return rng.uniform(0, 0.5, size=(2, batch, *SHAPE, 1)).astype(np.float32)


def loud(variables, seed=0, size=0.1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda a: np.asarray(a) + size * rng.normal(size=a.shape).astype("f4"),
        variables,
    )


@pytest.fixture(scope="module")
def fresh():
    model = UniReg(SMALL, stand_in)
    return model, dict(model.init(jax.random.key(0), SHAPE))


SAM = {"weight": np.float32(1.0)}


def test_tasks_matter_and_a_batch_is_its_pairs(fresh):
    model, variables = fresh
    variables = loud(variables) | {"sam": SAM}

    @jax.jit
    def run(moving, fixed, task):
        prediction, after = model.apply(variables, moving, fixed, task=task)
        assert after is variables
        return prediction.transform.steps[0].field

    moving, fixed = images()
    both = np.asarray(run(moving, fixed, jnp.array([1, 0])))
    twice = [np.stack([a[0], a[0]]) for a in (moving, fixed)]
    again = np.asarray(run(*twice, jnp.array([1, 0])))
    check(both[:1], again[:1])
    assert np.abs(again[0] - again[1]).max() > 1e-3 * np.abs(again).max()


def test_fresh_network_hardly_moves_and_all_of_it_learns(fresh):
    model, variables = fresh
    moving, fixed = images(batch=1)

    def moved(trained, frozen):
        prediction, _ = model.apply(
            trained | {"sam": frozen}, moving, fixed, task=jnp.array([1]), train=True
        )
        field = prediction.transform.steps[0].field * unit_scale(SHAPE)
        return jnp.sum((field - 1.0) ** 2), field

    run = jax.jit(jax.grad(moved, (0, 1), has_aux=True))
    (gradient, frozen), field = run(variables, SAM)
    assert 0 < np.abs(field).max() < 1e-2
    for path, leaf in jax.tree_util.tree_flatten_with_path(gradient)[0]:
        assert np.isfinite(leaf).all() and np.any(leaf), path
    assert frozen["weight"] == 0
    kernel = gradient["params"]["head"]["controller"]["kernel"][0, 0, 0]
    # Pooled features, region 0 of 2, and intra of (intra, inter).
    assert list(np.any(kernel, 1)[8:]) == [True, False, True, False]


@pytest.mark.parametrize(
    "change",
    [
        {"head": "static", "features": "mind", "residual": True},
        {"head": "flow", "features": "none", "integrate_steps": 2, **POOLED},
        {"features": "mind", "matching": "concatenation", "pool_norm": True},
    ],
)
def test_forms(change):
    config = dataclasses.replace(SMALL, backbone_window=None, **change)
    model = UniReg(config)
    variables = loud(model.init(jax.random.key(1), SHAPE), size=0.02)
    task = jnp.array([0, 0]) if config.head == "dynamic" else None
    run = jax.jit(lambda m, f: model.apply(variables, m, f, task=task)[0])
    moving, fixed = images()
    field = run(moving, fixed).transform.steps[0].field
    assert field.shape == (2, *SHAPE, 3) and np.isfinite(field).all()
    assert np.ptp(np.asarray(field)) > 0
    one = run(*(np.stack([a[1], a[1]]) for a in (moving, fixed)))
    check(field[1], one.transform.steps[0].field[0])


@pytest.mark.parametrize(
    "change",
    [
        {"head": "dynamic", "features": "mind", "residual": True},
        {"head": "flow", "features": "none", **POOLED},
    ],
)
def test_tpu_form_agrees_in_values_and_gradients(change):
    """Full resolution on the grid of half of it, against the direct form."""
    config = dataclasses.replace(SMALL, backbone_window=None, **change)
    variables = loud(UniReg(config).init(jax.random.key(1), SHAPE), size=0.05)
    task = jnp.array([0, 1]) if config.head == "dynamic" else None
    moving, fixed = images()
    cotangent = np.random.default_rng(2).normal(size=(2, *SHAPE, 3)).astype("f4")
    found = []
    for form in ("native", "folded"):
        model = UniReg(dataclasses.replace(config, form=form))

        @jax.jit
        def run(variables, moving, fixed, model=model):
            prediction, _ = model.apply(variables, moving, fixed, task=task)
            return prediction.transform.steps[0].field

        field, pull = jax.vjp(run, variables, moving, fixed)
        found.append(jax.tree.leaves((field, pull(cotangent))))
    for direct, ours in zip(*found, strict=True):
        assert ours.shape == direct.shape
        limit = 3e-5 * np.abs(direct).max()  # a few hundred roundings of float32
        np.testing.assert_allclose(ours, direct, rtol=0, atol=limit)


@pytest.mark.parametrize("stride", [1, 2])
def test_folded_layers_are_those_of_the_voxels(stride):
    """Of parts, one of which is repeated, against SciPy's correlation."""
    rng = np.random.default_rng(3)
    coarse, fine = rng.normal(size=(1, 2, 3, 4, 2)), rng.normal(size=(1, 4, 6, 8, 3))
    parts = [coarse.repeat(2, 1).repeat(2, 2).repeat(2, 3), fine] if stride == 1 else [
        fine
    ]  # fmt: skip
    whole = np.concatenate(parts, -1)[0]
    kernel = rng.normal(size=(3, 3, 3, whole.shape[-1], 2))
    bias = rng.normal(size=2)
    direct = np.stack(
        [
            bias[o]
            + sum(
                ndimage.correlate(whole[..., i], kernel[..., i, o], mode="constant")
                for i in range(whole.shape[-1])
            )
            for o in range(2)
        ],
        -1,
    )[::stride, ::stride, ::stride]
    images = [jnp.asarray(a, jnp.float32) for a in (coarse, fine)]
    folded = halved.fold(images[1])
    given = (images[0], folded) if stride == 1 else folded
    weights = (jnp.asarray(a, jnp.float32) for a in (kernel, bias))
    ours = halved.convolved(given, *weights, stride=stride)
    ours = halved.unfold(ours) if stride == 1 else ours
    np.testing.assert_allclose(ours[0], direct, rtol=0, atol=2e-5)


def test_windows():
    units = np.float32([-2000.0, -1024.0, -800.0, -200.0, 400.0, 1000.0, 3071.0])
    low, high = sam.HU_RANGE
    stored = ((units - low) / (high - low)).reshape(1, 1, 1, -1, 1)
    model = UniReg(UniRegConfig())
    seen = np.asarray(model._backbone(stored)).ravel()
    np.testing.assert_allclose(seen, [-1, -1, -1, 0, 1, 1, 1], atol=1e-5)
    scaled = sam.to_sam_range(jnp.asarray(stored), (low, high))
    expected = (np.clip(units, low, high) + 1024) * 255 / 4095 - 50
    np.testing.assert_allclose(np.ravel(scaled), expected, rtol=1e-5, atol=1e-4)
    # Images that were stored in a window of their own.
    narrow = UniReg(UniRegConfig(window=(-150.0, 250.0)))
    ends = narrow._backbone(np.float32([0, 1]).reshape(1, 1, 1, 2, 1))
    np.testing.assert_allclose(np.ravel(ends), [1 / 12, 0.75], rtol=1e-5)
    plain = UniReg(UniRegConfig(backbone_window=None))
    ends = plain._backbone(np.float32([0, 0.5, 1]).reshape(1, 1, 1, 3, 1))
    np.testing.assert_allclose(np.ravel(ends), [-1, 0, 1])


def test_each_task_can_have_a_window_of_its_own():
    windows = ((-800.0, 400.0), (-150.0, 250.0))
    config = UniRegConfig(
        features="none", regions=2, tasks=((0, "inter"), (1, "intra")),
        task_windows=windows,
    )  # fmt: skip
    model = UniReg(config)
    moving, fixed = images()
    seen = model._backbone(fixed, jnp.array([1, 0]))
    for row, window in zip(seen, windows[::-1], strict=True):
        alone = dataclasses.replace(config, task_windows=(), backbone_window=window)
        check(row, UniReg(alone)._backbone(fixed)[0 if window == windows[1] else 1])
    variables = loud(model.init(jax.random.key(1), SHAPE), size=0.02)
    several, _ = model.apply(variables, moving, fixed, task=jnp.array([1, 0]))
    narrow = dataclasses.replace(config, task_windows=(), backbone_window=windows[1])
    one, _ = UniReg(narrow).apply(variables, moving, fixed, task=jnp.array([1, 1]))
    fields = [found.transform.steps[0].field for found in (several, one)]
    check(fields[0][0], fields[1][0])
    assert np.abs(fields[0][1] - fields[1][1]).max() > 1e-6
    with pytest.raises(UserError, match="1 windows for 2 tasks"):
        dataclasses.replace(config, task_windows=windows[:1])


def test_sam_is_shown_the_units_that_it_knows():
    """What a SAM network was not trained on is cut off, in its place on SAM's scale."""
    seen = []

    def embed(_, image):
        seen.append(np.array(image))
        d, h, w = image.shape[1:4]
        fine, coarse = (
            jnp.ones((1, d // a, h // b, w // b, 1)) for a, b in ((2, 2), (4, 16))
        )
        return sam.Embeddings(fine, coarse)

    config = UniRegConfig(head="flow", sam_window=(-300.0, 500.0))
    units = np.linspace(-1024, 3071, 16, dtype=np.float32)
    stored = np.broadcast_to(
        ((units + 1024) / 4095)[:, None], (1, 16, 16, 16, 16, 1)[1:]
    )
    with jax.disable_jit():
        UniReg(config, embed)._extract(
            {}, jnp.asarray(stored)[:1], jnp.asarray(stored)[:1]
        )
    expected = (np.clip(units, -300, 500) + 1024) * 255 / 4095 - 50
    np.testing.assert_allclose(seen[0][0, 0, 0, :, 0], expected, atol=1e-3)


def test_mind_features_have_length_1_and_see_one_image_each():
    moving, _ = images()
    found = features_lib.mind_features(moving)
    assert found.fine.shape == (2, 8, 16, 8, 12)
    assert found.coarse.shape == (2, 4, 2, 1, 12)
    for x in (found.fine, found.coarse):
        np.testing.assert_allclose(np.linalg.norm(x, axis=-1), 1, rtol=1e-5)
    one = features_lib.mind_features(moving[1:])
    np.testing.assert_allclose(found.fine[1], one.fine[0], rtol=1e-5)


# --- the frozen network ---------------------------------------------------------------

TINY_SAM = sam.SamConfig(channels=(2, 2, 2, 2), embedding=3)


@pytest.fixture(scope="module")
def with_sam():
    """A model whose embeddings are those of a small SAM network, and variables."""
    model = UniReg(SMALL)
    variables = loud(model.init(jax.random.key(0), SHAPE), size=0.05)
    frozen = sam.init(TINY_SAM, jax.random.key(1))
    return model, sam.with_sam(variables, frozen)


@pytest.fixture(scope="module")
def predicted(with_sam):
    """A pair both ways, by the step's one call."""
    model, variables = with_sam
    pair = Pair(*images(batch=1), task=jnp.array([0]))
    run = jax.jit(lambda v: step.predict(model, v, pair)[0])
    return pair, run, run(variables)


def test_each_image_is_embedded_once(with_sam, predicted, monkeypatch):
    model, variables = with_sam
    pair, _, both = predicted
    seen = []

    def count(function, images):
        seen.append(images.shape)
        return features_lib.one_by_one(function, images)

    monkeypatch.setattr(paper, "one_by_one", count)
    jax.eval_shape(lambda v: step.predict(model, v, pair)[0], variables)
    assert seen == [(2, *SHAPE, 1)]
    # The same as two calls that know nothing of each other.
    apart = jax.jit(lambda v, m, f: model.apply(v, m, f, task=pair.task)[0])
    for maps, pictures in (
        (both.forward, (pair.moving, pair.fixed)),
        (both.backward, (pair.fixed, pair.moving)),
    ):
        check(maps.steps[0].field, apart(variables, *pictures).transform.steps[0].field)


def test_remembered_features_are_those_of_the_images(with_sam, predicted):
    model, variables = with_sam
    pair, run, both = predicted
    known = jax.jit(model.cache_features)(variables, pair.moving, pair.fixed)
    assert set(known) == {"params", "features"}
    check(run(known).backward.steps[0].field, both.backward.steps[0].field)


def test_optimisation_on_a_pair_embeds_before_its_loop(
    with_sam, predicted, monkeypatch
):
    model, variables = with_sam
    pair, _, both = predicted
    seen = []

    def loop(variables, *rest, **more):
        seen.append(set(variables))
        return both[:2], {}, variables

    monkeypatch.setattr(network_lib, "_network_loop", loop)
    objective = Objective(similarity="mse")
    network_lib.optimize_network(
        model, variables, pair, objective, key=jax.random.key(0)
    )
    assert seen == [{"params", "features"}]


def test_the_frozen_network_matters_and_is_scaled_as_it_was_trained(with_sam):
    model, variables = with_sam
    moving, fixed = images(batch=1)
    found = model._extract(variables, moving, fixed)[1]
    scaled = sam.to_sam_range(fixed, SMALL.window)
    expected = sam.features(TINY_SAM, variables["sam"], scaled)
    check(found.fine, expected.fine, 1e-5)
    check(found.coarse, expected.coarse, 1e-5)


def test_a_bundle_holds_the_frozen_network(with_sam, tmp_path):
    model, variables = with_sam
    bundle = bundle_lib.Bundle(
        variables, "unireg", dataclasses.asdict(SMALL), {}, "a test", "none"
    )
    bundle_lib.save_bundle(tmp_path / "small", bundle)
    loaded = load.load(tmp_path / "small")
    assert loaded.model == model
    jax.tree.map(np.testing.assert_array_equal, dict(variables), loaded.variables)
    for change in ({"sam": {"params": {}}}, {"params": {}}, {"other": {}}):
        with pytest.raises(UserError, match="here"):
            other = dataclasses.replace(bundle, variables={**variables, **change})
            load.check_variables(other, "here")
    with pytest.raises(UserError, match="no PyTorch file"):
        convert.convert(tmp_path / "small", tmp_path / "small.pth")


def test_training_leaves_the_frozen_network_alone(with_sam):
    model, variables = with_sam
    rule = optax.chain(optax.trace(0.5), optax.scale(-0.1))
    start = state.start(variables, rule, jax.random.key(0), ema=True)
    assert set(start.ema) == {"params"}
    trained = jax.tree.structure(variables["params"])
    assert jax.tree.structure(start.opt_state[0].trace) == trained
    objective = Objective(similarity="mse", inverse_consistency_weight=0.0)
    one = jax.jit(
        step.make_train_step(
            model,
            objective,
            rule,
            lambda batch, key: Pair(*batch, task=jnp.array([0])),
            step.StepConfig(ema=0.5),
        )
    )
    after, parts = one(start, tuple(images(batch=1)))
    assert parts["finite"] and parts["gradient_norm"] > 0
    jax.tree.map(
        np.testing.assert_array_equal, variables["sam"], after.variables["sam"]
    )
    assert set(after.ema) == {"params"}
    assert set(state.averaged(after)) == {"params", "sam"}
    kernels = [
        v["params"]["head"]["controller"]["bias"] for v in (start.ema, after.ema)
    ]
    assert np.any(kernels[0] != kernels[1])


def test_what_the_frozen_network_must_be(with_sam):
    model, variables = with_sam
    image = np.zeros((1, *SHAPE, 1), "f4")
    with pytest.raises(UserError, match="not the variables of a SAM network"):
        sam.with_sam(variables, {"params": {}, "batch_stats": {}})
    joined = dataclasses.replace(SMALL, matching="concatenation")
    with pytest.raises(UserError, match="of 3 channels, this UniReg concatenates 128"):
        UniReg(joined).apply(variables, image, image, task=jnp.array([0]))


def test_what_is_missing_or_does_not_fit_is_said(fresh):
    model, variables = fresh
    image = np.zeros((1, *SHAPE, 1), "f4")
    with pytest.raises(UserError, match="given none.*0: region 1 inter"):
        model.apply(variables, image, image)
    with pytest.raises(UserError, match="16 x 24 x 16.*multiple of 16"):
        model.apply(variables, image[:, :, :24], image[:, :, :24])
    with pytest.raises(UserError, match="hold no SAM network; put"):
        UniReg(SMALL).apply(variables, image, image, task=jnp.array([0]))
    with pytest.raises(UserError, match="region from 0 to 1"):
        UniRegConfig(regions=2)
    with pytest.raises(UserError, match="backbone_window is 400"):
        UniRegConfig(backbone_window=(400.0, -800.0))
