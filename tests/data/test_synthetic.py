"""Synthetic pairs: what is known of them is true, and they can be had again."""

import dataclasses
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from jaxreg.data import synthetic
from jaxreg.data.manifest import check
from jaxreg.data.manifest import read as read_lib
from jaxreg.data.synthetic import TASKS, SyntheticConfig, SyntheticPairs
from jaxreg.errors import UserError
from jaxreg.io import volumes

SMALL = (16, 14, 18)
INTER = SyntheticConfig(shape=SMALL, labels=4, modalities=2, multimodal=True)
INTRA = dataclasses.replace(INTER, name="intra", pairing="intra")


def places(shape):
    return np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)


def read(array, at, order=1):
    """D H W at places ... 3."""
    at = np.moveaxis(at, -1, 0)
    return ndimage.map_coordinates(array, at, order=order, mode="nearest")


def warped_labels(pair, labels):
    """The moving labels at the known places: the one that covers most of a voxel."""
    shape = pair.moving.shape[:3]
    at = places(shape) + pair.displacement_voxel
    moving = pair.moving_labels[..., 0]
    shares = [read((moving == k).astype(float), at) for k in range(labels + 1)]
    return np.argmax(shares, axis=0)


def dice(a, b, labels):
    return np.array(
        [2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum())
         for k in range(1, labels + 1)]
    )  # fmt: skip


def jacobian(displacement):
    rows = [np.stack(np.gradient(displacement[..., i]), -1) for i in range(3)]
    return np.linalg.det(np.stack(rows, -2) + np.eye(3))


def same(a, b):
    for field in dataclasses.fields(a):
        np.testing.assert_equal(getattr(a, field.name), getattr(b, field.name))


@pytest.fixture(scope="module")
def pairs():
    """Each task's pair at a size at which voxels blur the overlap little."""
    made = {}
    for name, config in TASKS.items():
        config = dataclasses.replace(config, shape=(48, 44, 50))
        made[name] = config, synthetic.pair(config, 3, 1)
    return made


@pytest.mark.parametrize("name", TASKS)
def test_arrays(name, pairs):
    config, pair = pairs[name]
    assert pair.task == config.name == name
    for image in (pair.moving, pair.fixed):
        assert image.shape == (*config.shape, 1)
        assert image.dtype == np.float32
        assert 0 <= image.min() < 0.05
        assert 0.4 < image.max() <= 1
    for labels in (pair.moving_labels, pair.fixed_labels):
        assert labels.shape == (*config.shape, 1)
        assert labels.dtype == np.int32
        assert set(np.unique(labels)) == set(range(config.labels + 1))
    assert pair.displacement_voxel.shape == (*config.shape, 3)
    assert pair.displacement_voxel.dtype == np.float32


@pytest.mark.parametrize("name", TASKS)
def test_known_displacement_carries_moving_onto_fixed(name, pairs):
    config, pair = pairs[name]
    fixed = pair.fixed_labels[..., 0]
    before = dice(pair.moving_labels[..., 0], fixed, config.labels)
    after = dice(warped_labels(pair, config.labels), fixed, config.labels)
    assert before.mean() < 0.88  # there is something to register
    assert after.mean() > 0.95
    assert after.min() > 0.93
    # The sign and the order of axes: neither inverse nor transpose would do.
    for wrong in (-pair.displacement_voxel, pair.displacement_voxel[..., ::-1]):
        other = dataclasses.replace(pair, displacement_voxel=wrong)
        got = dice(warped_labels(other, config.labels), fixed, config.labels)
        assert got.mean() < after.mean() - 0.08


@pytest.mark.parametrize("name", TASKS)
def test_known_displacement_does_not_fold(name, pairs):
    assert jacobian(pairs[name][1].displacement_voxel).min() > 0.05


@pytest.mark.parametrize("name", ["inter_mono", "intra_mono"])
def test_images_correspond_as_the_labels_do(name, pairs):
    pair = pairs[name][1]
    at = places(pair.moving.shape[:3]) + pair.displacement_voxel
    body = pair.fixed_labels[..., 0] > 0
    fixed = pair.fixed[..., 0][body]
    before = np.corrcoef(pair.moving[..., 0][body], fixed)[0, 1]
    after = np.corrcoef(read(pair.moving[..., 0], at)[body], fixed)[0, 1]
    assert after > max(0.8, before + 0.1)


@pytest.mark.parametrize("config", [INTER, INTRA], ids=["inter", "intra"])
def test_maps_close_in_the_template(config):
    """Fixed to template is fixed to moving to template, to a fraction of a voxel."""
    pair = synthetic.pair(config, 7, 2)
    who = [(4, 0), (5, 0)] if config.pairing == "inter" else [(2, 1), (2, 0)]
    moving, fixed = (
        synthetic.subject(config, 7, index, scan=scan) for index, scan in who
    )
    same_labels = (moving.labels, fixed.labels)
    np.testing.assert_array_equal(pair.moving_labels, same_labels[0])
    np.testing.assert_array_equal(pair.fixed_labels, same_labels[1])
    np.testing.assert_array_equal(pair.moving, moving.images[pair.moving_modality])
    np.testing.assert_array_equal(pair.fixed, fixed.images[pair.fixed_modality])
    u = pair.displacement_voxel
    at = places(SMALL) + u
    there = [read(moving.to_template_voxel[..., i], at) for i in range(3)]
    gap = np.linalg.norm(u + np.stack(there, -1) - fixed.to_template_voxel, axis=-1)
    assert gap.mean() < 0.05
    assert gap.max() < 0.5
    assert np.linalg.norm(u, axis=-1).max() > 0.8


