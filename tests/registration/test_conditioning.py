"""Networks that are told of tasks: names, regions, smoothness, in training and use."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.cli import main
from jaxreg.data import loading as loading_lib
from jaxreg.data import synthetic
from jaxreg.data.manifest.records import Record
from jaxreg.data.pairs import Task
from jaxreg.errors import UserError
from jaxreg.experiments import config as config_lib
from jaxreg.experiments import datasets, run, warm_start
from jaxreg.experiments.config import Experiment, Stage
from jaxreg.experiments.datasets import TaskRule
from jaxreg.losses.objective import Objective
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpn, UniRegRpnConfig
from jaxreg.nn import heads
from jaxreg.nn.heads import SmoothnessRange
from jaxreg.registration import conditioning, preparation
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import result as result_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.training import parallel
from jaxreg.typing import Pair
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load, zoo

RANGE = SmoothnessRange(0.1, 10.0, knots=3)
SMALL = UniRegRpnConfig(channels=2, regions=2, tasks=((0, "inter"), (1, "intra")))
PAPER = UniRegConfig(features="none", regions=2, tasks=((0, "inter"), (1, "intra")))
SHAPE = (16, 16, 16)


def told(model, **fields) -> Experiment:
    return Experiment(
        "tasks", (Stage("one", 1),), model=model,
        loading=loading_lib.Loading(shape=SHAPE), **fields
    )  # fmt: skip


def sources_of(
    names=("a", "b", "c"),
    regions=("head", "liver", "head"),
    pairings=("inter", "intra", "intra"),
    smoothness=(None, 3.0, None),
):
    return datasets.Sources(
        train=synthetic.SyntheticPairs([synthetic.SyntheticConfig()]),
        validation=None,
        validation_count=0,
        objectives=(0,) * len(names),
        classes=(),
        tasks=names,
        regions=regions,
        pairings=pairings,
        rules=tuple(TaskRule(smoothness=weight) for weight in smoothness),
    )


def saved(folder, model, sources, seed=3):
    """Writes weights as a run leaves them, with controllers that make a difference."""
    sources = datasets.with_bank(sources, sources.bank, model)
    chosen = datasets.with_bank_model(told(model), sources)
    rng = np.random.default_rng(seed)

    def loud(path, leaf):
        controller = [part.key for part in path][-2:] == ["controller", "kernel"]
        size = 0.3 if controller else 0.0
        return np.asarray(leaf) + rng.uniform(-size, size, leaf.shape).astype("f4")

    variables = chosen.model.build().init(jax.random.key(seed), SHAPE)
    variables = jax.tree_util.tree_map_with_path(loud, variables)
    bundle = run.bundle_of(chosen, variables, sources)
    bundle_lib.save_bundle(folder, bundle)
    return load.load(folder)


def images(seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.uniform(size=(1, *SHAPE, 1)), jnp.float32) for _ in "ab"]


# --- what is asked for ----------------------------------------------------------------


def test_smoothness_is_encoded_by_the_tents_of_its_logarithm():
    found = RANGE.encode(jnp.array([0.1, 1.0, 10.0, np.sqrt(0.1), 1000.0, 1e-9]))
    expected = [
        [1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.5, 0], [0, 0, 1], [1, 0, 0]
    ]  # fmt: skip
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert RANGE.middle == pytest.approx(1.0)


@pytest.mark.parametrize("fields", [(1.0, 1.0), (0.0, 1.0), (2.0, 1.0), (1.0, 2.0, 1)])
def test_ranges_that_are_none_are_refused(fields):
    with pytest.raises(UserError, match="range of smoothness"):
        SmoothnessRange(*fields)


def test_regions_keep_their_rows_in_a_controller_of_more_regions():
    old = np.arange(7 * 2, dtype="f4").reshape(1, 1, 1, 7, 2)  # 2 + 3 regions + 2
    fresh = -np.ones((1, 1, 1, 9, 2), "f4")  # 2 + 4 regions + 3
    found = heads.take_regions(fresh, old, {0: 0, 1: 2}, 2, (4, 3))[0, 0, 0, :, 0]
    np.testing.assert_array_equal(found, [0, 2, 4, 8, -1, -1, 10, 12, -1])


# --- in training ----------------------------------------------------------------------


@pytest.mark.parametrize("model", [SMALL, PAPER])
def test_a_network_gets_a_region_for_each_name(model):
    sources = datasets.with_bank(sources_of(), ("brain", "liver"), model)
    assert sources.bank == ("brain", "liver", "head")
    found = datasets.with_bank_model(told(model), sources).model
    assert found.regions == 3
    assert found.tasks == ((2, "inter"), (1, "intra"), (2, "intra"))
    pair = Pair(jnp.zeros((3, 1)), jnp.zeros((3, 1)), task=jnp.array([2, 0, 1]))
    pair = datasets.with_task_settings(pair, told(model), sources)
    np.testing.assert_array_equal(pair.task, [2, 0, 1])  # the task's own number


def test_static_heads_know_no_regions():
    model = dataclasses.replace(SMALL, head="static")
    sources = datasets.with_bank(sources_of(), (), model)
    assert sources.bank == ()
    assert datasets.with_bank_model(told(model), sources).model == model


def test_regions_and_pairings_are_those_of_the_records(tmp_path):
    synthetic.write_dataset(
        tmp_path, synthetic.SyntheticConfig("thing", SHAPE, pairing="intra"), subjects=6
    )
    for region, expected in ((None, "anatomy0"), ("knee", "knee")):
        data = config_lib.DataConfig(
            manifests=(str(tmp_path / "manifest.csv"),),
            tasks=(Task("thing", region=region, smoothness=2.0),),
            validation_pairs=0,
        )
        found = datasets.make_sources(told(SMALL, data=data))
        assert found.regions == (expected,)
        assert found.pairings == ("intra",)
        assert found.rules == (TaskRule(smoothness=2.0),)
    record = Record(tmp_path / "a.nii", "s", "abdomen-ct", region="abdomen")
    assert datasets._region([record], Task("abdomen-ct")) == "abdomen"


def test_smoothness_is_the_tasks_own_or_its_objectives():
    chosen = told(
        GradIconConfig(),
        objective=dataclasses.replace(Objective(), smoothness_weight=0.5),
    )
    pair = Pair(jnp.zeros((3, 1)), jnp.zeros((3, 1)), task=jnp.array([1, 0, 2]))
    found = datasets.with_task_settings(pair, chosen, sources_of())
    np.testing.assert_allclose(found.smoothness, [3.0, 0.5, 0.5])
    plain = sources_of(smoothness=(None, None, None))
    assert datasets.with_task_settings(pair, chosen, plain).smoothness is None


def test_smoothness_is_drawn_by_a_pairs_number_within_the_range():
    model = dataclasses.replace(SMALL, smoothness_range=RANGE)
    chosen = told(model, augment=None)
    one = parallel.Layout("single")
    prepare = datasets.make_prepare(chosen, sources_of(), one)

    def drawn(index, key=0):
        zeros = jnp.zeros((len(index), *SHAPE, 1))
        batch = {"moving": zeros, "fixed": zeros, "index": jnp.array(index)}
        batch["task"] = jnp.zeros(len(index), jnp.int32)
        return np.asarray(prepare(batch, jax.random.key(key)).smoothness)

    many = drawn(range(200))
    assert 0.1 <= many.min() < 0.2 and 5 < many.max() <= 10.0
    assert np.median(many) == pytest.approx(1.0, rel=0.4)
    np.testing.assert_array_equal(drawn([7, 3]), many[[7, 3]])
    assert not np.array_equal(drawn([7, 3], key=1), many[[7, 3]])
    # Without a key, as in validation: the task's own, or the middle.
    pair = Pair(jnp.zeros((2, 1)), jnp.zeros((2, 1)), task=jnp.array([1, 0]))
    pair = datasets.with_task_settings(pair, chosen, sources_of())
    np.testing.assert_allclose(pair.smoothness, [3.0, 1.0], rtol=1e-6)


@pytest.mark.parametrize("model", [pytest.param(SMALL, marks=pytest.mark.slow), PAPER])
def test_a_grown_network_answers_as_before_for_old_regions(tmp_path, model):
    sources = datasets.with_bank(
        sources_of(("a", "b"), ("head", "liver"), ("inter", "intra"), (None, None)),
        (),
        model,
    )
    old = saved(tmp_path / "old", model, sources)
    chosen = told(model, train=config_lib.TrainConfig(start=str(tmp_path / "old")))
    known = warm_start.names_of_start(chosen)
    assert known == ("head", "liver")
    grown = datasets.with_bank(
        sources_of(("k", "b"), ("knee", "liver"), ("inter", "intra"), (None, None)),
        known,
        model,
    )
    chosen = datasets.with_bank_model(chosen, grown)
    assert chosen.model.regions == 3
    network = chosen.model.build()
    said = []
    variables = warm_start.initial_variables(
        chosen, network, None, said.append, grown.bank, known
    )
    assert "regions kept: head, liver; new: knee" in " ".join(said)

    def field(network, variables, task):
        found = network.apply(variables, *images(), task=jnp.array([task]))[0]
        return np.asarray(found.transform.steps[0].field)

    before, after = field(old.model, old.variables, 1), field(network, variables, 1)
    np.testing.assert_allclose(before, after, rtol=1e-5, atol=1e-7)
    assert np.abs(field(network, variables, 0) - after).max() > 1e-5


# --- in use ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small pyramid: task a is the head between subjects, b and c within them."""
    model = dataclasses.replace(SMALL, smoothness_range=RANGE)
    folder = tmp_path_factory.mktemp("weights") / "w"
    return saved(folder, model, sources_of())


