"""Batches: what is in them, that nothing changes them, and what goes wrong."""

import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time

import cloudpickle
import jax
import nibabel as nib
import numpy as np
import pytest

from jaxreg.data import augment, pair_source, preprocess
from jaxreg.data import loading as loading_lib
from jaxreg.data.batches import Batches
from jaxreg.data.loading import Loading
from jaxreg.data.manifest.records import Record
from jaxreg.data.pair_source import PairSource
from jaxreg.data.pairs import ImageRef, PairPlan, Task
from jaxreg.data.sampler import sampler
from jaxreg.errors import UserError
from jaxreg.io import volumes

SHAPE = (6, 5, 7)
CT = preprocess.IntensityRule("ct")
MRI = preprocess.IntensityRule("mri")

# Workers cannot import this module by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def save(path, array, affine=None):
    """Writes an array D H W."""
    affine = np.diag([1.5, 2.0, 2.5, 1.0]) if affine is None else affine
    nib.save(nib.Nifti1Image(array.T, affine), path)
    return pathlib.Path(path)


def scan(folder, name, shape, seed, **fields):
    """Writes an image with label map and mask, all of one grid."""
    rng = np.random.default_rng(seed)
    image = rng.integers(-1200, 1200, shape).astype(np.int16)
    labels = rng.integers(0, 4, shape).astype(np.uint8)
    mask = (rng.random(shape) < 0.7).astype(np.uint8)
    return Record(
        image=save(folder / f"{name}.nii.gz", image),
        label=save(folder / f"{name}_seg.nii.gz", labels),
        mask=save(folder / f"{name}_mask.nii.gz", mask),
        subject=name,
        dataset="brains",
        **fields,
    )


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Four scans of other shapes; the last is CT without label map and mask."""
    folder = tmp_path_factory.mktemp("scans")
    records = [
        scan(folder, name, shape, seed)
        for seed, (name, shape) in enumerate(
            [("a", (8, 6, 7)), ("b", (6, 5, 7)), ("c", (5, 9, 6))]
        )
    ]
    ct = scan(folder, "d", (7, 7, 7), 3, modality="CT")
    return (*records, dataclasses.replace(ct, label=None, mask=None))


@pytest.fixture
def copied(scans, tmp_path):
    """The same scans in a folder of the test's own."""
    shutil.copytree(scans[0].image.parent, tmp_path / "scans")

    def moved(path):
        return None if path is None else tmp_path / "scans" / path.name

    return tuple(
        dataclasses.replace(
            r, image=moved(r.image), label=moved(r.label), mask=moved(r.mask)
        )
        for r in scans
    )


@dataclasses.dataclass(frozen=True)
class InTurn:
    """Pair i: scan i onto scan i + 1, cyclically."""

    count: int = 4
    tasks: tuple[Task, ...] = (Task("brains"),)

    def __getitem__(self, index):
        return PairPlan(
            index % len(self.tasks),
            ImageRef(index % self.count),
            ImageRef((index + 1) % self.count),
        )


@dataclasses.dataclass(frozen=True)
class Fixed:
    """The same plan every time."""

    plan: PairPlan
    tasks: tuple[Task, ...]

    def __getitem__(self, index):
        return self.plan


def source(records, **fields):
    return PairSource(records, InTurn(), **fields)


def first(source, loading, **options):
    """Returns the first batch."""
    options = {"batch_size": 1} | options
    with Batches(source, loading, **options) as batches:
        return next(batches)


def all_of(source, loading, stop, **options):
    with Batches(source, loading, stop=stop, **options) as batches:
        return list(batches)


def same(a, b):
    assert set(a) == set(b)
    for key in a:
        assert a[key].dtype == b[key].dtype
        np.testing.assert_array_equal(a[key], b[key], err_msg=key)


ALL = Loading(shape=SHAPE, use_labels=True, use_masks=True)

# --- what is in a batch ---------------------------------------------------------------


def test_keys_shapes_and_types(scans):
    batch = first(source(scans), ALL, batch_size=3)
    grid = (3, *SHAPE, 1)
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "moving": (grid, "float32"),
        "fixed": (grid, "float32"),
        "moving_labels": (grid, "int32"),
        "fixed_labels": (grid, "int32"),
        "moving_mask": (grid, "uint8"),
        "fixed_mask": (grid, "uint8"),
        "task": ((3,), "int32"),
        "index": ((3,), "int64"),
    }
    plain = first(source(scans), Loading(shape=SHAPE))
    assert set(plain) == {"moving", "fixed", "task", "index"}


