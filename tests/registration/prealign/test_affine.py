"""The affine search: known maps of a phantom, and SimpleITK on the same pair."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from jaxreg.registration.prealign import affine, measure, places
from jaxreg.registration.prealign.measure import Shown
from jaxreg.space.grid import Grid

SLOW = pytest.mark.slow


@pytest.fixture(autouse=True)
def few_points(request, monkeypatch):
    """Programs of tests are not optimised: slow tests alone have as many points."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(measure, "FEWEST", 2**9)
        monkeypatch.setattr(measure, "FEW", 2**10)
        monkeypatch.setattr(measure, "MANY", 2**12)
        monkeypatch.setattr(measure, "_LOCAL", 24)
        monkeypatch.setattr(measure, "LOCAL_DESCENT", 24)


_RNG = np.random.default_rng(1)
BLOBS_MM = _RNG.uniform(-15, 15, (60, 3))
SIZES_MM = _RNG.uniform(2.5, 6, 60)
HEIGHTS = _RNG.uniform(30, 120, 60) * _RNG.choice([1, 1, -0.6], 60)


def head(places_mm):
    """A ball of 48 mm full of blobs, in air; no symmetry."""
    value = 200.0
    for middle, size, height in zip(BLOBS_MM, SIZES_MM, HEIGHTS, strict=True):
        squares = ((places_mm - middle) ** 2).sum(-1)
        value = value + height * np.exp(-squares / (2 * size**2))
    edge = np.linalg.norm(places_mm, axis=-1) - 24
    return value / (1 + np.exp(edge.clip(-50, 50)))


def apply(matrix, places):
    return places @ matrix[:3, :3].T + matrix[:3, 3]


def grid(shape, spacing_mm, middle_mm=(0.0, 0.0, 0.0), turn=None):
    matrix = np.eye(4)
    directions = np.eye(3)[:, ::-1] if turn is None else turn
    matrix[:3, :3] = directions * np.asarray(spacing_mm)
    matrix[:3, 3] = middle_mm - matrix[:3, :3] @ ((np.array(shape) - 1) / 2)
    return Grid(shape, matrix)


def scan(over, function=head, mask=None):
    voxels = np.stack(np.meshgrid(*map(np.arange, over.shape), indexing="ij"), -1)
    array = function(apply(over.affine_mm, voxels)).astype(np.float32)
    return Shown(affine.scaled(array), over, mask)


def turned(degrees, axis, shift_mm=(0.0, 0.0, 0.0)):
    i, j = [a for a in range(3) if a != axis]
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    matrix = np.eye(4)
    matrix[[i, i, j, j], [i, j, i, j]] = c, -s, s, c
    matrix[:3, 3] = shift_mm
    return matrix


PLACES = _RNG.uniform(-13, 13, (50, 3))


def error_mm(found, truth):
    wrong = apply(found, PLACES) - apply(truth, PLACES)
    return np.linalg.norm(wrong, axis=-1).mean()


def pair(fixed, moving, truth, contrast=lambda values: values):
    """Scans, so that moving[truth(x)] is fixed[x]."""
    back = np.linalg.inv(truth)
    return (
        scan(fixed),
        scan(moving, lambda places: contrast(head(apply(back, places)))),
    )


def starts(truth_mm=(0.0, 0.0, 0.0)):
    shifted = np.eye(4)
    shifted[:3, 3] = truth_mm
    return {"headers": np.eye(4), "shifted": shifted}


THICK = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]
SMALL, WIDE = grid((40,) * 3, (1.5,) * 3), grid((60,) * 3, (4.0,) * 3)