def test_weights_carry_their_names_and_what_they_can_be_asked_for(trained):
    assert isinstance(trained.model, UniRegRpn)
    assert trained.model.config.smoothness_range == RANGE
    assert trained.task_names == ("a", "b", "c")
    assert trained.bundle.preprocessing["regions"] == ["head", "liver"]


@pytest.mark.parametrize(
    ("task", "pairing", "expected"),
    [
        ("a", None, (0, "inter")),
        ("c", None, (0, "intra")),
        ("a", "intra", (0, "intra")),
        ("liver", None, (1, "intra")),
        ("liver", "inter", (1, "inter")),
        ("head", "inter", (0, "inter")),
    ],
)
def test_region_and_pairing_are_told_by_name(trained, task, pairing, expected):
    found = conditioning.condition(trained, task, pairing)
    assert found.model.model.config.tasks[found.number] == expected
    assert found.trained == (expected != (1, "inter"))
    pair = found.of(Pair(*images()))
    np.testing.assert_array_equal(pair.task, [found.number])
    # As in training, which had the liver within subjects with a weight of its own.
    weight = 3.0 if expected == (1, "intra") else 1.0
    np.testing.assert_allclose(pair.smoothness, [weight], rtol=1e-6)


def test_weights_are_one_program_whatever_they_are_told(trained):
    a, b = (conditioning.condition(trained, task) for task in "ab")
    assert a.number != b.number
    assert a.model.model == b.model.model
    assert hash(a.model.model) == hash(b.model.model)


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (("auto",), r"`task` is auto, .* one of a, b, c, head, liver"),
        (("knee",), "`task` is knee"),
        (("head",), "head within and between subjects; give `pairing`"),
        (("a", None, 20.0), "`smoothness` is 20, .* 0.1 to 10"),
    ],
)
def test_what_a_network_cannot_be_told_is_refused(trained, told, said):
    with pytest.raises(UserError, match=said):
        conditioning.condition(trained, *told)