def test_arrays_equal_those_of_preprocess(scans):
    """Equal to what `register` would show the network."""
    batch = first(source(scans), ALL, batch_size=4)
    for row, (record, rule) in enumerate(zip(scans, [MRI, MRI, MRI, CT], strict=True)):
        image = volumes.read_volume(record.image)
        expected = preprocess.network_image(image, SHAPE, rule)[0]
        np.testing.assert_allclose(batch["moving"][row], expected, atol=1e-6)
        np.testing.assert_allclose(batch["fixed"][row - 1], expected, atol=1e-6)
        if record.label is None:
            assert not batch["moving_labels"][row].any()
            assert (batch["moving_mask"][row] == 1).all()
            continue
        labels = volumes.read_volume(record.label, kind="labels")
        mask = volumes.read_volume(record.mask, kind="mask")
        expected = preprocess.network_labels(labels, SHAPE)[0]
        np.testing.assert_array_equal(batch["moving_labels"][row], expected)
        np.testing.assert_array_equal(batch["fixed_labels"][row - 1], expected)
        expected = preprocess.network_mask(mask, SHAPE)[0]
        np.testing.assert_array_equal(batch["moving_mask"][row], expected)
        np.testing.assert_array_equal(batch["fixed_mask"][row - 1], expected)


def test_a_task_may_have_its_own_intensity_ranges(scans, tmp_path):
    """Also where two tasks share the scans, and a cache."""
    tasks = (
        Task("brains"),
        Task("brains", ct_window=(-10.0, 300.0), quantile_range=(0.2, 0.8)),
    )
    for cached in (None, tmp_path / "cache"):
        loading = Loading(shape=SHAPE, cache_dir=cached)
        batch = first(PairSource(scans, InTurn(tasks=tasks)), loading, batch_size=4)
        for row, record in enumerate(scans):
            rule = loading.rule(record.modality, tasks[row % 2])
            image = volumes.read_volume(record.image)
            expected = preprocess.network_image(image, SHAPE, rule)[0]
            np.testing.assert_allclose(batch["moving"][row], expected, atol=1e-6)
        assert loading.rule("mri", tasks[1]).quantile_range == (0.2, 0.8)
        assert loading.rule("ct", tasks[1]).ct_window == (-10.0, 300.0)


def test_masked_inputs_equal_those_of_preprocess(scans):
    loading = Loading(shape=SHAPE, mask_inputs=True, quantile_range=(0.1, 0.9))
    batch = first(source(scans), loading, batch_size=4)
    rule = preprocess.IntensityRule("mri", quantile_range=(0.1, 0.9))
    for row, record in enumerate(scans):
        image = volumes.read_volume(record.image)
        mask = record.mask and volumes.read_volume(record.mask, kind="mask")
        expected = preprocess.network_image(
            image, SHAPE, CT if row == 3 else rule, mask=mask
        )
        np.testing.assert_allclose(batch["moving"][row], expected[0], atol=1e-6)


def test_uint16_is_within_half_a_step(scans):
    exact = first(source(scans), ALL, batch_size=4)
    short = dataclasses.replace(ALL, storage="uint16")
    batch = first(source(scans), short, batch_size=4)
    assert batch["moving"].dtype == np.uint16
    back = batch["moving"].astype(np.float32) / pair_source.QUANTA
    np.testing.assert_allclose(back, exact["moving"], atol=0.51 / 65535)
    np.testing.assert_array_equal(batch["moving_labels"], exact["moving_labels"])


def test_uint16_does_not_wrap():
    ends = np.array([-1e-7, 0, 0.5 / 65535, 1, 1 + 1e-6], np.float32)
    assert loading_lib.stored(ends, "uint16").tolist() == [0, 0, 0, 65535, 65535]


def test_indices_and_tasks(scans):
    two = PairSource(scans, InTurn(tasks=(Task("brains"), Task("brains"))))
    for number, batch in enumerate(all_of(two, Loading(shape=SHAPE), 3, batch_size=3)):
        index = np.arange(3) + 3 * number
        np.testing.assert_array_equal(batch["index"], index)
        np.testing.assert_array_equal(batch["task"], index % 2)


