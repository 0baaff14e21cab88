"""What registers where no model is named: the choice, and a run without any network."""

import dataclasses
import socket

import numpy as np
import pytest

import jaxreg
from jaxreg.cli import main
from jaxreg.data import modality, network_grid
from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.registration import automatic, pair, preparation
from jaxreg.registration import options as options_lib
from jaxreg.registration.options import EFFORTS, Options, settled
from jaxreg.space.grid import Grid, Volume
from jaxreg.weights import download

ACROSS = Options(fixed_modality="ct", moving_modality="mri")


@pytest.fixture
def cache(tmp_path):
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("there", "options", "model"),
    [
        ((), Options(), None),
        (("unigradicon.trch",), Options(), "unigradicon"),
        (("unigradicon/",), Options(), "unigradicon"),
        (("multigradicon.trch",), Options(), "multigradicon"),
        (("multigradicon/", "unigradicon/"), Options(), "unigradicon"),
        (("multigradicon/", "unigradicon/"), ACROSS, "multigradicon"),
        (("unigradicon/",), ACROSS, None),  # which knows one modality alone
        (("other.trch",), Options(), None),
    ],
)
def test_the_weights_that_are_there_and_know_the_scans(cache, there, options, model):
    for name in there:
        place = cache / name.rstrip("/")
        place.mkdir() if name.endswith("/") else place.touch()
    found = automatic.choose(options, folder=cache)
    assert found.model == model
    assert str(cache) in found.why
    assert ("affine" in found.why) == (model is None)


def test_a_word_is_no_model():
    assert automatic.named("None", Options()) == (None, "")
    displaced = Options(io_target="displacement")
    assert automatic.named("AUTO", displaced) == (None, "")
    assert automatic.named("some/path", Options()) == ("some/path", "")


@pytest.mark.parametrize(
    "asked",
    [
        {"io_target": "network"},
        {"task": "brain"},
        {"smoothness": 0.5},
        {"level_iterations": 2},
        {"stored_orientation": True},
    ],
)
def test_what_needs_a_network_says_how_to_get_one(cache, asked):
    with pytest.raises(UserError, match="unigradicon") as raised:
        automatic.choose(Options(**asked), folder=cache)
    assert f"`{next(iter(asked))}`" in str(raised.value)


def test_options_are_settled_by_the_network_and_the_quality():
    def of(network, started=False, **given):
        one = settled(Options(**given), network=network, started=started)
        return one.prealign, one.io_target, one.io_iterations

    steps = {name: effort.steps for name, effort in EFFORTS.items()}
    assert of(True) == ("none", "network", 50)
    assert of(False) == ("affine", "displacement", steps["default"])
    assert of(False, started=True)[0] == "none"
    assert of(False, prealign="rigid")[0] == "rigid"
    assert of(False, io_iterations=None) == ("affine", "network", None)
    displaced = {"io_target": "displacement"}
    assert of(False, **displaced) == ("none", "displacement", steps["default"])
    assert of(True, quality="fast") == ("none", "network", None)
    assert of(True, quality="fast", dice_loss_weight=1.0)[2] == 50
    assert of(True, quality="best", io_iterations=7)[2] == 7
    assert of(False, quality="fast")[2] == steps["fast"]
    assert steps["fast"] < steps["default"] < steps["best"]
    once = settled(Options(), network=False)
    assert settled(once, network=False) == once


@pytest.mark.parametrize("steps", ["fifty", 0, 2.5])
def test_steps_of_another_kind_are_refused(steps):
    with pytest.raises(UserError, match="io_iterations"):
        options_lib.check_options(Options(io_iterations=steps))


@pytest.mark.parametrize(
    ("shape", "spacing", "limit", "expected"),
    [
        ((35, 50, 36), (1.0, 1.0, 1.0), 80**3, (48, 64, 48)),
        ((30, 20, 9), (1.0, 1.0, 1.0), 80**3, (32, 24, 16)),
        ((160, 160, 160), (1.0, 1.0, 1.0), 80**3, (80, 80, 80)),
        ((1, 64, 64), (1.0, 1.0, 1.0), 80**3, (1, 64, 64)),
        ((5, 200, 200), (8.0, 1.0, 1.0), 5 * 80**2, (5, 80, 80)),
        ((40, 320, 320), (4.0, 0.5, 0.5), 50**3, (48, 48, 48)),
    ],
)
def test_grid_without_weights(shape, spacing, limit, expected):
    grid = Grid(shape, np.diag([*spacing, 1.0]))
    assert network_grid.shape_within(grid, limit) == expected


@pytest.mark.parametrize(
    ("shape", "least", "expected"),
    [
        ((35, 50, 36), 48**3, (48, 64, 48)),  # by 1.2
        ((17, 25, 18), 17 * 25 * 18, (24, 32, 24)),  # fine enough
        ((16, 20, 24), 48**3, (24, 32, 32)),  # by no more than 1.5
        ((1, 40, 40), 48**3, (1, 64, 64)),
    ],
)
def test_a_small_scan_has_a_finer_grid(shape, least, expected):
    grid = Grid(shape, np.diag([1.0, 1.0, 1.0, 1.0]))
    assert network_grid.shape_within(grid, 80**3, least) == expected