def stating(model, **preprocessing):
    """Returns the weights with more in their preprocessing."""
    stored = {**model.bundle.preprocessing, **preprocessing}
    bundle = dataclasses.replace(model.bundle, preprocessing=stored)
    return dataclasses.replace(model, bundle=bundle)


def test_two_tasks_of_one_dataset_are_told_apart_by_pairing(trained):
    model = stating(trained, tasks=["a", "b", "a"])
    with pytest.raises(UserError, match="a within and between .* `pairing`"):
        conditioning.condition(model, "a")
    for pairing in ("inter", "intra"):
        found = conditioning.condition(model, "a", pairing)
        assert (found.region, found.pairing) == ("head", pairing)
        assert found.trained
    # Two regions of one dataset: the region is the better word.
    with pytest.raises(UserError, match="several regions; name head or liver"):
        conditioning.condition(stating(trained, tasks=["x", "a", "a"]), "a", "intra")


@pytest.mark.parametrize(
    ("task", "region", "word"),
    [
        ("a", None, "a"),
        ("a", "head", "a"),  # with its own pairing and smoothness
        ("a", "liver", "liver"),
        ("a", "skull", "a"),
        ("new", "liver", "liver"),
        ("new", "skull", "new"),
        ("new", None, "new"),
        (None, None, "auto"),
    ],
)
def test_a_pair_is_told_by_its_region_or_task(trained, task, region, word):
    assert conditioning.task_name_of(trained, task, region) == word