def test_targets_and_inversion(scans):
    plain = first(source(scans), Loading(shape=SHAPE), batch_size=4)["moving"]
    tasks = (Task("brains", randomise="R", invert_ct=True),)
    plan = PairPlan(0, ImageRef(0), ImageRef(3, True), ImageRef(2), ImageRef(3, False))
    batch = first(PairSource(scans, Fixed(plan, tasks)), Loading(shape=SHAPE))
    for key, record, inverted in (
        ("moving", 0, False),
        ("fixed", 3, True),
        ("moving_target", 2, False),
        ("fixed_target", 3, False),
    ):
        np.testing.assert_array_equal(batch[key][0], plain[record])
        assert batch[f"{key}_inverted"].dtype == bool
        assert batch[f"{key}_inverted"].tolist() == [inverted]


def test_masked_inversion_keeps_the_outside_zero(scans):
    """Scan 1 has the network's shape, so that its mask needs no resize."""
    plan = PairPlan(
        0, ImageRef(1, inverted=True), ImageRef(3, inverted=True), ImageRef(1), None
    )
    tasks = (Task("brains", randomise="R", invert_ct=True),)
    loading = Loading(SHAPE, mask_inputs=True, prefetch=0)
    batch = first(PairSource(scans, Fixed(plan, tasks)), loading)
    pair = augment.to_pair(batch, None, None)
    inside = volumes.read_volume(scans[1].mask, kind="mask").array > 0
    plain = preprocess.normalise(volumes.read_volume(scans[1].image).array, MRI)
    expected = {"moving": 1 - plain, "moving_target": plain}
    for name, image in expected.items():
        seen = np.asarray(getattr(pair, name))[0, ..., 0]
        np.testing.assert_allclose(seen, np.where(inside, image, 0), atol=1e-6)
    # Without a mask, the device inverts, as ever.
    assert batch["fixed_inverted"].tolist() == [True]


def test_pairs_without_targets_have_the_networks_images(scans):
    tasks = (Task("brains"), Task("brains", randomise="F"))
    plan = PairPlan(0, ImageRef(0, True), ImageRef(1))
    batch = first(PairSource(scans, Fixed(plan, tasks)), Loading(shape=SHAPE))
    np.testing.assert_array_equal(batch["moving_target"], batch["moving"])
    np.testing.assert_array_equal(batch["fixed_target"], batch["fixed"])
    assert "moving_inverted" not in batch
    tasks = (tasks[0], dataclasses.replace(tasks[1], invert_ct=True))
    batch = first(PairSource(scans, Fixed(plan, tasks)), Loading(shape=SHAPE))
    assert batch["moving_inverted"] and batch["moving_target_inverted"]
    assert not batch["fixed_inverted"] and not batch["fixed_target_inverted"]


@pytest.mark.parametrize(
    ("classes", "expected"),
    [
        ({}, "int32"),
        ({"brains": {1: "x", 2: "y", 3: "z"}}, "uint8"),
        ({"brains": [1, 2, 3, 300]}, "uint16"),
        ({"brains": [1, 2, 3, 70000]}, "int32"),
        ({"brains": []}, "int32"),
        ({"knees": [1]}, "int32"),
    ],
)
def test_known_classes_make_small_label_maps(scans, classes, expected):
    loading = Loading(shape=SHAPE, use_labels=True)
    batch = first(source(scans, classes=classes), loading)
    assert str(batch["moving_labels"].dtype) == expected
    same(
        {"labels": batch["moving_labels"].astype(int)},
        {"labels": first(source(scans), loading)["moving_labels"].astype(int)},
    )


# --- orientation ----------------------------------------------------------------------