@pytest.mark.parametrize(
    ("fixed", "moving", "truth", "within"),
    [
        # A quarter of a voxel of the coarser scan along its coarsest axis, or less.
        pytest.param(SMALL, WIDE, np.eye(4), 0.75, id="small in wide"),
        pytest.param(WIDE, SMALL, np.eye(4), 0.75, id="wide onto small", marks=SLOW),
        pytest.param(
            grid((36,) * 3, (1.0,) * 3, (6, 6, 6)),
            grid((90,) * 3, (3.0,) * 3),
            turned(6, 2, (3, -2, 2)),
            0.75,
            id="crop",
            marks=SLOW,
        ),
        pytest.param(
            grid((12, 80, 80), (5.0, 0.75, 0.75), turn=THICK),
            grid((44,) * 3, (1.4,) * 3),
            turned(8, 0, (4, -3, 2)),
            1.25,
            id="thick slices",
            marks=SLOW,
        ),
        pytest.param(
            SMALL,
            grid((44, 40, 42), (1.4, 1.5, 1.6)),
            turned(10, 1, (5, 4, -6)) @ np.diag([1.1, 0.92, 1.05, 1.0]),
            0.5,
            id="strained",
            marks=SLOW,
        ),
    ],
)
def test_known_maps_are_found(fixed, moving, truth, within):
    found = affine.search(*pair(fixed, moving, truth), starts())
    assert error_mm(found.matrix, truth) < within
    assert affine.plausible(found.matrix)


ALL = ("rigid", "similarity", "affine")
OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = Rotation.from_rotvec(
    np.deg2rad(90) * np.array([0.6, -0.64, 0.48])
).as_matrix()


@pytest.mark.parametrize(
    ("truth", "kind"),
    [
        pytest.param(OBLIQUE, "rigid", id="90 degrees"),
        pytest.param(turned(60, 0, (300, -200, 170)), "rigid", id="far", marks=SLOW),
        pytest.param(
            turned(30, 2) @ np.diag([1.1, 1.1, 1.1, 1]), "similarity", marks=SLOW
        ),
    ],
)
def test_turns_are_found(truth, kind):
    """Headers overlap and say something else."""
    middle = apply(truth, np.zeros(3))
    scans = pair(SMALL, grid((44, 40, 42), (1.4, 1.5, 1.6), middle), truth)
    found = affine.search(*scans, starts(middle), kind)
    assert found.certain
    assert error_mm(found.matrix, truth) < 0.75
    assert affine.is_of(found.matrix, kind)
    assert found.end is not None
    assert found.end.globally < found.fits["headers"].globally
    assert found.end.locally < found.fits["headers"].locally


@SLOW
def test_half_of_each_is_found():
    """Both show a third of the whole in common."""
    truth = turned(8, 1, (3, -2, 4))
    lower = grid((26, 44, 44), (1.4,) * 3, (0, 0, -8))
    upper = grid((26, 44, 44), (1.4,) * 3, apply(truth, np.array([0, 0, 8.0])))
    found = affine.search(*pair(lower, upper, truth), starts(), "rigid")
    assert error_mm(found.matrix, truth) < 0.75


@pytest.mark.parametrize(
    ("matrix", "kinds"),
    [
        (turned(40, 1, (9, 9, 9)), ALL),
        (turned(40, 1) @ np.diag([1.2, 1.2, 1.2, 1]), ALL[1:]),
        (np.diag([1.0, 1.0, 1.01, 1.0]), ALL[2:]),
    ],
)
def test_kinds_of_maps(matrix, kinds):
    assert tuple(kind for kind in ALL if affine.is_of(matrix, kind)) == kinds


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"headers": 0.9, "turn": 0.8}, ("turn", (), True)),
        ({"headers": 0.9, "turn": 0.8, "beside": 0.9}, ("headers", (), True)),
        ({"headers": 0.82, "turn": 0.81}, ("headers", (), True)),
        ({"headers": 0.96, "turn": 0.9}, ("headers", (), True)),
        ({"headers": 0.9, "turn": 0.8, "other turn": 0.81}, ("headers", (), True)),
        ({"headers": 0.9, "far": 0.9}, ("headers", ("far",), False)),
    ],
    ids=[
        "much better",
        "one alone",
        "a little better",
        "telling little",
        "a rival",
        "rivals",
    ],
)
def test_a_turn_has_to_fit_well_and_better(scores, expected):
    """Headers are agreed on by a place beside them, the turn by another start."""
    maps = {"headers": np.eye(4), "far": turned(0, 0, (40, 0, 0)),
            "turn": turned(90, 0), "other turn": turned(180, 0)}  # fmt: skip
    begun = maps | {"beside": turned(0, 0, (0, 20, 0)), "again": turned(70, 0)}
    ends = maps | {"beside": np.eye(4), "again": turned(91, 0)}
    if "beside" in scores:  # the second start leads back to the headers
        ends["again"] = np.eye(4)
    names = [name for name in maps if name in scores]
    ended = affine._Ended(
        measure.Level.of(scan(SMALL), scan(SMALL), 16),
        begun,
        ends,
        {"turn", "other turn", "again"},
        {name: maps[name] for name in names},
        {name: scores[name] for name in names},
    )
    assert ended.chosen() == expected