RULES = [
    {"ct_window": [-150, 250], "quantile_range": None, "smoothness": 3.0},
    {"ct_window": None, "quantile_range": [0.1, 0.9], "smoothness": None},
    {"ct_window": None, "quantile_range": None, "smoothness": None},
]


def test_a_task_brings_its_own_intensities(trained):
    model = stating(trained, task_rules=RULES, ct_window=[-9, 9], mri_quantiles=[0, 1])
    windows = {"a": (-150, 250), "b": (-9, 9), "c": (-9, 9)}
    quantiles = {"a": (0, 1), "b": (0.1, 0.9), "c": (0, 1)}
    for task, window in windows.items():
        found = conditioning.condition(model, task).model
        assert found.ct_window == window
        assert found.quantile_range == quantiles[task]
    assert conditioning.condition(model, "head", "inter").model.ct_window == (-150, 250)
    # Never trained, so that no task's are right.
    assert conditioning.condition(model, "liver", "inter").model.ct_window == (-9, 9)


def test_domains_of_a_bank_bring_intensities_where_they_agree():
    bank = np.zeros((3, 2, 2, 2, 4), "f4")
    variables = {"params": {"bottleneck": {"generator": {"bank": bank}}}}
    stored = {"tasks": ["a", "b", "c"], "ct_window": [-9, 9]}
    rules = [{"ct_window": window} for window in ([0, 5], [0, 5], None)]
    bundle = bundle_lib.Bundle(variables, "promptreg", {}, stored, "", "")
    network = PromptRegConfig(tasks=3).build()
    model = zoo.LoadedModel("bank", network, variables, bundle)
    assert conditioning.condition(model, "a").model.ct_window == (-9, 9)
    model = stating(model, task_rules=rules)
    windows = {
        "a": (0, 5),
        "b,a": (0, 5),
        "c": (-9, 9),
        "a,c": (-9, 9),
        "auto": (-9, 9),
    }
    for task, window in windows.items():
        assert conditioning.condition(model, task).model.ct_window == window, task
    alike = stating(model, task_rules=rules[:1] * 3)
    assert conditioning.condition(alike).model.ct_window == (0, 5)


def test_register_scales_by_the_tasks_window_unless_told_otherwise(trained):
    model = stating(trained, task_rules=RULES, ct_window=[-9, 9])
    array = np.full(SHAPE, 50.0, "f4")
    array[0, 0, 0] = 51.0  # a constant scan is refused
    scan = Volume(array, Grid(SHAPE, np.eye(4)))
    ct = {"fixed_modality": "ct", "moving_modality": "ct", "task": "a"}

    def seen(**words):
        options = options_lib.Options(
            **{"io_iterations": None, "shape": SHAPE, "inverse": False, **ct, **words}
        )
        return pair_lib.register(scan, scan, model, options).fixed_image[5, 5, 5]

    assert seen() == pytest.approx(0.5)
    assert seen(ct_window=(0.0, 200.0)) == pytest.approx(0.25)


