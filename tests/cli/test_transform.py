"""``jaxreg transform``: against SimpleITK, and against what each tool says it does."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from scipy import ndimage

from jaxreg.cli import main
from jaxreg.io import transforms, volumes
from jaxreg.space import sampling
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume

LPS = np.array([-1.0, -1.0, 1.0])
TURN = np.array([[0.96, -0.28, 0], [0.28, 0.96, 0], [0, 0, 1.0]])
LEFT_HANDED = TURN @ np.diag([-1.5, 1.25, 2.0])  # "radiological"
RIGHT_HANDED = TURN.T @ np.diag([-1.0, -1.2, 0.9])


def grid_of(shape_xyz, columns, origin) -> Grid:
    """A grid by what NIfTI says of it: x, y, z order, RAS+."""
    affine = np.eye(4)
    affine[:3, :3] = np.asarray(columns, float)
    affine[:3, 3] = origin
    return Grid(tuple(shape_xyz[::-1]), affine[:, [2, 1, 0, 3]])


FIXED = grid_of((14, 12, 10), LEFT_HANDED, (12, -7, -9))
MOVING = grid_of((15, 16, 18), RIGHT_HANDED, (7, 10, -8))


def affine_file(path, seed: int):
    rng = np.random.default_rng(seed)
    made = sitk.AffineTransform(3)
    made.SetMatrix((np.eye(3) + 0.1 * rng.standard_normal((3, 3))).ravel().tolist())
    made.SetTranslation((2 * rng.standard_normal(3)).tolist())
    made.SetCenter((1.0, 2.0, 3.0))
    sitk.WriteTransform(made, str(path))
    return made


def field_file(path, seed: int):
    """A smooth field that vanishes at its edge, on a grid around the scans."""
    shape = (14, 15, 16)
    rng = np.random.default_rng(seed)
    place = np.stack(np.meshgrid(*(np.linspace(0, np.pi, n) for n in shape),
                                 indexing="ij"))  # fmt: skip
    bump = np.prod(np.sin(place), 0)[..., None] ** 2
    image = sitk.GetImageFromArray(bump * (4 * rng.standard_normal(3)), isVector=True)
    image.SetSpacing((3.0, 3.0, 3.0))
    image.SetOrigin((-24.0, -22.0, -20.0))
    made = sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64))
    sitk.WriteTransform(made, str(path))
    return made


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transforms")
    made = {
        "a.tfm": affine_file(folder / "a.tfm", 0),
        "b.tfm": affine_file(folder / "b.tfm", 1),
        "bend.h5": field_file(folder / "bend.h5", 2),
    }
    for name, grid in (("fixed", FIXED), ("moving", MOVING)):
        array = np.random.default_rng(3).random(grid.shape).astype(np.float32)
        volumes.write_volume(folder / f"{name}.nii.gz", Volume(array, grid))
    return folder, made


def points() -> np.ndarray:
    """Points of the scans, LPS mm."""
    return np.random.default_rng(4).uniform(-7, 7, (20, 3))


def mapped(transform: sitk.Transform, places: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(p.tolist()) for p in places])


def run(*words) -> int:
    return main.main(["transform", *map(str, words)])


def test_compose_applies_the_first_listed_first(files, tmp_path, capsys):
    """As `TransformPoint` of one file after the other, and of the file that is made."""
    folder, made = files
    out = tmp_path / "out.h5"
    a, bend, b = (folder / name for name in ("a.tfm", "bend.h5", "b.tfm"))
    assert run("compose", a, bend, "--inverse", b, "--out", out) == 0
    expected = mapped(made["a.tfm"], points())
    expected = mapped(made["bend.h5"], expected)
    expected = mapped(made["b.tfm"].GetInverse(), expected)
    np.testing.assert_allclose(
        mapped(sitk.ReadTransform(str(out)), points()), expected, atol=1e-5
    )
    said = capsys.readouterr().out
    assert f"{a}, then {bend}, then the inverse of {b}" in said
    # CompositeTransform lists what acts last first.
    listed = [made["b.tfm"].GetInverse(), made["bend.h5"], made["a.tfm"]]
    np.testing.assert_allclose(
        mapped(sitk.CompositeTransform(listed), points()), expected, atol=1e-9
    )


def test_compose_to_a_field_on_the_fixed_grid(files, tmp_path):
    folder, made = files
    out = tmp_path / "out.nii.gz"
    assert run("compose", folder / "a.tfm", folder / "b.tfm", "--fixed",
               folder / "fixed.nii.gz", "--out", out) == 0  # fmt: skip
    image = sitk.ReadImage(str(folder / "fixed.nii.gz"))
    field = sitk.GetArrayFromImage(sitk.ReadImage(str(out)))
    for index in [(0, 0, 0), (13, 11, 9), (4, 7, 2)]:
        place = np.array([image.TransformIndexToPhysicalPoint(index)])
        expected = mapped(made["b.tfm"], mapped(made["a.tfm"], place)) - place
        np.testing.assert_allclose(field[index[::-1]], expected[0], atol=1e-5)


def test_invert_undoes_what_simpleitk_does(files, tmp_path, capsys):
    folder, made = files
    assert run("compose", folder / "a.tfm", folder / "bend.h5", "--out",
               tmp_path / "there.h5") == 0  # fmt: skip
    assert run("invert", tmp_path / "there.h5", "--out", tmp_path / "back.h5") == 0
    assert "inverse residual" in capsys.readouterr().out
    there, back = (
        sitk.ReadTransform(str(tmp_path / name)) for name in ("there.h5", "back.h5")
    )
    # At the voxels of the field, between which an inverse is read linearly.
    index = np.random.default_rng(6).integers(1, [15, 14, 13], (40, 3))
    voxels = [-24.0, -22.0, -20.0] + 3.0 * index
    np.testing.assert_allclose(mapped(there, mapped(back, voxels)), voxels, atol=1e-4)
    moved = np.linalg.norm(mapped(made["bend.h5"], voxels) - voxels, axis=-1)
    assert moved.max() > 1.0


def test_the_inverse_of_a_shift_reaches_beyond_the_field(tmp_path):
    """A field that is 6 mm everywhere: the inverse covers what it leads to, exactly."""
    grid = Grid((6, 7, 8), np.diag([2.0, 2.0, 2.0, 1.0])[[2, 1, 0, 3]])
    shift = np.zeros((1, 6, 7, 8, 3), np.float32)
    shift[..., 2] = 6.0 / (2.0 * 7)  # the last axis is x, and unit 14 mm long
    unit = transform_lib.Transform((transform_lib.Displacement(shift),))
    path, back = tmp_path / "shift.h5", tmp_path / "back.h5"
    transforms.write_transform(path, transform_lib.in_world(unit, grid, grid))
    assert run("invert", path, "--out", back) == 0
    ends = np.array([[[6.5, 5.0, 4.0], [19.5, 0.0, 0.0]]])  # the last is beyond it
    found = np.asarray(transforms.read_transform(back).map_points(ends))
    np.testing.assert_allclose(found, ends - [6.0, 0, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["a.tfm", "b.tfm"])
def test_invert_of_a_matrix_is_exact_and_fits_a_mat(name, files, tmp_path):
    folder, made = files
    assert run("invert", folder / name, "--out", tmp_path / "back.mat") == 0
    back = sitk.ReadTransform(str(tmp_path / "back.mat"))
    expected = mapped(made[name].GetInverse(), points())
    np.testing.assert_allclose(mapped(back, points()), expected, atol=1e-9)


def test_info_of_a_rotation(tmp_path, capsys):
    turn = sitk.Euler3DTransform((0, 0, 0), 0.0, 0.0, np.radians(30.0), (1, 2, 3))
    sitk.WriteTransform(turn, str(tmp_path / "turn.tfm"))
    assert run("info", tmp_path / "turn.tfm") == 0
    said = capsys.readouterr().out
    assert "30.000 degrees" in said
    assert "volume    1.0000" in said
    assert said.splitlines()[1].split()[-1] == "-1.000000"  # x, LPS 1: RAS -1


def test_info_of_a_field(files, capsys):
    folder, made = files
    assert run("info", folder / "bend.h5") == 0
    said = capsys.readouterr().out
    field = sitk.GetArrayFromImage(made["bend.h5"].GetDisplacementField())
    longest = np.linalg.norm(field, axis=-1).max()
    assert "16 x 15 x 14 voxels of 3 x 3 x 3 mm" in said
    assert f"{longest:.4f} mm at most" in said
    assert "folded voxels  0.0000 %" in said


# --- other tools ----------------------------------------------------------------------


def fsl_mm(image, index: np.ndarray) -> np.ndarray:
    """FSL's mm of voxels P 3, by its rule: scaled, x from the other end if det > 0."""
    index = np.array(index, float)
    if np.linalg.det(image.affine) > 0:
        index[:, 0] = image.shape[0] - 1 - index[:, 0]
    return index * image.header.get_zooms()[:3]