@pytest.mark.parametrize("seed", range(5))
def test_a_coarser_grid_is_as_cubic_as_the_scan_allows(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(30, 400, 3))
    spacing = rng.uniform(0.3, 5.0, 3)
    grid = Grid(shape, np.diag([*spacing, 1.0]))
    found = np.array(network_grid.shape_within(grid, 64**3))
    assert (found % 8 == 0).all()
    assert (found < np.array(shape) + 16).all()
    # Rounded up by less than 16 voxels along an axis, and by 8 where there is a choice.
    assert np.prod(np.maximum(found - 16, 1)) <= 64**3
    edge = np.array(shape) * spacing / found
    finest = edge.max()
    kept = found >= np.array(shape)
    assert (edge[~kept] >= 0.6 * finest).all()


def test_a_modality_is_guessed_by_the_values():
    rng = np.random.default_rng(0)

    def of(low, high):
        array = rng.uniform(low, high, (8, 8, 8))
        return modality.guessed(Volume(array, Grid((8, 8, 8), np.eye(4))))

    assert of(-1024, 1500) == "ct"
    assert of(-150, 400) == "ct"
    assert of(0, 1000) == "mri"
    assert of(-3, 3) == "mri"
    empty = Volume(np.full((2, 2, 2), np.nan), Grid((2, 2, 2), np.eye(4)))
    assert modality.guessed(empty) == "mri"


def test_modalities_that_are_not_given_are_those_of_the_values():
    """In Python as on the command line; what is named is believed."""
    grid = Grid((8, 8, 8), np.eye(4))
    rng = np.random.default_rng(0)
    ct, mri = (
        Volume(rng.uniform(low, high, grid.shape).astype(np.float32), grid)
        for low, high in ((-1000, 1500), (0, 1000))
    )

    def prepared(fixed, moving, **given):
        options = Options(**{"prealign": "centre", "io_iterations": None, **given})
        return pair.prepare(moving, fixed, None, options, None, None, None)

    def of(fixed, moving, **given):
        found = prepared(fixed, moving, **given).options
        return found.fixed_modality, found.moving_modality

    assert of(ct, mri) == ("ct", "mri")
    assert of(mri, ct, moving_modality="t1") == ("mri", "t1")
    assert prepared(mri, ct).given.modality == "ct"
    rules = preparation.intensity_rules(prepared(ct, mri).options)
    assert [rule.modality for rule in rules] == ["mri", "ct"]  # moving, fixed
    # A range that is none is said before.
    with pytest.raises(UserError, match="the smaller first"):
        options_lib.check_options(Options(ct_window=(100.0, 0.0)))
    # What fits no modality is said once the scans have been read.
    of(ct, mri, ct_window=(0.0, 100.0))
    with pytest.raises(UserError, match="neither modality is ct"):
        of(mri, mri, ct_window=(0.0, 100.0))
    with pytest.raises(UserError, match="two CT scans"):
        prepared(ct, mri, intensity_conservation_loss=True, io_iterations=1)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """A body with three organs, and the same 3 mm further."""
    folder = tmp_path_factory.mktemp("scans")
    grid = Grid((16, 18, 20), np.diag([2.0, 2.0, 2.0, 1.0]))
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1) * 2.0

    def seen(shift):
        centres = np.array([[14, 18, 20], [20, 12, 16], [10, 24, 26.0]])
        parts = [
            value * np.exp(-(((index - c - shift) ** 2).sum(-1)) / 60)
            for value, c in zip((300, 600, 900), centres, strict=True)
        ]
        return Volume((sum(parts) + 1).astype(np.float32), grid)

    paths = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    for path, shift in zip(paths, (0.0, np.array([0, 0, 3.0])), strict=True):
        volumes.write_volume(path, seen(shift))
    return paths


@pytest.fixture
def offline(monkeypatch, cache):
    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv(download.CACHE_VARIABLE, str(cache))


def _shift_mm(transform):
    points = np.float32([[[18.0, 16.0, 14.0], [22.0, 18.0, 16.0]]])
    return (np.asarray(transform.map_points(points)) - points)[0].mean(0)


def test_two_scans_and_nothing_else(scans, offline, tmp_path, capsys):
    """The shortest command line, offline: the transform, and what was chosen."""
    out = tmp_path / "t.h5"
    argv = ["register", "--fixed", str(scans[0]), "--moving", str(scans[1])]
    argv += ["--transform-out", str(out), "--quality", "fast"]
    assert main.main(argv) == 0
    said = capsys.readouterr().out
    assert "chosen: no network" in said
    assert "--fixed-modality is not given: by its values mri" in said
    moved = _shift_mm(transforms.read_transform(out))
    np.testing.assert_allclose(moved, [0, 0, 3.0], atol=0.5)  # a quarter of a voxel
    found = jaxreg.register(scans[1], scans[0], options=Options(quality="fast"))
    np.testing.assert_allclose(_shift_mm(found.transform), moved, atol=1e-3)
    assert found.chosen.startswith("no network")
    assert found.fixed_grid.shape == (24, 24, 16)  # towards superior first
    assert "chosen" in jaxreg.summary(found)
    named = dataclasses.replace(found, chosen="")
    assert "chosen" not in jaxreg.summary(named)


def test_a_network_that_is_asked_for_is_not_there(scans, offline, tmp_path, capsys):
    argv = ["register", "--fixed", str(scans[0]), "--moving", str(scans[1])]
    argv += ["--transform-out", str(tmp_path / "t.h5"), "--task", "brain"]
    assert main.main(argv) == 2
    captured = capsys.readouterr()
    assert "--task is for a network" in captured.err
    assert captured.out == ""
    assert list(tmp_path.glob("*.h5")) == []