def test_canonical_scans_look_alike_however_stored(copied):
    """One scan, written in every order of axes and directions."""
    record = copied[0]
    loading = dataclasses.replace(ALL, canonical=True, mask_inputs=True)
    expected = first(source(copied), loading)  # written as RAS+: d up, h front, w right
    straight = first(source(copied), dataclasses.replace(loading, canonical=False))
    same(expected, straight)
    for axes in ["LPS", "SAR", "PIL", "ASL"]:
        for path in (record.image, record.label, record.mask):
            stored = nib.load(path)
            turned = stored.as_reoriented(
                nib.orientations.ornt_transform(
                    nib.orientations.io_orientation(stored.affine),
                    nib.orientations.axcodes2ornt(axes),
                )
            )
            assert nib.aff2axcodes(turned.affine) == tuple(axes)
            data = np.ascontiguousarray(turned.dataobj)
            nib.save(nib.Nifti1Image(data, turned.affine), path)
        same(first(source(copied), loading), expected)
    other = first(source(copied), dataclasses.replace(loading, canonical=False))
    assert not np.array_equal(other["moving"], expected["moving"])


# --- the same batches, whatever reads them --------------------------------------------


def test_global_batches_do_not_depend_on_the_processes(scans):
    whole = all_of(source(scans), ALL, 3, batch_size=4)
    for count in (2, 4):
        parts = [
            all_of(
                source(scans),
                ALL,
                3,
                batch_size=4,
                process_index=index,
                process_count=count,
            )
            for index in range(count)
        ]
        for batch, *shares in zip(whole, *parts, strict=True):
            joined = {k: np.concatenate([s[k] for s in shares]) for k in batch}
            same(batch, joined)


def of_hosts(scans, count, *, start=0, stop):
    """Global batches as so many hosts have them, with what each draws for its pairs.

    Returns:
      The shares joined in the order of the hosts, and what they keep in a checkpoint.
    """
    plans = sampler(scans, [Task("brains", invert_ct=True)], pairs_per_epoch=10, seed=1)
    root, batches = jax.random.key(5), []
    with contextlib.ExitStack() as stack:
        hosts = [
            stack.enter_context(
                Batches(
                    PairSource(scans, plans),
                    ALL,
                    batch_size=4,
                    process_index=index,
                    process_count=count,
                    start=start,
                    stop=stop,
                )
            )
            for index in range(count)
        ]
        for step in range(start, stop):
            shares = []
            for host in hosts:
                share = next(host)
                # As the step does on each device: its key, and the pairs' numbers.
                key = jax.random.fold_in(root, step)
                thetas = augment.draw(key, share["index"], augment.Augmentation())
                leaves = jax.tree.leaves(thetas)
                shares.append(share | {f"theta {i}": np.asarray(a)
                                       for i, a in enumerate(leaves)})  # fmt: skip
            batches.append(
                {k: np.concatenate([s[k] for s in shares]) for k in shares[0]}
            )
        states = [host.state() for host in hosts]
    assert all(state == states[0] for state in states)
    return batches, states[0]


def test_hosts_draw_the_same_pairs_and_augmentations_in_the_same_order(scans):
    """Beyond an epoch, whose end falls inside a batch."""
    whole, _ = of_hosts(scans, 1, stop=5)
    assert [list(batch["index"]) for batch in whole] == [
        list(range(4 * b, 4 * b + 4)) for b in range(5)
    ]
    drawn = np.concatenate([batch["theta 0"].reshape(4, -1) for batch in whole])
    assert len(np.unique(drawn, axis=0)) == 20
    for count in (2, 4):
        for one, several in zip(whole, of_hosts(scans, count, stop=5)[0], strict=True):
            same(one, several)


@pytest.mark.parametrize(("before", "after"), [(4, 2), (4, 1), (1, 4)])
def test_a_run_goes_on_identically_on_another_number_of_hosts(scans, before, after):
    whole, _ = of_hosts(scans, 1, stop=5)
    begun, state = of_hosts(scans, before, stop=3)
    rest, _ = of_hosts(scans, after, start=state["batches"], stop=5)
    for one, resumed in zip(whole, [*begun, *rest], strict=True):
        same(one, resumed)


@pytest.mark.parametrize(
    "options", [{"prefetch": 0}, {"prefetch": 5, "read_threads": 4}]
)
def test_batches_do_not_depend_on_threads(scans, tmp_path, options):
    expected = all_of(source(scans), ALL, 6, batch_size=2)
    loading = dataclasses.replace(ALL, cache_dir=tmp_path, **options)
    for a, b in zip(
        expected, all_of(source(scans), loading, 6, batch_size=2), strict=True
    ):
        same(a, b)


