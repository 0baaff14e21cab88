"""The sampler as a function of (seed, index), and its frequencies."""

import collections
import itertools
import math
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxreg.data import sampler as sampler_lib
from jaxreg.data.manifest.records import Record
from jaxreg.data.pairs import INVERTED_CT, ImageRef, PairPlan, Task
from jaxreg.data.sampler import sampler
from jaxreg.errors import UserError


def record(dataset, subject, modality="mri", **options):
    parts = (dataset, subject, modality, *options.values())
    name = "-".join(part or "x" for part in parts)
    return Record(
        pathlib.Path(f"/{name}.nii.gz"), subject, dataset, modality, **options
    )


def dataset(name, subjects, modalities=("mri",), **options):
    return [
        record(name, f"s{subject:02}", modality, **options)
        for subject in range(subjects)
        for modality in modalities
    ]


def copd(subjects=5):
    """Two breathing states of each subject, as uniGradICON's COPDGene."""
    return [
        record("copd", f"s{subject:02}", "ct", pairing="intra", session=session)
        for subject in range(subjects)
        for session in ("exp", "insp")
    ]


def brats(subjects=4, modalities=("t1", "t2", "fl", "ce")):
    return [
        record("brats", f"s{subject:02}", modality, pairing="intra", session=session)
        for subject in range(subjects)
        for session in ("pre", "post")
        for modality in modalities
    ]


def modality(records, view):
    name = records[view.record].modality
    return INVERTED_CT if view.inverted else name


def subject(records, view):
    return records[view.record].subject


def scan(records, view):
    r = records[view.record]
    return r.dataset, r.subject, r.region, r.session


def is_uniform(counts, cells):
    """Whether counts fit equal frequencies of `cells` outcomes (chi-square)."""
    observed = [counts.get(cell, 0) for cell in cells]
    assert set(counts) <= set(cells), set(counts) - set(cells)
    return stats.chisquare(observed).pvalue > 1e-3


# --- a pure function of seed and index ------------------------------------------------

MIXED = [*dataset("hcp", 6, ("t1", "t2")), *copd(), *dataset("oai", 4)]
TASKS = [Task("hcp", randomise="F"), Task("copd"), Task("oai", distinct=False)]


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**63),
    indices=st.lists(st.integers(0, 10**9), min_size=1, max_size=8),
    schedule=st.sampled_from(["per_dataset", "weighted"]),
)
def test_pair_depends_on_seed_and_index_only(seed, indices, schedule):
    def make():
        return sampler(MIXED, TASKS, pairs_per_epoch=11, schedule=schedule, seed=seed)

    first, second = make(), make()
    forward = {i: first[i] for i in indices}
    backward = {np.int64(i): second[np.int64(i)] for i in reversed(indices)}
    assert forward == backward
    copied = pickle.loads(pickle.dumps(first))
    assert copied == first and copied[indices[0]] == first[indices[0]]