def index_in_moving(made, fixed, moving, index: np.ndarray) -> np.ndarray:
    """Where voxels of the fixed scan lie in the moving one's array, by SimpleITK."""
    places = nib.affines.apply_affine(fixed.affine, index) * LPS
    places = mapped(made, places) * LPS
    return nib.affines.apply_affine(np.linalg.inv(moving.affine), places)


@pytest.mark.parametrize("turned", [False, True])
def test_matrix_and_warp_of_fsl(turned, files, tmp_path):
    """FLIRT takes FSL mm of the moving image to the fixed one's; a warp is added."""
    folder, made = files
    roles = ("moving", "fixed") if turned else ("fixed", "moving")
    paths = [folder / f"{role}.nii.gz" for role in roles]
    fixed, moving = map(nib.load, paths)
    index = np.stack(np.unravel_index(np.arange(0, 1000, 97), fixed.shape), -1)
    for name, suffix in (("a.tfm", "mat"), ("a.tfm", "nii.gz"), ("bend.h5", "nii.gz")):
        out = tmp_path / f"out.{suffix}"
        assert run("export", folder / name, "--for", "fsl", "--fixed", paths[0],
                   "--moving", paths[1], "--out", out) == 0  # fmt: skip
        there = fsl_mm(moving, index_in_moving(made[name], fixed, moving, index))
        here = fsl_mm(fixed, index)
        if suffix == "mat":
            back = nib.affines.apply_affine(np.loadtxt(out), there)
            np.testing.assert_allclose(back, here, atol=5e-6)  # headers: float32
            continue
        warp = nib.load(out)
        assert warp.shape == (*fixed.shape, 3)
        assert int(warp.header["intent_code"]) == 2006
        np.testing.assert_allclose(warp.affine, fixed.affine, atol=1e-6)
        added = warp.get_fdata()[tuple(index.T)]
        np.testing.assert_allclose(here + added, there, atol=2e-5)


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_coordinates_of_scipy_warp_as_simpleitk(suffix, files, tmp_path):
    folder, made = files
    paths = folder / "fixed.nii.gz", folder / "moving.nii.gz"
    out = tmp_path / f"out{suffix}"
    assert run("export", folder / "bend.h5", "--for", "scipy", "--fixed", paths[0],
               "--moving", paths[1], "--out", out) == 0  # fmt: skip
    found = np.load(out)
    fixed, moving = map(nib.load, paths)
    if suffix == ".npz":
        np.testing.assert_allclose(found["fixed_affine"], fixed.affine, atol=1e-6)
        np.testing.assert_allclose(found["moving_affine"], moving.affine, atol=1e-6)
        assert tuple(found["moving_shape"]) == moving.shape
        found = found["coordinates"]
    warped = ndimage.map_coordinates(
        moving.get_fdata(), found, order=1, cval=-1, mode="constant"
    )
    images = [sitk.ReadImage(str(path)) for path in paths]
    itk = sitk.Resample(images[1], images[0], made["bend.h5"], sitk.sitkLinear, -1.0)
    inside = (found >= 0).all(0) & (
        found <= np.asarray(moving.shape)[:, None, None, None] - 1
    ).all(0)
    assert inside.mean() > 0.2
    expected = sitk.GetArrayFromImage(itk).T
    np.testing.assert_allclose(warped[inside], expected[inside], atol=2e-5)