def test_a_run_continues_where_it_was(scans):
    expected = all_of(source(scans), ALL, 6, batch_size=2)
    with Batches(source(scans), ALL, batch_size=2) as batches:
        assert batches.state() == {"batches": 0, "batch_size": 2}
        for _ in range(3):
            next(batches)
        state = batches.state()  # what was read ahead does not count
    assert state == {"batches": 3, "batch_size": 2}
    rest = all_of(source(scans), ALL, 6, batch_size=2, start=state["batches"])
    for a, b in zip(expected[3:], rest, strict=True):
        same(a, b)


def test_the_real_sampler(scans):
    pairs = sampler(scans, [Task("brains")], pairs_per_epoch=10, seed=1)
    chosen = PairSource(scans, pairs)
    batches = all_of(chosen, Loading(shape=SHAPE), 8, batch_size=2)  # beyond an epoch
    alone = first(source(scans), Loading(shape=SHAPE), batch_size=4)["moving"]
    for batch in batches:
        for row, index in enumerate(batch["index"]):
            np.testing.assert_array_equal(
                batch["moving"][row], alone[pairs[index].moving.record]
            )


def test_waiting_is_counted(scans):
    class Slow:
        def __getitem__(self, index):
            time.sleep(0.05)
            return pair_of_zeros()

    with Batches(Slow(), Loading(shape=SHAPE, prefetch=0), batch_size=1) as batches:
        next(batches)
        next(batches)
        assert 0.1 <= batches.waited_s < 2


def test_the_end(scans):
    batches = Batches(source(scans), Loading(shape=SHAPE), batch_size=1, stop=1)
    assert len(list(batches)) == 1
    assert list(batches) == []
    batches.close()
    assert all_of(source(scans), ALL, 2, batch_size=1, start=2) == []


# --- worker processes -----------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
def test_workers_give_the_same_and_report_errors(copied, tmp_path, cached):
    expected = all_of(source(copied), ALL, 7, batch_size=2)
    loading = dataclasses.replace(
        ALL, workers=2, cache_dir=tmp_path / "cache" if cached else None
    )
    with Batches(source(copied), loading, batch_size=2, start=2) as batches:
        for number in range(2, 6):
            same(next(batches), expected[number])
        assert batches.state()["batches"] == 6
        copied[2].label.unlink()
        with pytest.raises(UserError) as caught:
            for _ in range(100):
                next(batches)
    assert_names(caught.value, copied[2].label, "does not exist", copied[2].image)
    assert multiprocessing.active_children() == []


_NO_BACKEND = """
import sys
from jax._src import xla_bridge
from jaxreg.data import batches, pair_source
from jaxreg.data.loading import Loading
from jaxreg.data.manifest.records import Record
from jaxreg.data.pairs import ImageRef, PairPlan, Task
class Sampler:
    tasks = (Task("brains"),)
    def __getitem__(self, index):
        return PairPlan(0, ImageRef(0), ImageRef(0))
records = [Record(*sys.argv[1:3], "brains", label=sys.argv[3], mask=sys.argv[4])]
source = pair_source.PairSource(records, Sampler())
loading = Loading(
    shape=(6, 5, 7), use_labels=True, use_masks=True, canonical=True, mask_inputs=True
)
next(batches.Batches(source, loading, batch_size=1))
print(xla_bridge.backends_are_initialized())
batches._start_worker(0, 1)
import jax
print(jax.devices()[0].platform)
"""


def test_reading_starts_no_backend(scans):
    script = _NO_BACKEND.replace("*sys.argv[1:3]", "pathlib.Path(sys.argv[1]), 'a'")
    record = scans[0]
    done = subprocess.run(
        [sys.executable, "-c", f"import pathlib\n{script}"]
        + list(map(str, (record.image, "a", record.label, record.mask))),
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "",
            "PYTHONPATH": os.pathsep.join(sys.path),
        },
    )
    assert done.stdout.split() == ["False", "cpu"], done.stderr


# --- the cache ------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """Lists the volumes that are read from their own files."""
    calls = []
    read = volumes.read_volume

    def counted(path, *, kind="image"):
        calls.append(pathlib.Path(path).name)
        return read(path, kind=kind)

    monkeypatch.setattr(volumes, "read_volume", counted)
    return calls