def test_fine_grids_show_the_same_anatomy():
    """Beyond the lattice of smooth fields only the sampling is finer."""
    coarse = synthetic.subject(SyntheticConfig(shape=(32,) * 3), 0, 0, modalities=[])
    config = SyntheticConfig(shape=(63, 32, 63), deformation_voxel=4.0)
    fine = synthetic.subject(config, 0, 0, modalities=[])
    every_other = fine.labels[::2, :, ::2]
    assert (every_other == coarse.labels).mean() > 0.93
    assert not coarse.images


def test_deformation_has_the_size_asked_for():
    calm = dataclasses.replace(INTRA, organ_change=0.0, noise=0.0)
    for largest in (0.0, 1.0, 2.0):
        config = dataclasses.replace(calm, deformation_voxel=largest)
        u = synthetic.pair(config, 0, 0).displacement_voxel
        length = np.linalg.norm(u, axis=-1).max()
        assert 0.25 * largest <= length <= 1.1 * largest
        border = np.concatenate([u[0].ravel(), u[:, -1].ravel(), u[..., 0, :].ravel()])
        np.testing.assert_array_equal(border, 0)


def test_modalities_have_other_contrasts():
    made = synthetic.subject(TASKS["inter_multi"], 0, 0)
    labels = made.labels[..., 0]
    means = np.array(
        [[made.images[m][labels == k].mean() for k in range(1, 6)] for m in range(3)]
    )
    for one in range(3):
        assert np.ptp(means[one]) > 0.15  # each shows its organs
        for other in range(one):
            assert abs(means[one] - means[other]).max() > 0.2
            assert np.corrcoef(means[one], means[other])[0, 1] < 0.7


def test_pairs_have_the_modalities_of_their_task():
    multi = [synthetic.pair(INTER, 0, i) for i in range(8)]
    assert {(p.moving_modality, p.fixed_modality) for p in multi} == {(0, 1), (1, 0)}
    config = dataclasses.replace(INTER, multimodal=False)
    mono = [synthetic.pair(config, 0, i) for i in range(8)]
    assert {(p.moving_modality, p.fixed_modality) for p in mono} == {(0, 0), (1, 1)}


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.integers(10, 20),
    labels=st.integers(1, synthetic.MAX_LABELS),
    anatomy=st.integers(0, 50),
    index=st.integers(0, 2**40),
)
def test_every_label_occurs(size, labels, anatomy, index):
    config = SyntheticConfig(shape=(size, size + 3, 12), labels=labels, anatomy=anatomy)
    made = synthetic.subject(config, 1, index, modalities=[])
    assert set(np.unique(made.labels)) == set(range(labels + 1))


@pytest.mark.parametrize("config", [INTER, INTRA], ids=["inter", "intra"])
def test_same_seed_and_index_give_the_same_pair(config):
    forth = [synthetic.pair(config, 11, i) for i in range(3)]
    back = [synthetic.pair(config, 11, i) for i in (2, 1, 0)][::-1]
    for a, b in zip(forth, back, strict=True):
        same(a, b)
    others = [*forth[1:], synthetic.pair(config, 12, 0)]
    for other in others:
        for name in ("moving", "fixed", "moving_labels", "displacement_voxel"):
            assert not np.array_equal(getattr(forth[0], name), getattr(other, name))