def test_other_networks_are_told_nothing():
    bundle = bundle_lib.Bundle({}, "gradicon", {}, {}, "", "")
    plain = zoo.LoadedModel("plain", GradIconConfig().build(), {}, bundle)
    assert conditioning.condition(plain).model is plain
    for told, said in (
        (("x",), "neither a prompt bank nor heads"),
        (("auto", "intra"), "`pairing` is intra"),
        (("auto", None, 1.0), "`smoothness` is 1"),
    ):
        with pytest.raises(UserError, match=said):
            conditioning.condition(plain, *told)
        with pytest.raises(UserError, match="no network takes part"):
            conditioning.check_unconditioned(*(*told, None, None)[:3])


def test_smoothness_is_asked_for_by_region_and_pairing(trained):
    """What was found best, then that of the training, then the middle."""
    model = stating(trained, task_rules=RULES, smoothness={"head, intra": 4.0})
    assert conditioning.condition(model, "c").smoothness == 4.0
    assert conditioning.condition(model, "head", "intra").smoothness == 4.0
    assert conditioning.condition(model, "head", "intra", 0.2).smoothness == 0.2
    assert conditioning.condition(model, "a").smoothness == 3.0
    assert conditioning.condition(model, "head", "inter").smoothness == 3.0
    assert conditioning.condition(model, "b").smoothness == pytest.approx(1.0)
    best = stating(model, smoothness={"head, inter": 0.4})
    assert conditioning.condition(best, "a").text == "head, inter, smoothness 0.4"


def test_of_several_tasks_of_a_region_the_named_one_is_asked_for(trained):
    rules = [RULES[0], RULES[1], {**RULES[2], "smoothness": 0.7}]
    config = dataclasses.replace(
        trained.model.config, tasks=((0, "inter"), (1, "intra"), (0, "inter"))
    )
    model = dataclasses.replace(trained, model=config.build())
    model = stating(model, task_rules=rules)
    assert conditioning.condition(model, "c").smoothness == 0.7
    assert conditioning.condition(model, "head").smoothness == 3.0