@pytest.fixture
def cached(tmp_path):
    """With a cache, and nothing read ahead that would be counted later."""
    return dataclasses.replace(ALL, cache_dir=tmp_path / "cache", prefetch=0)


def test_everything_is_read_once(scans, cached, reads):
    without = dataclasses.replace(cached, cache_dir=None)
    expected = first(source(scans), without, batch_size=4)
    reads.clear()
    same(first(source(scans), cached, batch_size=4), expected)
    assert sorted(set(reads)) == sorted(reads)  # 4 images, 3 label maps, 3 masks
    assert len(reads) == 10
    reads.clear()
    same(first(source(scans), cached, batch_size=4), expected)
    assert reads == []


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"ct_window": (-500, 500)}, {"image"}),
        ({"quantile_range": (0.1, 0.9)}, {"image"}),
        ({"storage": "uint16"}, {"image"}),
        ({"mask_inputs": True}, {"image"}),
        ({"shape": (5, 5, 5)}, {"image", "seg", "mask"}),
        ({"canonical": True}, {"image", "seg", "mask"}),
        ({"read_threads": 1, "use_masks": False}, set()),
    ],
)
def test_other_preprocessing_is_read_anew(scans, cached, reads, change, again):
    first(source(scans), cached, batch_size=4)
    reads.clear()
    changed = dataclasses.replace(cached, **change)
    got = first(source(scans), changed, batch_size=4)
    kinds = {
        "seg" if "_seg" in name else "mask" if "_mask" in name else "image"
        for name in reads
    }
    assert kinds - again == ({"mask"} if "mask_inputs" in change else set())
    assert again <= kinds
    without = dataclasses.replace(changed, cache_dir=None)
    same(got, first(source(scans), without, batch_size=4))


@pytest.mark.parametrize("which", ["image", "label", "mask"])
def test_changed_files_are_noticed_while_running(copied, cached, which):
    loading = dataclasses.replace(cached, mask_inputs=True, prefetch=0)
    with Batches(source(copied), loading, batch_size=4) as batches:
        before = next(batches)
        path = getattr(copied[0], which)
        array = nib.load(path).get_fdata().T
        changed = np.where(array > 0, 0, 1) if which == "mask" else array[::-1]
        save(path, np.ascontiguousarray(changed).astype(np.int16))
        after = next(batches)
    key = {"image": "moving", "label": "moving_labels", "mask": "moving_mask"}[which]
    assert not np.array_equal(before[key][0], after[key][0])
    np.testing.assert_array_equal(before[key][1:], after[key][1:])
    assert np.array_equal(before["moving"][0], after["moving"][0]) == (which == "label")


def test_damaged_entries_are_rebuilt(scans, cached, reads):
    expected = first(source(scans), cached, batch_size=4)
    for path in (cached.cache_dir / "entries").iterdir():
        path.write_bytes(path.read_bytes()[:-50])
    for _ in range(2):
        reads.clear()
        same(first(source(scans), cached, batch_size=4), expected)
    assert reads == []


def test_a_small_cache_evicts_and_batches_stay_the_same(scans, cached):
    expected = all_of(source(scans), ALL, 6, batch_size=2)
    small = dataclasses.replace(cached, cache_limit_gb=3000 / 1e9)
    for a, b in zip(
        expected, all_of(source(scans), small, 6, batch_size=2), strict=True
    ):
        same(a, b)
    entries = (cached.cache_dir / "entries").iterdir()
    assert 0 < sum(path.stat().st_size for path in entries) <= 3000 + 3 * 1300


def test_without_space_work_goes_on(scans, tmp_path):
    expected = first(source(scans), ALL, batch_size=4)
    (tmp_path / "file").write_text("")
    loading = dataclasses.replace(ALL, cache_dir=tmp_path / "file" / "cache")
    with pytest.warns(UserWarning, match="takes no more volumes"):
        same(first(source(scans), loading, batch_size=4), expected)