def test_other_processes_make_the_same_pair():
    """And start no JAX: the input pipeline's workers import this module."""
    code = (
        "import sys, zlib; from jaxreg.data import synthetic as s; "
        "p = s.pair(s.SyntheticConfig(shape=(12, 12, 12)), 5, 6); "
        "print(zlib.crc32(p.moving.tobytes()), 'jax' in sys.modules)"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert runs[0][1] == "False"


def test_a_small_pair_takes_a_fraction_of_a_second():
    config = TASKS["inter_multi"]
    start = time.process_time()
    synthetic.pair(config, 0, 0)
    assert time.process_time() - start < 1.0


# --- the source -----------------------------------------------------------------------


def test_source_mixes_tasks_evenly():
    configs = [INTER, INTRA, dataclasses.replace(INTER, name="third", anatomy=5)]
    source = SyntheticPairs(configs, seed=4, length=7)
    assert len(source) == 7
    items = list(source)
    assert [int(item["task"]) for item in items] == [0, 1, 2, 0, 1, 2, 0]
    assert [int(item["index"]) for item in items] == list(range(7))
    for item, number in ((items[4], 1), (items[6], 2)):
        pair = synthetic.pair(configs[item["task"]], 4, number)
        for name in ("moving", "fixed", "moving_labels", "fixed_labels"):
            np.testing.assert_array_equal(item[name], getattr(pair, name))
    assert set(items[0]) == {
        "moving", "fixed", "moving_labels", "fixed_labels", "task", "index"
    }  # fmt: skip
    batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
    assert batch["moving"].shape == (7, *SMALL, 1)
    assert (batch["task"].dtype, batch["index"].dtype) == (np.int32, np.int64)


def test_source_goes_on_and_travels_to_workers():
    source = SyntheticPairs([INTER, INTRA], length=3)
    later = source[3]
    assert not np.array_equal(later["moving"], source[1]["moving"])
    there = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(there[3]["moving"], later["moving"])
    with pytest.raises(IndexError, match="indices start at 0"):
        source[-1]


# --- the data set on disk -------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "new" / "set"
    config = dataclasses.replace(INTRA, shape=(10, 12, 14))
    return config, synthetic.write_dataset(folder, config, subjects=10, seed=2)


def test_dataset_reads_back(dataset):
    config, path = dataset
    header, *lines = path.read_text(encoding="utf-8").split()
    names = header.split(",")
    assert names == [
        "image", "label", "subject", "dataset", "region", "modality", "pairing",
        "split", "session",
    ]  # fmt: skip
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines]
    assert len(rows) == 10 * 2 * 2  # subjects, scans, contrasts
    assert {row["subject"] for row in rows if row["split"] == "val"} == {
        "subject_0005", "subject_0010"
    }  # fmt: skip
    assert {(r["dataset"], r["pairing"], r["region"]) for r in rows} == {
        ("intra", "intra", "anatomy0")
    }
    assert {row["modality"] for row in rows} == {"contrast1", "contrast2"}
    row = rows[6]
    assert (row["subject"], row["session"]) == ("subject_0002", "scan2")
    assert row["modality"] == "contrast1"
    image = volumes.read_volume(path.parent / row["image"])
    labels = volumes.read_volume(path.parent / row["label"], kind="labels")
    assert image.grid.matches(labels.grid)
    np.testing.assert_allclose(image.grid.spacing_mm, (2, 1.25, 1.5), rtol=1e-6)
    made = synthetic.subject(config, 2, 1, scan=1)
    np.testing.assert_allclose(image.array / 1000, made.images[0][..., 0], atol=6e-4)
    np.testing.assert_array_equal(labels.array, made.labels[..., 0])
    files = [p for p in path.parent.rglob("*") if p.is_file()]
    assert len(files) == 1 + 40 + 20


def test_dataset_of_one_contrast(tmp_path):
    config = SyntheticConfig(shape=(10, 10, 10), labels=2)
    for _ in range(2):  # writing again replaces
        path = synthetic.write_dataset(tmp_path, config, subjects=2)
    assert len(list((tmp_path / "images").iterdir())) == 2
    assert path == tmp_path / "manifest.csv"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="file/images cannot be made: Not a directory"):
        synthetic.write_dataset(tmp_path / "file", config, subjects=1)
    with pytest.raises(UserError, match="subjects is 0, expected at least 1"):
        synthetic.write_dataset(tmp_path, config, subjects=0)


def test_dataset_is_a_manifest(dataset):
    config, path = dataset
    read_back = read_lib.read_manifest(path)
    assert len(read_back.records) == 40
    record = read_back.records[0]
    assert record.image.exists()
    assert record.label is not None and record.label.exists()
    assert (record.subject, record.dataset) == ("subject_0001", config.name)
    assert (record.pairing, record.split) == ("intra", "train")
    assert check.check(read_back) == []


# --- wrong settings -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"shape": (32, 32)}, "shape is .32, 32., expected three sizes"),
        ({"shape": (32, 32, 4)}, "sizes of at least 8"),
        ({"labels": 0}, "labels is 0, expected 1 to 16"),
        ({"labels": 17}, "labels is 17"),
        ({"pairing": "both"}, 'pairing is "both", expected "inter" or "intra"'),
        ({"modalities": 0}, "modalities is 0, expected at least 1"),
        ({"multimodal": True}, "modalities is 1, expected .* 2 for multimodal"),
        ({"noise": -1}, "noise is -1, expected at least 0"),
        ({"deformation_voxel": float("inf")}, "deformation_voxel is inf"),
    ],
)
def test_wrong_settings_get_one_sentence(fields, expected):
    with pytest.raises(UserError, match=f"synthetic task odd: {expected}|{expected}"):
        SyntheticConfig(name="odd", **fields)


def test_sources_that_cannot_batch_are_refused():
    with pytest.raises(UserError, match="have the shapes .* one shape"):
        SyntheticPairs([INTER, TASKS["intra_mono"]])
    with pytest.raises(UserError, match="at least one task"):
        SyntheticPairs([])
    with pytest.raises(UserError, match="length is 0"):
        SyntheticPairs([INTER], length=0)