@pytest.mark.parametrize("name", ["out.mat", "out.h5", "out.nii.gz"])
def test_ants_files_are_read_by_itk(name, files, tmp_path):
    folder, made = files
    out = tmp_path / name
    assert run("export", folder / "a.tfm", "--for", "ants", "--fixed",
               folder / "fixed.nii.gz", "--out", out) == 0  # fmt: skip
    if name == "out.nii.gz":
        image = sitk.ReadImage(str(out), sitk.sitkVectorFloat64)
        read = sitk.DisplacementFieldTransform(image)
    else:
        read = sitk.ReadTransform(str(out))
    image = sitk.ReadImage(str(folder / "fixed.nii.gz"))
    index = np.random.default_rng(5).uniform(0, [13, 11, 9], (10, 3)).tolist()
    places = np.array([image.TransformContinuousIndexToPhysicalPoint(i) for i in index])
    np.testing.assert_allclose(
        mapped(read, places), mapped(made["a.tfm"], places), atol=2e-5
    )


SCANS = ("--fixed", "{folder}/fixed.nii.gz", "--moving", "{folder}/moving.nii.gz")
MISTAKES = {
    "no step": (("compose", "--out", "{out}.h5"), "STEPS"),
    "nothing after inverse": (
        ("compose", "{folder}/a.tfm", "--inverse", "--out", "{out}.h5"),
        "--inverse needs",
    ),
    "misspelt option": (
        ("compose", "{folder}/a.tfm", "--invers", "b.tfm", "--out", "{out}.h5"),
        "did you mean --inverse",
    ),
    "field in a matrix": (
        ("compose", "{folder}/bend.h5", "--out", "{out}.mat"),
        "cannot hold a displacement field; use .h5",
    ),
    "field without grid": (
        ("invert", "{folder}/a.tfm", "--out", "{out}.nii.gz"),
        "give --fixed",
    ),
    "over an input": (
        ("invert", "{folder}/a.tfm", "--out", "{folder}/a.tfm"),
        "is also an input",
    ),
    "field for flirt": (
        ("export", "{folder}/bend.h5", "--for", "fsl", *SCANS, "--out", "{out}.mat"),
        "FLIRT's .mat cannot hold",
    ),
    "no moving": (
        ("export", "{folder}/a.tfm", "--for", "scipy", *SCANS[:2], "--out",
         "{out}.npy"),
        "needs --moving",
    ),
    "wrong file": (
        ("export", "{folder}/a.tfm", "--for", "scipy", *SCANS, "--out", "{out}.h5"),
        "expected one of .npy, .npz",
    ),
    "unknown tool": (
        ("export", "{folder}/a.tfm", "--for", "afni", "--out", "{out}.h5"),
        "expected one of ants, fsl, scipy",
    ),
    "no transform": (("info", "{folder}/nothing.h5"), "does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistake_is_one_sentence_and_leaves_nothing(case, files, tmp_path, capsys):
    words, expected = MISTAKES[case]
    names = {"folder": files[0], "out": tmp_path / "out"}
    assert run(*(word.format(**names) for word in words)) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_singular_matrix_has_no_inverse(tmp_path, capsys):
    flat = sitk.AffineTransform(3)
    text = tmp_path / "flat.tfm"
    sitk.WriteTransform(flat, str(text))
    lines = text.read_text().replace("Parameters: 1 0 0", "Parameters: 0 0 0", 1)
    text.write_text(lines)
    assert run("invert", text, "--out", tmp_path / "back.h5") == 2
    assert "singular matrix" in capsys.readouterr().err
    assert not (tmp_path / "back.h5").exists()


def test_displacements_shorter_than_a_voxel_need_no_padding():
    field = np.full((1, 5, 6, 7, 3), 0.0, np.float32)
    step = transform_lib.Displacement(field, outside="half_voxel")
    from jaxreg.registration import inverse

    found = inverse.inverted(transform_lib.Transform((step,)))
    here = np.asarray(sampling.identity((5, 6, 7)))
    np.testing.assert_allclose(np.asarray(found.map_points(here)), here, atol=1e-6)