def test_headers_of_detached_files_say_too_little(copied, cached, reads):
    """The header stays the same while the voxels change."""
    image = copied[0].image.with_name("a.mhd")
    header = (
        "ObjectType = Image\nNDims = 3\nDimSize = 4 4 4\nElementSpacing = 1 1 1\n"
        "ElementType = MET_UCHAR\nElementDataFile = a.raw\n"
    )
    image.write_text(header)
    records = [dataclasses.replace(copied[3], image=image)]
    pairs = PairSource(records, InTurn(count=1))
    results = []
    for seed in range(2):
        voxels = np.random.default_rng(seed).integers(0, 255, 64).astype(np.uint8)
        image.with_suffix(".raw").write_bytes(voxels.tobytes())
        results.append(first(pairs, cached)["moving"])
    assert not np.array_equal(*results)


# --- pairs that are made ready --------------------------------------------------------


def pair_of_zeros(**arrays):
    return {
        "moving": np.zeros((*SHAPE, 1), np.float32),
        "fixed": np.ones((*SHAPE, 1), np.float32),
    } | arrays


class Made:
    """Pairs of random numbers; picklable."""

    def __init__(self, *, bad=None):
        self.bad = bad

    def __getitem__(self, index):
        if index == self.bad:
            raise UserError("this one cannot be made; choose another")
        rng = np.random.default_rng(index)
        images = rng.random((2, *SHAPE, 1), np.float32)
        return pair_of_zeros(
            moving=images[0],
            fixed=images[1],
            moving_labels=np.full((*SHAPE, 1), index, np.int16),
            fixed_labels=np.ones((*SHAPE, 1), np.int16),
            task=np.int32(index % 3),
        )


def test_ready_pairs_are_stacked():
    batches = all_of(Made(), Loading(shape=SHAPE, use_labels=True), 3, batch_size=2)
    assert [batch["index"].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
    assert batches[1]["index"].dtype == np.int64
    assert batches[1]["task"].tolist() == [2, 0]
    assert batches[1]["task"].dtype == np.int32
    np.testing.assert_array_equal(batches[1]["moving"][1], Made()[3]["moving"])
    assert (batches[2]["moving_labels"][1] == 5).all()
    plain = first(Made(), Loading(shape=SHAPE, storage="uint16"), batch_size=2)
    assert set(plain) == {"moving", "fixed", "task", "index"}
    np.testing.assert_allclose(
        plain["fixed"][1] / 65535, Made()[1]["fixed"], atol=0.51 / 65535
    )


def test_ready_pairs_through_a_worker_that_is_killed():
    expected = all_of(Made(), Loading(shape=SHAPE), 4, batch_size=2)
    loading = Loading(shape=SHAPE, workers=1)
    with Batches(Made(), loading, batch_size=2) as batches:
        for batch in expected:
            same(batch, next(batches))
        (worker,) = multiprocessing.active_children()
        worker.kill()
        with pytest.raises(UserError, match="ended by the system .*-9.*lower workers"):
            for _ in range(100):
                next(batches)
    assert multiprocessing.active_children() == []


def test_a_source_that_fails_has_its_pair_named():
    with Batches(Made(bad=3), Loading(shape=SHAPE), batch_size=2) as batches:
        next(batches)
        with pytest.raises(UserError, match=r"cannot be made.* \[pair 3\]"):
            next(batches)


@pytest.mark.parametrize(
    ("pair", "loading", "expected"),
    [
        ({}, {"use_labels": True}, "a pair of One has no moving_labels, fixed_labels"),
        ({}, {"use_masks": True}, "has no moving_mask, fixed_mask"),
        ({}, {"shape": (5, 5, 5)}, r"has shape \(6, 5, 7, 1\), .* \(5, 5, 5, 1\)"),
    ],
)
def test_ready_pairs_that_lack_something(pair, loading, expected):
    class One:
        def __getitem__(self, index):
            return pair_of_zeros(**pair)

    with pytest.raises(UserError, match=expected):
        first(One(), Loading(**{"shape": SHAPE, **loading}))


def test_settings_may_come_as_json_has_them():
    assert Loading(shape=[6, 5, 7]) == Loading(shape=SHAPE)  # pyright: ignore


# --- errors ---------------------------------------------------------------------------


def assert_names(error, *texts):
    """One sentence with the texts, the dataset and the pair."""
    message = str(error)
    assert "\n" not in message
    for text in (*texts, "[pair ", "(dataset brains)", "moving ", "fixed "):
        assert str(text) in message


def test_pairs_are_named(scans):
    named = f"moving {scans[1].image}, fixed {scans[2].image} (dataset brains)"
    assert source(scans).named(5) == named
    with Batches(source(scans), ALL, batch_size=1) as batches:
        assert batches.named(5) == named
    with Batches(Made(), Loading(shape=SHAPE), batch_size=1) as batches:
        assert batches.named(5) == "pair 5"
    plan = PairPlan(0, ImageRef(0), ImageRef(1), ImageRef(2), None)
    targets = PairSource(scans, Fixed(plan, (Task("brains", randomise="R"),)))
    assert f", moving target {scans[2].image} (" in targets.named(0)


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda path: path.unlink(), "image .* does not exist"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_bytes(path.read_bytes()[:60]), "cannot be read"),
        (lambda path: save(path, np.ones((4, 4, 4), np.int16)), "is constant"),
        (lambda path: save(path, np.ones((4, 4, 4, 2), np.int16)), "4D image"),
    ],
)
def test_files_that_fail_in_the_middle(copied, tmp_path, damage, expected, use_cache):
    loading = Loading(
        shape=SHAPE, prefetch=0, cache_dir=tmp_path / "cache" if use_cache else None
    )
    with Batches(source(copied), loading, batch_size=2) as batches:
        next(batches)
        damage(copied[3].image)
        with pytest.raises(UserError, match=expected) as caught:
            next(batches)
    assert_names(caught.value, copied[3].image, "[pair 2: moving")