def test_windows_belong_to_tasks(tmp_path):
    """From the settings to the pairs of training, and back out of the weights."""
    config = UniRegConfig(features="none", window=(-1000.0, 1000.0))
    given = (
        Task("a", region="head", pairing="inter"),
        Task("b", region="liver", pairing="intra", network_window=(-150.0, 250.0)),
        Task("c", region="head", pairing="intra", similarity_window=(-100.0, 300.0)),
    )
    experiment_ = told(config, data=config_lib.DataConfig(tasks=given))
    rules = tuple(datasets.rule_of(experiment_, task) for task in given)
    named = dataclasses.replace(sources_of(), rules=rules)
    pair = Pair(*images(), task=jnp.array([2, 1, 0]))
    found = datasets.with_task_settings(pair, experiment_, named).similarity_range
    expected = [[0.45, 0.65], [0.425, 0.625], [0.1, 0.7]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    model = saved(tmp_path / "weights", config, named)
    shown = ((-800.0, 400.0), (-150.0, 250.0), (-800.0, 400.0))
    assert model.model.config.task_windows == shown
    for words, network, compared in (
        (("a",), (-800.0, 400.0), (-800.0, 400.0)),
        (("b",), (-150.0, 250.0), (-150.0, 250.0)),
        (("c",), (-800.0, 400.0), (-100.0, 300.0)),
        (("liver", "inter"), (-150.0, 250.0), (-150.0, 250.0)),
    ):
        one = conditioning.condition(model, *words).model
        assert one.model.config.backbone_window == network
        assert not one.model.config.task_windows
        assert conditioning.compared_window(one) == compared


def test_checkpoints_from_before_windows_are_read(tmp_path):
    """Without the fields; the similarity then sees what the U-Net does."""
    config = dataclasses.asdict(PAPER)
    for name in ("task_windows", "sam_window"):
        del config[name]
    variables = jax.tree.map(np.asarray, PAPER.build().init(jax.random.key(0)))
    stated = {
        "tasks": ["a", "b"], "regions": ["head", "liver"],
        "task_rules": [
            {"ct_window": None, "quantile_range": None, "smoothness": 1.0}
        ] * 2,
    }  # fmt: skip
    bundle = bundle_lib.Bundle(variables, "unireg", config, stated, "", "")
    bundle_lib.save_bundle(tmp_path / "old", bundle)
    model = load.load(tmp_path / "old")
    assert model.model.config == PAPER
    for told_ in (
        conditioning.condition(model, "a"),
        conditioning.condition(model, "liver", "inter"),
    ):
        assert told_.model.model.config.backbone_window == (-800.0, 400.0)
        assert conditioning.compared_window(told_.model) == (-800.0, 400.0)


def test_weights_without_windows_compare_what_their_network_is_shown():
    assert conditioning.compared_window(hounsfield()) == (-800.0, 400.0)
    old = hounsfield(tasks=["a", "b"], regions=["x", "y"], task_rules=[{}, {}])
    assert conditioning.compared_window(conditioning.condition(old, "a").model) == (
        -800.0,
        400.0,
    )
    bundle = bundle_lib.Bundle({}, "gradicon", {}, {}, "", "")
    plain = zoo.LoadedModel("plain", GradIconConfig().build(), {}, bundle)
    assert conditioning.compared_window(plain) is None
    assert conditioning.compared_window(None) is None


@pytest.mark.parametrize(
    ("task", "said"),
    [
        (Task("a", network_window=(400.0, -800.0)), "network_window of task a is 400"),
        (Task("a", similarity_window=(0.0, 5000.0)), "within the -1024 to 3071 HU"),
    ],
)
def test_windows_of_tasks_are_checked(task, said):
    loading = loading_lib.Loading(shape=SHAPE, ct_window=(-1024.0, 3071.0))
    data = config_lib.DataConfig(tasks=(task,))
    with pytest.raises(UserError, match=said):
        Experiment("x", (Stage("one", 1),), model=PAPER, data=data, loading=loading)
    shown = Task("a", network_window=(-100.0, 100.0))
    with pytest.raises(UserError, match="not told of tasks or reads no Hounsfield"):
        told(SMALL, data=config_lib.DataConfig(tasks=(shown,)))


def hounsfield(**preprocessing):
    bundle = bundle_lib.Bundle({}, "unireg", {}, preprocessing, "", "")
    return zoo.LoadedModel("reads HU", PAPER.build(), {}, bundle)


def test_a_network_that_reads_hounsfield_units_refuses_what_moves_them():
    low, high = PAPER.window
    two_ct = options_lib.Options(fixed_modality="ct", moving_modality="ct")
    preparation.check_units(hounsfield(ct_window=[low, high]), two_ct)
    preparation.check_units(hounsfield(), two_ct)
    other = dataclasses.replace(two_ct, ct_window=(-150.0, 250.0))
    mend = f"give `ct_window` {low:g} {high:g}"
    with pytest.raises(UserError, match=f"`ct_window` is -150 250, .* {mend}"):
        preparation.check_units(hounsfield(ct_window=[low, high]), other)
    with pytest.raises(UserError, match=f"weights state -9 9, .* {mend}"):
        preparation.check_units(hounsfield(ct_window=[-9, 9]), two_ct)
    mixed = dataclasses.replace(two_ct, moving_modality="mri")
    with pytest.raises(UserError, match="`moving_modality` is mri, .* Hounsfield"):
        preparation.check_units(hounsfield(), mixed)
    free = dataclasses.replace(PAPER, backbone_window=None).build()
    model = dataclasses.replace(hounsfield(), model=free)
    preparation.check_units(model, mixed)


def registered(model, **words):
    """Returns where two points come to lie when two scans of noise are registered."""
    found = registered_result(model, **words).transform
    return np.asarray(found.map_points(np.zeros((1, 2, 3)) + 7.0))


def registered_result(model, **words):
    rng = np.random.default_rng(5)
    moving, fixed = (
        Volume(rng.uniform(size=SHAPE).astype("f4"), Grid(SHAPE, np.eye(4)))
        for _ in "ab"
    )
    options = options_lib.Options(
        **{"io_iterations": None, "shape": SHAPE, "inverse": False, **words}
    )
    return pair_lib.register(moving, fixed, model, options)


@pytest.mark.parametrize("prealign", ["none", "centre"])
def test_register_listens(trained, prealign):
    """Task and smoothness change the field; the same words give the same one."""
    field = functools.partial(registered, trained, prealign=prealign)
    a = field(task="a")
    np.testing.assert_array_equal(a, field(task="head", pairing="inter"))
    for other in ({"task": "b"}, {"task": "c"}, {"task": "a", "smoothness": 9.0}):
        assert np.abs(field(**other) - a).max() > 1e-4, other
    with pytest.raises(UserError, match="`task` is auto"):
        field()


def test_levels_are_repeated_when_asked(trained):
    """As the network does by itself, told to repeat."""

    def with_levels(**fields):
        config = dataclasses.replace(trained.model.config, **fields)
        stored = {**trained.bundle.config, **fields}
        bundle = dataclasses.replace(trained.bundle, config=stored)
        return dataclasses.replace(trained, model=config.build(), bundle=bundle)

    patient = with_levels(delta=-1.0)  # no step is too little
    once = registered(patient, task="a")
    found = registered(patient, task="a", level_iterations=2)
    assert np.abs(found - once).max() > 1e-3
    stored = with_levels(delta=-1.0, iterations=2)
    np.testing.assert_array_equal(found, registered(stored, task="a"))
    with pytest.raises(UserError, match="repeats its levels; give `io_iterations`"):
        registered(stored, task="a", io_iterations=2)


def test_only_a_pyramid_of_tasks_has_levels_to_repeat():
    bundle = bundle_lib.Bundle({}, "gradicon", {}, {}, "", "")
    plain = zoo.LoadedModel("plain", GradIconConfig().build(), {}, bundle)
    with pytest.raises(UserError, match="`level_iterations` is 3, but plain is no"):
        registered(plain, level_iterations=3)
    with pytest.raises(UserError, match="`level_iterations` is 3, but no network"):
        registered(None, level_iterations=3, io_iterations=1, io_target="displacement")


def test_what_tune_lambda_stores_is_what_register_asks_for(tmp_path, capsys):
    """From weights and a manifest to a registration, on the command line."""
    manifest = synthetic.write_dataset(
        tmp_path / "data", synthetic.SyntheticConfig("thing", SHAPE), subjects=2
    )
    weights = tmp_path / "weights"
    model = dataclasses.replace(SMALL, smoothness_range=RANGE)
    saved(weights, model, sources_of(regions=("anatomy0", "liver", "anatomy0")))
    scans = ["--fixed-modality", "mri", "--moving-modality", "mri"]
    tune = ["tune-lambda", "--manifest", str(manifest), "--model", str(weights), *scans]
    tune += ["--out", str(tmp_path / "rows.csv"), "--smoothness", "0.2,5", "--write"]
    assert main.main(tune) == 2  # every subject is for training
    assert "--split train" in capsys.readouterr().err
    assert main.main([*tune, "--split", "train", "--count", "1"]) == 0
    printed = capsys.readouterr().out
    best = bundle_lib.load_bundle(weights).preprocessing["smoothness"]
    assert list(best) == ["anatomy0, inter"]
    weight = best["anatomy0, inter"]
    assert weight in (0.2, 5.0)
    assert f"anatomy0, inter: smoothness {weight:g}, Dice" in printed
    fixed, moving = sorted((tmp_path / "data" / "images").iterdir())
    status = main.main(
        ["register", "--fixed", str(fixed), "--moving", str(moving), *scans,
         "--model", str(weights), "--task", "a", "--io-iterations", "None",
         "--transform-out", str(tmp_path / "t.h5")]
    )  # fmt: skip
    assert status == 0
    told = next(
        line for line in capsys.readouterr().out.splitlines() if line[:4] == "told"
    )
    assert told.split(maxsplit=1)[1] == f"anatomy0, inter, smoothness {weight:g}"


def test_only_networks_that_are_told_something_say_so(trained):
    result = registered_result(trained, task="b")
    assert result_lib.summary(result)["told"] == "liver, intra, smoothness 3"
    silent = dataclasses.replace(result, conditioning="")
    assert "told" not in result_lib.summary(silent)