def test_seeds_and_epochs_differ():
    def draws(seed, epoch):
        made = sampler(MIXED, TASKS, pairs_per_epoch=30, seed=seed)
        return [made[epoch * 30 + i] for i in range(30)]

    runs = [draws(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for one, other in itertools.combinations(runs, 2):
        same = sum(a == b for a, b in zip(one, other, strict=True))
        assert same < 15


def test_length_and_iteration_are_one_epoch():
    made = sampler(MIXED, TASKS, pairs_per_epoch=7)
    assert len(made) == 7
    assert list(made) == [made[i] for i in range(7)]
    with pytest.raises(IndexError):
        made[-1]
    with pytest.raises(TypeError):
        made[1.5]  # pyright: ignore[reportArgumentType]


# --- who is drawn ---------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    tasks=st.integers(1, 4),
    count=st.integers(1, 30),
    epoch=st.integers(0, 50),
)
def test_every_epoch_has_equally_many_pairs_of_each_dataset(seed, tasks, count, epoch):
    records = [r for t in range(tasks) for r in dataset(f"d{t}", 3)]
    made = sampler(
        records,
        [Task(f"d{t}") for t in range(tasks)],
        pairs_per_epoch=count,
        seed=seed,
    )
    counts = collections.Counter(made[epoch * count + i].task for i in range(count))
    low, remainder = divmod(count, tasks)
    assert sum(counts.values()) == count
    assert {counts[t] for t in range(tasks)} <= {low, low + (remainder > 0)}


def test_what_does_not_divide_is_shared_over_epochs():
    records = [r for t in range(3) for r in dataset(f"d{t}", 3)]
    made = sampler(records, [Task(f"d{t}") for t in range(3)], pairs_per_epoch=4)
    counts = collections.Counter(made[i].task for i in range(3 * 4))
    assert counts == {0: 4, 1: 4, 2: 4}


def test_unigradicon_epoch_is_shuffled():
    records = [r for t in range(4) for r in dataset(f"d{t}", 3)]
    made = sampler(records, [Task(f"d{t}") for t in range(4)], pairs_per_epoch=4000)
    tasks = np.array([plan.task for plan in made])
    assert np.bincount(tasks).tolist() == [1000] * 4
    # Neither in blocks nor in turns: followers of each task are spread.
    steps = collections.Counter(
        zip(tasks[:-1].tolist(), tasks[1:].tolist(), strict=True)
    )
    assert is_uniform(steps, list(itertools.product(range(4), repeat=2)))
    later = [made[i].task for i in range(4000, 4100)]
    assert later != tasks[:100].tolist()


@settings(max_examples=25, deadline=None)
@given(
    data=st.data(),
    images=st.lists(
        st.tuples(
            st.sampled_from("abcd"),
            st.sampled_from(["t1", "ct"]),
            st.sampled_from("xy"),
        ),
        min_size=1,
        max_size=12,
    ),
    invert=st.booleans(),
)
def test_inter_pairs_are_of_two_subjects_and_one_region(data, images, invert):
    records = [
        Record(pathlib.Path(f"/{n}.nii"), s, "d", m, region)
        for n, (s, m, region) in enumerate(images)
    ]
    invert = invert and any(m == "ct" for _, m, _ in images)
    subjects = collections.defaultdict(set)
    for s, _, region in images:
        subjects[region].add(s)
    if max(len(found) for found in subjects.values()) < 2:
        with pytest.raises(UserError, match="no two subjects"):
            sampler(records, [Task("d")], pairs_per_epoch=1)
        return
    made = sampler(records, [Task("d", invert_ct=invert)], pairs_per_epoch=10)
    for i in data.draw(st.lists(st.integers(0, 10**6), min_size=20, max_size=20)):
        plan = made[i]
        moving, fixed = records[plan.moving.record], records[plan.fixed.record]
        assert moving.subject != fixed.subject
        assert moving.region == fixed.region
        for view, r in ((plan.moving, moving), (plan.fixed, fixed)):
            assert not view.inverted or (invert and r.modality == "ct")
        assert plan.moving_target is None and plan.fixed_target is None


def test_inter_pairs_are_uniform_over_ordered_pairs_of_images():
    made = sampler(dataset("d", 5), [Task("d")], pairs_per_epoch=4000)
    counts = collections.Counter((p.moving.record, p.fixed.record) for p in made)
    assert is_uniform(counts, list(itertools.permutations(range(5), 2)))


def test_independent_draws_may_coincide():
    task = Task("d", distinct=False)
    made = sampler(dataset("d", 4), [task], pairs_per_epoch=4000)
    counts = collections.Counter((p.moving.record, p.fixed.record) for p in made)
    assert is_uniform(counts, list(itertools.product(range(4), repeat=2)))
    alone = sampler(dataset("d", 1), [task], pairs_per_epoch=1)
    assert alone[0] == PairPlan(0, ImageRef(0), ImageRef(0))


def test_region_then_modality_are_drawn_before_the_image():
    """A region or modality with many images is not met more often."""
    records = [
        *dataset("ukb", 20, ("fat",), region="neck"),
        *dataset("ukb", 3, ("water",), region="neck"),
        *dataset("ukb", 4, ("fat", "water"), region="thigh"),
    ]
    made = sampler(records, [Task("ukb")], pairs_per_epoch=4000)
    counts = collections.Counter(
        (
            records[p.moving.record].region,
            modality(records, p.moving),
            modality(records, p.fixed),
        )
        for p in made
    )
    names = ("fat", "water")
    assert is_uniform(counts, list(itertools.product(("neck", "thigh"), names, names)))


def test_a_modality_of_one_subject_is_paired_with_others():
    records = [record("d", "a", "ct"), record("d", "a"), record("d", "b")]
    made = sampler(records, [Task("d")], pairs_per_epoch=3000)
    counts = collections.Counter((p.moving.record, p.fixed.record) for p in made)
    # CT with CT is impossible; the three other combinations are equally likely.
    both = counts[1, 2] + counts[2, 1]
    assert stats.chisquare([counts[0, 2], counts[2, 0], both]).pvalue > 1e-3
    assert sum(counts.values()) == counts[0, 2] + counts[2, 0] + both


@settings(max_examples=15, deadline=None)
@given(indices=st.lists(st.integers(0, 10**9), min_size=10, max_size=10))
def test_intra_pairs_share_a_subject_and_not_a_session(indices):
    records = brats()
    made = sampler(records, [Task("brats")], pairs_per_epoch=10)
    for i in indices:
        moving, fixed = (records[v.record] for v in (made[i].moving, made[i].fixed))
        assert moving.subject == fixed.subject
        assert {moving.session, fixed.session} == {"pre", "post"}


def test_intra_pairs_are_uniform_over_subjects_order_and_modalities():
    records = brats(2, ("t1", "t2"))
    made = sampler(records, [Task("brats")], pairs_per_epoch=4000)
    counts = collections.Counter(
        (
            subject(records, p.moving),
            records[p.moving.record].session,
            modality(records, p.moving),
            modality(records, p.fixed),
        )
        for p in made
    )
    names = ("t1", "t2")
    cells = itertools.product(("s00", "s01"), ("pre", "post"), names, names)
    assert is_uniform(counts, list(cells))


def test_intra_without_sessions_takes_different_images():
    records = dataset("d", 1, ("ct", "t1", "t2"))
    records.append(record("d", "alone"))
    made = sampler(records, [Task("d", pairing="intra")], pairs_per_epoch=3000)
    counts = collections.Counter((p.moving.record, p.fixed.record) for p in made)
    assert is_uniform(counts, list(itertools.permutations(range(3), 2)))


def test_intra_reaches_every_image_of_a_session():
    records = [
        record("d", "a", pairing="intra", session=session, region="")
        for session in ("1", "1", "2")
    ]
    made = sampler(records, [Task("d")], pairs_per_epoch=200)
    counts = collections.Counter((p.moving.record, p.fixed.record) for p in made)
    assert set(counts) == {(0, 2), (1, 2), (2, 0), (2, 1)}


# --- network pair and similarity pair -------------------------------------------------

HCP = dataset("hcp", 6, ("t1", "t2"))
CT = dataset("ct", 6, ("ct",))


@pytest.mark.parametrize(
    ("records", "task"),
    [
        (HCP, Task("hcp")),
        (brats(), Task("brats")),
        (CT, Task("ct", invert_ct=True)),
        (dataset("ukb", 5, ("fat", "water"), region="neck"), Task("ukb")),
    ],
    ids=["hcp", "brats", "inverted", "ukb"],
)
def test_the_strategy_never_changes_what_the_network_sees(records, task):
    """The erratum's mistake: targets in the place of the network's images."""
    plans = {}
    for strategy in ("B", "F", "R"):
        chosen = Task(task.dataset, randomise=strategy, invert_ct=task.invert_ct)
        made = sampler(records, [chosen], pairs_per_epoch=200, seed=3)
        plans[strategy] = list(made)
    for b, f, r in zip(*plans.values(), strict=True):
        assert (b.moving, b.fixed) == (f.moving, f.fixed) == (r.moving, r.fixed)
        assert b.moving_target is None and b.fixed_target is None
        for plan in (f, r):
            assert scan(records, plan.moving_target) == scan(records, plan.moving)
            assert scan(records, plan.fixed_target) == scan(records, plan.fixed)
        assert modality(records, f.moving_target) == modality(records, f.fixed_target)


@pytest.mark.parametrize("strategy", ["F", "R"])
@pytest.mark.parametrize(
    ("records", "task", "names"),
    [
        (HCP, Task("hcp"), ("t1", "t2")),
        (CT, Task("ct", invert_ct=True), ("ct", INVERTED_CT)),
        (brats(4, ("t1", "t2")), Task("brats"), ("t1", "t2")),
    ],
    ids=["hcp", "inverted", "brats"],
)
def test_inputs_and_targets_are_independent(records, task, names, strategy):
    chosen = Task(task.dataset, randomise=strategy, invert_ct=task.invert_ct)
    made = sampler(records, [chosen], pairs_per_epoch=4000, seed=1)
    counts = collections.Counter(
        tuple(
            modality(records, view)
            for view in (p.moving, p.fixed, p.moving_target, p.fixed_target)
        )
        for p in made
    )
    cells = [
        cell
        for cell in itertools.product(names, repeat=4)
        if strategy == "R" or cell[2] == cell[3]
    ]
    assert is_uniform(counts, cells)
    if strategy == "F":  # so training meets images of two modalities with equal targets
        mixed = sum(n for cell, n in counts.items() if cell[0] != cell[1])
        assert 0.45 < mixed / 4000 < 0.55


def test_a_common_modality_is_one_that_both_subjects_have():
    records = [
        record("d", "a", "t1"),
        record("d", "a", "t2"),
        record("d", "b", "t2"),
        record("d", "b", "fl"),
        record("d", "c", "pd"),
    ]
    made = sampler(records, [Task("d", randomise="F")], pairs_per_epoch=600)
    seen = set()
    for plan in made:
        people = {subject(records, plan.moving), subject(records, plan.fixed)}
        seen.add(frozenset(people))
        if "c" in people:  # nothing in common: the network's images
            assert plan.moving_target is None and plan.fixed_target is None
        else:
            views = (plan.moving_target, plan.fixed_target)
            assert {modality(records, view) for view in views} == {"t2"}
            assert {subject(records, view) for view in views} == people
    assert len(seen) == 3


def test_targets_stay_in_the_session_and_region():
    records = [
        record("d", f"s{s}", m, region=region, session=session)
        for s in range(2)
        for session in ("1", "2")
        for region in ("neck", "thigh")
        for m in ("fat", "water")
    ]
    made = sampler(records, [Task("d", randomise="R")], pairs_per_epoch=300)
    for plan in made:
        assert scan(records, plan.moving_target) == scan(records, plan.moving)
        assert scan(records, plan.fixed_target) == scan(records, plan.fixed)


def test_targets_need_to_know_what_is_aligned():
    records = [*dataset("d", 2, ("t1", "t2")), record("d", "s00", "T1")]
    sampler(records, [Task("d")], pairs_per_epoch=1)
    with pytest.raises(UserError, match="subject 's00'.* both t1 of one session"):
        sampler(records, [Task("d", randomise="F")], pairs_per_epoch=1)


def test_unaligned_scans_of_a_subject_are_no_targets_of_each_other():
    records = dataset("d", 3, ("ct", "t1"), pairing="intra")
    made = sampler(records, [Task("d", randomise="R")], pairs_per_epoch=100)
    for plan in made:
        assert (plan.moving_target, plan.fixed_target) == (plan.moving, plan.fixed)


# --- weights --------------------------------------------------------------------------


def multigradicon():
    """The eight training datasets of the paper: records and tasks."""
    regions = [f"region {n}" for n in range(6)]
    records = [
        *dataset("COPDGene", 2, ("ct",)),
        *brats(2),
        *dataset("L2R-Abdomen", 2, ("ct",)),
        *dataset("HCP", 2, ("t1w", "t2w")),
        *dataset("ABCD", 2, ("fa", "md")),
        *dataset("OAI", 2, ("dess", "t2")),
        *dataset("MRCT", 2, ("mr", "CT")),
        *(r for region in regions for r in dataset("UKB", 2, ("fat", "water"),
                                                   region=region)),
    ]  # fmt: skip
    tasks = [
        Task("COPDGene"),
        Task("brats", randomise="F"),
        Task("L2R-Abdomen", invert_ct=True, randomise="F"),
        Task("HCP", randomise="F"),
        Task("ABCD", randomise="F"),
        Task("OAI"),
        Task("MRCT", invert_ct=True),
        Task("UKB", randomise="F"),
    ]
    return records, tasks


def test_modality_weights_are_the_papers():
    records, tasks = multigradicon()
    weights = sampler_lib.modality_weights(records, tasks)
    assert weights == (1, 10, 3, 3, 3, 3, 6, 18)
    made = sampler(records, tasks, pairs_per_epoch=4000, schedule="weighted")
    percent = 100 * np.array(made.shares)
    printed = [2.12, 21.27, 6.38, 6.38, 6.38, 6.38, 12.76, 38.29]
    np.testing.assert_allclose(percent, printed, atol=0.01)
    assert math.isclose(sum(made.shares), 1)
    counts = np.bincount([p.task for p in made], minlength=8)
    assert stats.chisquare(counts, np.array(made.shares) * 4000).pvalue > 1e-3


def test_region_weights_are_the_papers():
    anatomies = {
        "PancreasCBCT": ["abdomen"],
        "ThoraxCBCT": ["lung"],
        "ABCD": ["brain"],
        "COPDGene": ["lung"],
        "BraTS-Reg": ["brain"],
        "L2R-Abdomen": ["abdomen"],
        "HCP": ["brain"],
        "OAI": ["knee"],
        "MRCT": ["abdomen"],
        "UKB": ["abdomen", "lung", "knee"],
    }
    weights = sampler_lib.region_weights(anatomies)
    third = 4 / 3
    expected = [1, third, third, third, third, 1, third, 2, 1, 13 / 3]
    assert list(weights) == list(anatomies)
    np.testing.assert_allclose(list(weights.values()), expected, rtol=1e-12)
    percent = 100 * np.array(list(weights.values())) / sum(weights.values())
    np.testing.assert_allclose(
        percent[[0, 1, 7, 9]], [6.25, 8.33, 12.5, 27.08], atol=0.01
    )
    with pytest.raises(UserError, match="'X' has no anatomy"):
        sampler_lib.region_weights({"X": []})
    with pytest.raises(TypeError):
        sampler_lib.region_weights({"X": "lung"})


def test_given_weights_replace_the_formula():
    records = [*dataset("a", 3), *dataset("b", 3, ("t1", "t2"))]
    tasks = [Task("a", weight=1.5), Task("b")]
    made = sampler(records, tasks, pairs_per_epoch=10, schedule="weighted")
    np.testing.assert_allclose(made.shares, [1 / 3, 2 / 3])
    even = sampler(records, tasks, pairs_per_epoch=10, schedule="per_dataset")
    assert even.shares == (0.5, 0.5)


# --- mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "tasks", "options", "message"),
    [
        (HCP, [], {}, "no task"),
        (HCP, [Task("hpc")], {}, "'hpc' has no records.*did you mean hcp"),
        ([], [Task("hcp")], {}, "datasets \\(none\\)"),
        (HCP, [Task("hcp")], {"pairs_per_epoch": 0}, "pairs_per_epoch is 0"),
        (HCP, [Task("hcp")], {"seed": -1}, "seed is -1"),
        (HCP, [Task("hcp")], {"schedule": "even"}, "schedule is 'even'.*per_dataset"),
        (HCP, [Task("hcp", randomise="f")], {}, "randomise is 'f'.*B, F, R"),
        (HCP, [Task("hcp", pairing="both")], {}, "pairing is 'both'.*inter, intra"),
        (HCP, [Task("hcp", weight=0.0)], {}, "weight 0"),
        (HCP, [Task("hcp", weight=math.nan)], {}, "weight nan"),
        (HCP, [Task("hcp", invert_ct=True)], {}, "inverts CT images.*none"),
        (dataset("d", 1), [Task("d")], {}, "no two subjects"),
        (HCP, [Task("hcp", pairing="intra")], {}, None),
        (
            dataset("d", 4),
            [Task("d", pairing="intra")],
            {},
            "no subject with two scans",
        ),
        (
            [*dataset("d", 2), record("d", "z", pairing="intra")],
            [Task("d")],
            {},
            "inter and for intra",
        ),
    ],
)
def test_mistakes_are_explained(records, tasks, options, message):
    options = {"pairs_per_epoch": 4} | options
    if message is None:
        sampler(records, tasks, **options)
        return
    with pytest.raises(UserError, match=message):
        sampler(records, tasks, **options)


def test_splits_are_not_mixed():
    records = [*dataset("d", 3), *dataset("d", 3, split="val")]
    with pytest.raises(ValueError, match="several splits"):
        sampler(records, [Task("d")], pairs_per_epoch=1)


def test_large_sets_need_no_list_of_pairs():
    records = dataset("d", 20_000)
    made = sampler(records, [Task("d")], pairs_per_epoch=10**6, schedule="weighted")
    plans = [made[i] for i in (0, 10**6, 10**12)]
    assert len({plan.moving for plan in plans}) == 3
