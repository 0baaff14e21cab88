"""Training UniReg: its frozen SAM network, resumed runs, two stages, refusals."""

import dataclasses
import json
import shutil
from typing import Any

import chex
import jax
import nibabel as nib
import numpy as np
import pytest

from jaxreg.data.loading import Loading
from jaxreg.data.pairs import Task
from jaxreg.errors import UserError
from jaxreg.experiments import datasets, files, overrides, run, warm_start
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models import registry, sam
from jaxreg.models.promptreg import PromptRegConfig
from jaxreg.models.sam import HU_RANGE, SamConfig, TrainedSam
from jaxreg.models.unireg.paper import UniRegConfig
from jaxreg.models.unireg.released import UniRegRpn, UniRegRpnConfig
from jaxreg.space.transform import Transform
from jaxreg.training import parallel
from jaxreg.training.loop import LoopConfig
from jaxreg.training.optimizer import OptimizerConfig
from jaxreg.weights import bundle, load, zoo

SHAPE = (16, 16, 16)
FORWARD = Objective(
    similarity="mse",
    inverse_consistency_weight=0.0,
    smoothness_weight=1.0,
    directions="forward",
)


def tiny(model, **train) -> Experiment:
    return Experiment(
        name="tiny",
        stages=(Stage("one", 2),),
        model=model,
        data=DataConfig(
            synthetic=("inter_mono",), pairs_per_epoch=2, validation_pairs=0
        ),
        loading=Loading(shape=SHAPE, ct_window=HU_RANGE),
        augment=None,
        objective=FORWARD,
        optimizer=OptimizerConfig("adam", learning_rate=1e-3),
        train=TrainConfig(batch=1, **train),
        loop=LoopConfig(log_every=1, image_every=0, keep_latest=9),
    )


# --- SAM's embeddings -----------------------------------------------------------------


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory):
    """A SAM network that knows scans of its own kind; nothing in it is a default."""
    config = SamConfig((2, 2, 3, 3), 4, form="native")
    variables = jax.tree.map(np.asarray, sam.init(config, jax.random.key(5)))
    trained = TrainedSam(config, variables, 1.5, (-300.0, 500.0), (0.1, 0.8))
    folder = tmp_path_factory.mktemp("sam") / "weights"
    bundle.save_bundle(folder, warm_start.bundle_of_sam(trained))
    return folder


@pytest.fixture(scope="module")
def trained(embeddings, tmp_path_factory):
    chosen = tiny(UniRegConfig(form="native"), sam=str(embeddings), ema=0.5)
    out = tmp_path_factory.mktemp("runs") / "whole"
    return chosen, out, run.run(chosen, out, report=lambda _: None)


def test_sam_is_frozen_and_travels_with_the_weights(trained, embeddings):
    _, _, outcome = trained
    given, loaded = load.load_sam(embeddings), load.load(outcome.weights)
    chex.assert_trees_all_equal(loaded.variables["sam"], dict(given.variables))
    held = zoo.sam_of(loaded)
    assert held is not None
    for name in ("spacing_mm", "ct_window", "quantile_range"):
        assert getattr(held, name) == getattr(given, name), name
    # Shown in UniReg what it knows, in training and ever after.
    config: Any = registry.config_of("unireg", loaded.bundle.config)
    assert config.sam_window == given.ct_window
    # The rest has learnt.
    fresh = loaded.model.init(jax.random.key(0), SHAPE)["params"]
    assert jax.tree.structure(fresh) == jax.tree.structure(loaded.variables["params"])


def test_a_resumed_run_needs_no_sam_but_its_own(trained, embeddings, tmp_path):
    chosen, out, outcome = trained
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    shutil.rmtree(copy / "weights")
    shutil.rmtree(copy / "one" / "checkpoints" / "4")
    hidden = embeddings.with_name("hidden")
    embeddings.rename(hidden)
    said = []
    try:
        again = run.run(chosen, copy, resume=True, report=said.append)
    finally:
        hidden.rename(embeddings)
    assert "resumed at step 2 of 4" in said
    chex.assert_trees_all_equal(
        dict(load.load(again.weights).variables),
        dict(load.load(outcome.weights).variables),
    )


def test_checkpoints_do_not_repeat_sam(trained):
    _, out, _ = trained
    names = [
        path.name
        for path in (out / "one" / "checkpoints").rglob("*")
        if "sam" in path.name
    ]
    assert not names