def test_rotations_lie_everywhere():
    """None is farther from one of them than a descent reaches."""
    matrices = np.stack(places.rotations(240))
    np.testing.assert_allclose(
        matrices @ matrices.swapaxes(1, 2), np.broadcast_to(np.eye(3), matrices.shape),
        atol=1e-12,
    )  # fmt: skip
    np.testing.assert_allclose(np.linalg.det(matrices), 1, atol=1e-12)
    wanted = Rotation.from_quat(np.random.default_rng(0).normal(size=(300, 4)))
    back = Rotation.from_matrix(matrices).inv()
    away = [(rotation * back).magnitude().min() for rotation in wanted]
    assert np.rad2deg(max(away)) < 40


def test_moments_are_those_of_a_long_blob():
    turn = Rotation.from_rotvec([0.3, -0.5, 0.8]).as_matrix()
    spread = turn @ np.diag([4.0, 16, 49]) @ turn.T
    back = np.linalg.inv(spread)

    def blob(at):
        away = at - (4, 2, -3)
        return np.exp(-np.einsum("...i,ij,...j", away, back, away) / 2)

    middle, axes = places.moments(scan(grid((60, 64, 56), (1.0, 1.0, 1.0)), blob))
    np.testing.assert_allclose(middle, (4, 2, -3), atol=0.3)
    np.testing.assert_allclose(np.abs(np.sum(axes * turn, 0)), 1, atol=0.01)


@SLOW
def test_another_contrast_and_a_start_out_of_reach():
    """No function of one sign leads from one contrast to the other."""
    truth = turned(5, 2, (61, -40, 7))
    scans = pair(SMALL, grid((40,) * 3, (1.6,) * 3, (60, -40, 6)), truth,
                 lambda v: np.abs(v - 210) + 20 * (v > 20))  # fmt: skip
    found = affine.search(*scans, starts((60, -40, 6)))
    assert found.start != "headers" and found.certain
    assert error_mm(found.matrix, truth) < 0.4


@SLOW
def test_where_simpleitk_ends():
    """Mattes' measure too ends within a fifth of a voxel of 1.6 mm of the truth.

    Both read between voxels by lines, which blurs more in the middle of a voxel than
    at its ends: the likeness itself is best a fraction of a voxel beside the truth.
    """
    sitk = pytest.importorskip("SimpleITK")
    truth = turned(7, 2, (3, -2, 4))
    fixed, moving = pair(SMALL, grid((40,) * 3, (1.6,) * 3), truth)

    def image(shown):
        result = sitk.GetImageFromArray(shown.array)
        matrix = shown.grid.affine_mm[:, [2, 1, 0, 3]]
        result.SetOrigin(matrix[:3, 3])
        result.SetSpacing(np.diag(matrix)[:3])
        return result

    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-4, 200)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([2, 1])
    method.SetSmoothingSigmasPerLevel([1, 0])
    method.SetInterpolator(sitk.sitkLinear)
    method.SetInitialTransform(sitk.AffineTransform(3))
    transform = method.Execute(image(fixed), image(moving))
    theirs = np.array([transform.TransformPoint(p) for p in PLACES])
    wrong = np.linalg.norm(theirs - apply(truth, PLACES), axis=-1).mean()
    found = affine.search(fixed, moving, starts())
    assert wrong < 0.3
    assert error_mm(found.matrix, truth) < 0.3


