"""Banks of prompts in training: whose rows are whose, growing, freezing, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxreg.data import synthetic
from jaxreg.data.loading import Loading
from jaxreg.errors import UserError
from jaxreg.experiments import datasets, overrides, run, warm_start
from jaxreg.experiments.config import DataConfig, Experiment, Stage, TrainConfig
from jaxreg.losses.objective import Objective
from jaxreg.models import promptreg
from jaxreg.models.gradicon import GradIconConfig
from jaxreg.models.rdp import RdpConfig
from jaxreg.typing import Pair
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load

PLAIN = Objective(
    similarity="mse",
    inverse_consistency_weight=0.0,
    smoothness_weight=0.1,
    directions="forward",
)


def prompted(*domains: str, **train) -> Experiment:
    return Experiment(
        name="bank",
        stages=(Stage("one", epochs=1),),
        augment=None,
        model=dataclasses.replace(promptreg.AS_PAPER, channels=1),
        data=DataConfig(
            synthetic=domains,
            synthetic_labels=2,
            pairs_per_epoch=2,
            validation_pairs=0,
        ),
        loading=Loading(shape=(16, 16, 16)),
        objective=dataclasses.replace(PLAIN, orthogonality_weight=0.1, task_weight=0.1),
        train=TrainConfig(batch=1, **train),
    )


def saved_bank(folder, chosen, tasks):
    """Writes weights as a run of that experiment leaves them; returns the variables."""
    sources = datasets.with_bank(sources_of(tasks), (), chosen.model)
    chosen = datasets.with_bank_model(chosen, sources)
    variables = jax.tree.map(
        np.array, chosen.model.build().init(jax.random.key(7), (16, 16, 16))
    )
    bundle_lib.save_bundle(folder, run.bundle_of(chosen, variables, sources))
    return variables


def started(chosen, known, tasks):
    """What a stage starts with, and what was said."""
    said = []
    sources = datasets.with_bank(sources_of(tasks), known, chosen.model)
    chosen = datasets.with_bank_model(chosen, sources)
    variables = warm_start.initial_variables(
        chosen, chosen.model.build(), None, said.append, sources.bank, known
    )
    return variables, " ".join(said)


def sources_of(tasks):
    return datasets.Sources(
        train=synthetic.SyntheticPairs([synthetic.SyntheticConfig()]),
        validation=None,
        validation_count=0,
        objectives=(0,) * len(tasks),
        classes=(),
        tasks=tuple(tasks),
    )


def test_known_tasks_keep_their_rows_whether_their_data_are_there_or_not():
    chosen = prompted("inter_mono")
    sources = datasets.with_bank(
        sources_of(["liver", "brain", "liver"]), ("b", "brain"), chosen.model
    )
    assert sources.bank == ("b", "brain", "liver")
    assert sources.rows == (2, 1, 2)
    pair = Pair(jnp.zeros((3, 1)), jnp.zeros((3, 1)), task=jnp.array([0, 1, 2]))
    pair = datasets.with_task_settings(pair, chosen, sources)
    np.testing.assert_array_equal(pair.task, [2, 1, 2])


def test_a_bank_to_start_from_keeps_all_its_prompts(tmp_path):
    start = tmp_path / "old"
    chosen = prompted("inter_mono", start=str(start))
    old = promptreg.bank_of(saved_bank(start, chosen, ("brain", "inter_mono")))
    known = warm_start.names_of_start(chosen)
    assert known == ("brain", "inter_mono")
    # The brain's data are elsewhere, and another domain is new.
    found, said = started(chosen, known, ["a new one", "inter_mono"])
    bank = promptreg.bank_of(found)
    np.testing.assert_array_equal(bank[:2], old)
    assert len(bank) == 3 and not np.array_equal(bank[2], old[0])
    assert "prompts kept: brain, inter_mono; new: a new one" in said


def test_prompts_without_names_are_named_by_the_user(tmp_path):
    start = tmp_path / "old"
    chosen = prompted("inter_mono", start=str(start))
    saved_bank(start, chosen, ("a", "b"))
    bundle = bundle_lib.load_bundle(start)
    preprocessing = {k: v for k, v in bundle.preprocessing.items() if k != "tasks"}
    nameless = dataclasses.replace(bundle, preprocessing=preprocessing)
    bundle_lib.save_bundle(start, nameless)
    with pytest.raises(UserError, match=r"2 prompts.*`train.start_tasks`"):
        run.run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    named = overrides.override(chosen, [("train.start_tasks", "a,b")])
    assert warm_start.names_of_start(named) == ("a", "b")
    wrong = overrides.override(chosen, [("train.start_tasks", "a")])
    with pytest.raises(UserError, match="2 prompts"):
        warm_start.names_of_start(wrong)


def test_frozen_weights_are_complete_and_mean_what_they_meant(tmp_path):
    start = tmp_path / "old"
    chosen = prompted("inter_mono", start=str(start), only="prompts")
    other = dataclasses.replace(chosen.model, temperature=0.5)
    saved_bank(start, dataclasses.replace(chosen, model=other), ("a",))
    with pytest.raises(UserError, match=r"give `model.temperature` 0.5"):
        started(chosen, ("a",), ["a"])
    free = overrides.override(chosen, [("train.only", "all")])
    assert "trained with temperature 0.5" in started(free, ("a",), ["a"])[1]
    # Weights of RDP have no bank, whose frozen blocks would stay as they were drawn.
    rdp = dataclasses.replace(free, model=RdpConfig(channels=1), objective=PLAIN)
    saved_bank(start, rdp, ())
    assert warm_start.names_of_start(chosen) == ()
    with pytest.raises(UserError, match="lacks .*bottleneck.* would stay untrained"):
        started(chosen, (), ["a"])


def test_banks_of_other_widths_are_refused_by_name(tmp_path):
    start = tmp_path / "old"
    wide = prompted("inter_mono", start=str(start))
    wide = dataclasses.replace(wide, model=dataclasses.replace(wide.model, channels=2))
    saved_bank(start, wide, ("a",))
    narrow = prompted("inter_mono", start=str(start))
    with pytest.raises(UserError, match=r"does not fit .*`model.channels`"):
        started(narrow, ("a",), ["a"])


def test_mistakes_of_grid_and_losses_leave_no_folder(tmp_path):
    chosen = prompted("inter_mono")
    for model in (chosen.model, RdpConfig(channels=1)):
        plain = dataclasses.replace(chosen, model=model, objective=PLAIN)
        wrong = overrides.override(plain, [("loading.shape", "16,16,20")])
        with pytest.raises(UserError, match="multiple of 8"):
            run.run(wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="no prompt bank"):
        dataclasses.replace(chosen, model=RdpConfig(channels=1))


@pytest.mark.slow
def test_a_domain_is_added_to_a_trained_bank(tmp_path):
    old = run.run(prompted("inter_mono", "intra_mono"), tmp_path / "old")
    before = load.load(old.weights)
    assert before.task_names == ("inter_mono", "intra_mono")
    # The first of the old ones has no data here.
    chosen = prompted(
        "inter_multi", "intra_mono", start=str(old.weights), only="new_prompts"
    )
    chosen = overrides.override(chosen, [("train.ema", "0.9")])
    said = []
    new = run.run(chosen, tmp_path / "new", report=said.append)
    assert any("new: inter_multi" in sentence for sentence in said)
    after = load.load(new.weights)
    assert after.task_names == ("inter_mono", "intra_mono", "inter_multi")
    bank = promptreg.bank_of(after.variables)
    np.testing.assert_array_equal(bank[:2], promptreg.bank_of(before.variables))
    fresh = after.model.init(warm_start.weights_key(0), (16, 16, 16))
    assert np.any(bank[2] != promptreg.bank_of(fresh)[2])
    # All but the bank is as it was.
    kept, changed = (
        chosen.model.with_prompts(m.variables, [0, 1]) for m in (before, after)
    )
    jax.tree.map(np.testing.assert_array_equal, kept["params"], changed["params"])


@pytest.mark.slow
def test_a_bank_run_goes_on_without_what_it_started_from(tmp_path):
    start = tmp_path / "old"
    chosen = prompted("inter_mono", start=str(start), only="new_prompts")
    chosen = dataclasses.replace(
        chosen, stages=(Stage("one", epochs=1), Stage("two", epochs=1))
    )
    old = promptreg.bank_of(saved_bank(start, chosen, ("brain", "hip")))

    def stop(sentence):
        if sentence.startswith("stage two"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.run(chosen, tmp_path / "run", report=stop)
    start.rename(tmp_path / "elsewhere")
    said = []
    done = run.run(chosen, tmp_path / "run", resume=True, report=said.append)
    after = load.load(done.weights)
    assert after.task_names == ("brain", "hip", "inter_mono")
    np.testing.assert_array_equal(promptreg.bank_of(after.variables)[:2], old)
    # The second stage goes on with the first one's prompt.
    whole = run.run(
        dataclasses.replace(
            chosen,
            train=dataclasses.replace(chosen.train, start=str(tmp_path / "elsewhere")),
        ),
        tmp_path / "whole",
    )
    jax.tree.map(
        np.testing.assert_array_equal,
        load.load(whole.weights).variables,
        after.variables,
    )


def test_an_excluded_domain_takes_no_part():
    chosen = overrides.override(
        prompted("inter_mono", "inter_multi", "intra_mono"),
        [("data.exclude", "inter_multi")],
    )
    sources = datasets.make_sources(chosen)
    assert sources.tasks == ("inter_mono", "intra_mono")
    sources = datasets.with_bank(sources, (), chosen.model)
    assert datasets.with_bank_model(chosen, sources).model.tasks == 2
    wrong = overrides.override(chosen, [("data.exclude", "liver")])
    with pytest.raises(UserError, match="liver is not among"):
        datasets.make_sources(wrong)


@pytest.mark.parametrize(
    ("only", "bank", "said"),
    [
        ("new_prompts", True, "no weights to start from"),
        ("prompts", True, "no weights to start from"),
        ("prompts", False, "no prompt bank"),
    ],
)
def test_prompts_alone_need_a_bank_and_a_start(tmp_path, only, bank, said):
    chosen = prompted("inter_mono", only=only)
    if not bank:
        chosen = dataclasses.replace(chosen, model=GradIconConfig(), objective=PLAIN)
    with pytest.raises(UserError, match=said):
        run.run(chosen, tmp_path / "run")
    assert not (tmp_path / "run").exists()