@pytest.mark.parametrize(
    ("model", "train", "said"),
    [
        (UniRegConfig(), {}, "there are no SAM weights; give `train.sam`"),
        (UniRegConfig(features="mind"), {"sam": "x"}, "correlates no embeddings"),
        (UniRegConfig(), {"sam": "nowhere"}, "nowhere"),
    ],
)
def test_sam_is_asked_for_before_the_folder_is_made(model, train, said, tmp_path):
    with pytest.raises(UserError, match=said):
        run.run(tiny(model, **train), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sam_of_other_voxels_is_refused(embeddings):
    chosen = tiny(UniRegConfig(), sam=str(embeddings))
    loading = dataclasses.replace(chosen.loading, resize="pad_crop", spacing_mm=2.0)
    with pytest.raises(UserError, match=r"`loading\.spacing_mm` 1\.5"):
        warm_start.sam_of(dataclasses.replace(chosen, loading=loading))


# --- two stages -----------------------------------------------------------------------


def test_heads_of_tasks_come_after_static_ones():
    """As the release: all but the heads is taken over."""
    dynamic, static = (
        UniRegRpnConfig(channels=2, head=head) for head in ("dynamic", "static")
    )
    before = UniRegRpn(static).init(jax.random.key(9), SHAPE)
    said = []
    found = warm_start.initial_variables(
        tiny(dynamic), UniRegRpn(dynamic), before, said.append, ("a", "b")
    )
    assert "40 arrays loaded, 16 fresh, 8 not used" in said[0]
    for part, layers in found["params"].items():
        for layer, values in layers.items():
            if layer != "head":
                chex.assert_trees_all_equal(values, before["params"][part][layer])


def test_weights_carry_the_rules_of_their_tasks():
    chosen = tiny(UniRegRpnConfig(channels=2))
    found = datasets.with_bank(datasets.make_sources(chosen), (), chosen.model)
    rule = datasets.TaskRule((-150.0, 250.0), (0.1, 0.9), 3.0)
    found = dataclasses.replace(found, rules=(rule,))
    stored = run.bundle_of(chosen, {}, found).preprocessing
    assert stored["tasks"] == stored["regions"] == ["inter_mono"]
    assert stored["task_rules"] == [dataclasses.asdict(rule)]


def test_a_bank_carries_a_rule_for_each_prompt():
    chosen = tiny(PromptRegConfig())
    found = datasets.make_sources(chosen)
    rule = datasets.TaskRule(smoothness=3.0)
    found = dataclasses.replace(found, rules=(rule,))
    found = datasets.with_bank(found, ("before",), chosen.model)
    stored = run.bundle_of(chosen, {}, found).preprocessing
    assert stored["tasks"] == ["before", "inter_mono"]
    assert [told["smoothness"] for told in stored["task_rules"]] == [None, 3.0]


# --- intensities ----------------------------------------------------------------------


def labelled(folder, modality):
    folder.mkdir()
    for name in ("a", "b"):
        image = nib.Nifti1Image(np.zeros(SHAPE, np.float32), np.eye(4))
        nib.save(image, folder / f"{name}.nii.gz")
    rows = [f"{name}.nii.gz,{name},set,{modality}" for name in ("a", "b")]
    text = "\n".join(["image,subject,dataset,modality", *rows]) + "\n"
    (folder / "manifest.csv").write_text(text)
    return str(folder / "manifest.csv")


def with_scans(model, manifest, window=HU_RANGE, tasks=()):
    data = DataConfig(
        manifests=(manifest,), tasks=tasks, holdout=None, validation_pairs=0
    )
    chosen = dataclasses.replace(tiny(UniRegRpnConfig()), data=data)
    loading = dataclasses.replace(chosen.loading, ct_window=window)
    return dataclasses.replace(chosen, loading=loading, model=model)


MIND = UniRegConfig(features="mind")


@pytest.mark.parametrize(
    ("window", "tasks", "said"),
    [
        ((-1000.0, 1000.0), (), "loading.ct_window is -1000 to 1000 HU, .* -1024"),
        (HU_RANGE, (Task("set", ct_window=(-150.0, 250.0)),), "ct_window of task set"),
    ],
)
def test_a_network_of_hounsfield_units_has_one_window(window, tasks, said):
    with pytest.raises(UserError, match=said):
        with_scans(MIND, "scans.csv", window, tasks)
    free = dataclasses.replace(MIND, backbone_window=None)
    assert with_scans(free, "scans.csv", window, tasks).model == free
    # As in the network, so in the loading.
    narrow = dataclasses.replace(MIND, window=(-150.0, 250.0))
    with_scans(narrow, "scans.csv", (-150.0, 250.0))


def test_a_network_of_hounsfield_units_is_trained_on_ct(tmp_path):
    mri, ct = (labelled(tmp_path / name, name) for name in ("t1", "ct"))
    assert datasets.make_sources(with_scans(MIND, ct)).tasks == ("set",)
    with pytest.raises(UserError, match=r"modality t1.*`model\.backbone_window` None"):
        datasets.make_sources(with_scans(MIND, mri))
    free = dataclasses.replace(MIND, backbone_window=None)
    assert datasets.make_sources(with_scans(free, mri)).tasks == ("set",)


def test_training_compares_what_the_network_is_shown(tmp_path):
    """The pairs of a step and of validation, for a recipe that names no window."""
    chosen = with_scans(MIND, labelled(tmp_path / "ct", "ct"))
    found = datasets.make_sources(chosen)
    (rule,) = found.rules
    assert rule.network_window == rule.similarity_window == (-800.0, 400.0)
    rng = np.random.default_rng(0)
    images = [rng.uniform(size=(1, *SHAPE, 1)).astype("f4") for _ in "ab"]
    batch = dict(zip(("moving", "fixed"), images, strict=True))
    batch |= {"task": np.zeros(1, int), "index": np.zeros(1, int)}
    prepare = datasets.make_prepare(chosen, found, parallel.Layout("single"))
    pair = prepare(batch, jax.random.key(0))
    low, high = ((hu + 1024) / 4095 for hu in (-800, 400))
    np.testing.assert_allclose(pair.similarity_range, [[low, high]], rtol=1e-6)
    np.testing.assert_array_equal(pair.fixed, images[1])  # which SAM sees whole
    noise = np.zeros((1, *SHAPE, 3))
    still = Transform(())
    _, parts = datasets.loss_of(chosen)(still, None, pair, noise)
    cut = [np.clip((image - low) / (high - low), 0, 1) for image in images]
    expected = np.mean((cut[0] - cut[1]) ** 2, dtype=np.float64)
    np.testing.assert_allclose(parts["similarity"], expected, rtol=1e-5)
    free = dataclasses.replace(
        chosen, model=dataclasses.replace(MIND, features="none", backbone_window=None)
    )
    plain = datasets.make_prepare(
        free, datasets.make_sources(free), parallel.Layout("single")
    )
    assert plain(batch, jax.random.key(0)).similarity_range is None


def test_a_window_of_the_similarity_is_of_ct_alone(tmp_path):
    task = Task("set", similarity_window=(-150.0, 250.0))
    free = dataclasses.replace(MIND, backbone_window=None)
    ct, mri = (labelled(tmp_path / name, name) for name in ("ct", "t1"))
    (rule,) = datasets.make_sources(with_scans(free, ct, tasks=(task,))).rules
    assert (rule.network_window, rule.similarity_window) == (None, (-150.0, 250.0))
    with pytest.raises(UserError, match="modality t1, but its task has a similarity"):
        datasets.make_sources(with_scans(free, mri, tasks=(task,)))
    inverted = dataclasses.replace(task, invert_ct=True)
    with pytest.raises(UserError, match="task set has invert_ct and a window"):
        datasets.make_sources(with_scans(free, ct, tasks=(inverted,)))


def test_a_run_goes_on_whose_settings_do_not_know_of_windows(tmp_path):
    chosen = with_scans(MIND, "scans.csv", tasks=(Task("set"),))
    path = tmp_path / "experiment.json"
    files.write(path, chosen)
    stored = json.loads(path.read_text())
    for name in ("task_windows", "sam_window"):
        del stored["model"][name]
    for name in ("network_window", "similarity_window"):
        del stored["data"]["tasks"][0][name]
    path.write_text(json.dumps(stored))
    files.check_same(path, chosen)
    other = Task("set", similarity_window=(-150.0, 250.0))
    with pytest.raises(UserError, match="data.tasks"):
        files.check_same(path, with_scans(MIND, "scans.csv", tasks=(other,)))


def test_changes_of_the_command_line_are_checked_as_well():
    chosen = with_scans(MIND, "scans.csv")
    with pytest.raises(UserError, match="model.window"):
        overrides.override(chosen, [("loading.ct_window", "-100,100")])