@SLOW
def test_a_mask_says_where_to_look():
    """Something else moves beside what the mask holds."""
    truth = turned(0, 2, (0, 0, 4))
    fixed = scan(SMALL)
    still = np.array([0.0, 0.0, 0.0])

    def spoilt(places):
        upper = places[..., 2:] > 2
        return np.where(upper[..., 0], head(places + still), head(places - (0, 0, 4)))

    moving = scan(SMALL, spoilt)
    mask = np.zeros(SMALL.shape, bool)
    mask[:17] = True  # D is z: the lower half
    shown = Shown(fixed.array, SMALL, mask)
    found = affine.search(shown, moving, starts())
    places = PLACES[PLACES[:, 2] < -5]
    wrong = np.linalg.norm(apply(found.matrix, places) - apply(truth, places), axis=-1)
    assert wrong.mean() < 0.75


def test_images_that_tell_nothing_leave_the_headers():
    """Noise: a search ends anywhere, and from every start elsewhere."""
    rng = np.random.default_rng(4)
    over = grid((24,) * 3, (2.0,) * 3)
    fixed, moving = (
        Shown(rng.uniform(size=over.shape).astype(np.float32), over) for _ in "ab"
    )
    found = affine.search(fixed, moving, starts((20, 20, 20)))
    assert not found.certain
    np.testing.assert_array_equal(found.matrix, np.eye(4))
    assert found.start == "headers"


@pytest.mark.parametrize(
    ("contrast", "sure"),
    [(lambda values: values, True), (lambda values: np.abs(values - 200), False)],
    ids=["one", "another"],
)
def test_what_grey_levels_leave_in_doubt_structure_decides(contrast, sure, monkeypatch):
    """Small crops, where mutual information is little at the right place, too."""
    truth = turned(0, 0, (5, 4, -3))
    judged = affine._Ended.chosen
    monkeypatch.setattr(
        affine._Ended, "chosen", lambda self: (judged(self)[0], (), False)
    )
    found = affine.search(*pair(SMALL, SMALL, truth, contrast), starts())
    assert found.certain == sure
    assert (error_mm(found.matrix, truth) < 0.75) == sure  # half a voxel
    if not sure:
        np.testing.assert_array_equal(found.matrix, np.eye(4))


def test_apart_is_as_unlike_as_can_be():
    fixed = scan(SMALL)
    far = turned(0, 0, (500, 0, 0))
    level = affine.judged(fixed, fixed)
    fits = affine.compare(level, {"far": far, "here": np.eye(4)})
    assert fits["far"] == (1, 1)
    assert max(fits["here"]) < 0.7
    assert affine.best_of(fits) == "here"


def test_functions_are_compared_as_matrices_are():
    """Beside a function, both measures come from the fixed scan's points alone."""
    fixed, truth = scan(SMALL), turned(4, 1, (2, 1, 0))
    maps = {"matrix": truth, "function": lambda places: apply(truth, places)}
    level = affine.judged(fixed, fixed)
    fits = affine.compare(level, maps)
    np.testing.assert_allclose(fits["matrix"], fits["function"], atol=1e-5)
    both = affine.compare(level, {"matrix": truth})
    # As large a scan, so the local measure is the same one.
    assert fits["matrix"].locally == pytest.approx(both["matrix"].locally, abs=1e-5)
    assert fits["matrix"].globally == pytest.approx(both["matrix"].globally, abs=0.02)


@pytest.mark.parametrize(
    ("tells", "away", "believed"), [(0.1, 40, False), (0.2, 40, True), (0.05, 0, True)]
)
def test_a_place_that_headers_do_not_lead_to_has_to_tell_much(tells, away, believed):
    """Two starts agree on it; what they tell decides where the first does not."""
    level = measure.Level.of(scan(SMALL), scan(SMALL), 16)
    far, beside = turned(0, 0, (away, 0, 0)), turned(0, 0, (20, 20, 0))
    ended = affine._Ended(
        level,
        begun={"headers": np.eye(4), "centres": beside, "a shift": far},
        ends={"headers": np.eye(4), "centres": far, "a shift": far},
        turns=(),
        maps={"centres": far},
        scores={"centres": 1 - tells},
    )
    assert ended.chosen() == ("centres", (), believed)