@pytest.mark.parametrize("which", ["label", "mask"])
@pytest.mark.parametrize("canonical", [True, False])
def test_other_grids_are_refused(copied, which, canonical):
    path = getattr(copied[1], which)
    save(path, np.ones((4, 4, 4), np.uint8))
    loading = dataclasses.replace(ALL, canonical=canonical)
    with pytest.raises(UserError, match="lies on another grid") as caught:
        first(source(copied), loading)
    assert_names(caught.value, path, copied[1].image, "[pair 0: ")


@pytest.mark.parametrize("use_cache", [True, False])
def test_labels_outside_the_list(scans, tmp_path, use_cache):
    loading = Loading(
        shape=SHAPE, use_labels=True, cache_dir=tmp_path if use_cache else None
    )
    first(source(scans, classes={"brains": [1, 2, 3]}), loading)
    with pytest.raises(
        UserError, match=r"labels 2, 3, which are not among .* \(1\)"
    ) as caught:
        first(source(scans, classes={"brains": {1: "cortex"}}), loading)
    assert_names(caught.value, scans[0].label, "[pair 0: ")


def test_negative_labels(copied):
    save(copied[0].label, np.full((8, 6, 7), -3, np.int16))
    with pytest.raises(UserError, match="negative labels .down to -3."):
        first(source(copied), ALL)


def test_an_empty_mask(copied):
    image = nib.load(copied[0].image).get_fdata().T
    lowest = (image == image.min()).astype(np.uint8)
    save(copied[0].mask, lowest)
    loading = Loading(shape=SHAPE, mask_inputs=True)
    with pytest.raises(UserError, match="leaves nothing of its image"):
        first(source(copied), loading)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shape": (4, 4)}, "shape is .4, 4., expected three numbers"),
        ({"shape": (4, 1, 4)}, "expected three numbers of at least 2"),
        (
            {"storage": "float16"},
            'storage is "float16", expected "float32" or "uint16"',
        ),
        ({"workers": -1}, "workers is -1, expected at least 0"),
        ({"prefetch": -1}, "prefetch is -1"),
        ({"read_threads": 0}, "read_threads is 0, expected at least 1"),
        ({"cache_limit_gb": 0}, "cache_limit_gb is 0, expected more than 0"),
        ({"shape": 175}, "shape is 175, expected three numbers"),
        ({"ct_window": (5, 1)}, "ct_window is 5 1"),
        ({"quantile_range": (0.9, 0.1)}, "quantile_range is 0.9 0.1"),
    ],
)
def test_wrong_settings_get_one_sentence(fields, expected):
    with pytest.raises(UserError, match=expected):
        Loading(**fields)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 3, "process_count": 2}, "batch_size is 3, which 2 processes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "start": -1}, "start is -1"),
    ],
)
def test_wrong_shares_get_one_sentence(scans, options, expected):
    with pytest.raises(UserError, match=expected):
        Batches(source(scans), ALL, **options)