@SLOW
def test_a_perfect_start_stays_one():
    found = affine.search(scan(SMALL), scan(SMALL), starts((15, 0, 0)))
    assert found.start == "headers"
    assert error_mm(found.matrix, np.eye(4)) < 0.15


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        (turned(40, 1, (9, 9, 9)), True),
        (np.diag([1.9, 0.6, 1.0, 1.0]), True),
        (np.diag([-1.0, 1.0, 1.0, 1.0]), False),
        (np.diag([2.1, 1.0, 1.0, 1.0]), False),
        (np.diag([0.4, 1.0, 1.0, 1.0]), False),
        (np.diag([0.0, 1.0, 1.0, 1.0]), False),
        (np.full((4, 4), np.nan), False),
    ],
)
def test_maps_that_are_plausible(matrix, expected):
    assert affine.plausible(matrix) == expected


def test_a_mirror_image_is_seen_where_it_fits_as_well():
    """The phantom is asymmetric; folded about its middle it is symmetric."""
    flip = np.array([-1.0, 1.0, 1.0])
    fixed = scan(SMALL)
    assert not affine.mirrored_fits(fixed, fixed, np.eye(4))
    swapped = scan(SMALL, lambda places: head(places * flip))
    assert affine.mirrored_fits(fixed, swapped, np.eye(4))
    same = scan(SMALL, lambda places: head(places) + head(places * flip))
    assert affine.mirrored_fits(same, same, np.eye(4))


def test_grey_levels_remain_of_a_small_head():
    """0.4 % of the voxels, in an otherwise empty scan."""
    array = np.zeros((50, 50, 50))
    array[20:28, 20:28, 20:28] = np.linspace(100, 1000, 512).reshape(8, 8, 8)
    shown = affine.scaled(array)[20:28, 20:28, 20:28]
    assert len(np.unique(shown)) > 500


def test_both_measures_have_to_agree():
    fits = {
        "headers": measure.Fit(0.9, 0.8),
        "grey levels alone": measure.Fit(0.5, 0.85),
        "both": measure.Fit(0.85, 0.7),
        "structure alone": measure.Fit(0.95, 0.6),
    }
    assert affine.best_of(fits) == "both"
    del fits["both"]
    assert affine.best_of(fits) == "headers"


def test_agreement_tells_one_contrast_from_another(monkeypatch):
    monkeypatch.setattr(measure, "_LOCAL", 48)  # blobs are small
    fixed, moving = pair(SMALL, WIDE, np.eye(4))
    assert affine.judged(fixed, moving).agreement(np.eye(4)) > 0.98
    assert affine.judged(moving, fixed).agreement(np.eye(4)) > 0.98

    def opposed(values):
        return np.where(values > 100, 700 - values, values)

    fixed, moving = pair(SMALL, WIDE, np.eye(4), opposed)
    assert affine.judged(fixed, moving).agreement(np.eye(4)) < 0.75
    against = Shown(1 - fixed.array, fixed.grid)
    assert affine.judged(fixed, against).agreement(np.eye(4)) < -0.98


def test_rivals_fit_nearly_as_well_elsewhere():
    far, near = np.eye(4), np.eye(4)
    far[0, 3], near[0, 3] = 20.0, 1.0  # of a half diagonal of about 52 mm
    maps = {"best": np.eye(4), "far": far, "near": near, "worse": far}
    good, bad = measure.Fit(0.9, 0.5), measure.Fit(0.92, 0.5)
    fits = {"best": good, "far": good, "near": good, "worse": bad}
    assert affine.rivals(SMALL, maps, fits, "best") == ("far",)


def test_two_maps_are_as_far_apart_as_their_farthest_corner():
    shifted, larger = np.eye(4), np.diag([1.1, 1.1, 1.1, 1.0])
    half = 19.5 * 1.5 * np.sqrt(3)
    shifted[1, 3] = 3.0
    assert affine.apart(SMALL, np.eye(4), shifted) == pytest.approx(3 / half)
    assert affine.apart(SMALL, np.eye(4), larger) == pytest.approx(0.1)
