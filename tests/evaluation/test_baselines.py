"""Other tools: what is asked of them and how their answers are read.

Stand-ins write the files that the tools would write; where the tools are installed,
they are asked as well, and their own resampling is the reference.
"""

import pathlib
import re
import sys
import types

import numpy as np
import pytest

from jaxreg.errors import UserError
from jaxreg.evaluation import baselines
from jaxreg.io import displacements, itk_transforms, volumes
from jaxreg.space import warping
from jaxreg.space.grid import Grid, Volume
from jaxreg.space.transform import Affine, Displacement, Transform

SHAPE = (24, 28, 26)
POINTS = np.array([[[3.0, 1.0, 2.0], [5.0, 6.0, 4.0]]])


def make_grid(turn=0.2) -> Grid:
    c, s = np.cos(turn), np.sin(turn)
    affine = np.eye(4)
    affine[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]] @ np.eye(3)[:, ::-1]
    affine[:3, :3] *= (1.2, 1.0, 1.1)
    affine[:3, 3] = (-20.0, -10.0, -15.0)
    return Grid(SHAPE, affine)


def scan(centre=(11.0, 13.0, 12.0), name="scan") -> Volume:
    """A textured ellipsoid around a voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), -1)
    offset = (index - centre) / (7.0, 8.0, 6.0)
    array = (
        100 * np.exp(-(np.sum(offset**2, -1) ** 2)) * (2 + np.sin(4 * offset).sum(-1))
    )
    return Volume(array.astype(np.float32), make_grid(), name)


def constant_field(shift_ras_mm) -> Transform:
    """A shift by a displacement field on the scans' grid."""
    grid = make_grid()
    to_unit = np.linalg.inv(grid.unit_to_mm)
    field = np.zeros((1, *SHAPE, 3), np.float32) + to_unit[:3, :3] @ shift_ras_mm
    step = Displacement(field, outside="half_voxel")
    return Transform((Affine(to_unit), step, Affine(grid.unit_to_mm)))


@pytest.fixture
def ants(monkeypatch):
    """A stand-in whose answer is known: a field, then a matrix."""
    asked = {}

    def registration(*, outprefix, fixed, moving, **options):
        asked.update(options, fixed=fixed, moving=moving)
        asked["files"] = [volumes.read_volume(path) for path in (fixed, moving)]
        answer = constant_field([1.0, 2.0, 3.0]).then(MATRIX)
        itk_transforms.write(f"{outprefix}Composite.h5", answer)

    module = types.SimpleNamespace(
        registration=registration, image_read=lambda path: path
    )
    monkeypatch.setitem(sys.modules, "ants", module)
    return module, asked


MATRIX = Transform((Affine(np.diag([2.0, 1.0, 1.0, 1.0])),))
EXPECTED = (POINTS + [1.0, 2.0, 3.0]) * [2.0, 1.0, 1.0]


def test_syn_reads_its_composite(ants):
    moving, fixed = scan(name="m"), scan(name="f")
    found = baselines.register_syn(moving, fixed, radius=3)
    np.testing.assert_allclose(found.map_points(POINTS), EXPECTED, atol=1e-4)
    _, asked = ants
    assert asked["type_of_transform"] == "SyN"
    assert (asked["syn_metric"], asked["syn_sampling"]) == ("CC", 3)
    np.testing.assert_array_equal(asked["files"][0].array, fixed.array)
    assert asked["files"][1].grid.matches(moving.grid)
    assert not pathlib.Path(asked["fixed"]).exists()


@pytest.mark.parametrize(
    ("name", "metric", "sampling"),
    [("SyN-MI", "mattes", 32), ("SyN-CC", "CC", 4), ("SyN", "CC", 4)],
)
def test_the_similarity_of_syn_is_chosen_by_name(ants, name, metric, sampling):
    baselines.check_installed([name])
    found = baselines.TOOLS[name](scan(), scan())
    np.testing.assert_allclose(found.map_points(POINTS), EXPECTED, atol=1e-4)
    _, asked = ants
    assert (asked["syn_metric"], asked["syn_sampling"]) == (metric, sampling)
    assert asked["reg_iterations"] == (40, 20, 0)


def test_syn_is_seeded_where_antspyx_can_be(ants, monkeypatch):
    module, asked = ants
    unseeded = module.registration
    baselines.register_syn(scan(), scan())
    assert "random_seed" not in asked

    def registration(*, random_seed=None, **options):
        unseeded(random_seed=random_seed, **options)

    monkeypatch.setattr(module, "registration", registration)
    baselines.register_syn(scan(), scan())
    assert asked["random_seed"] == 1
    baselines.register_syn(scan(), scan(), seed=7)
    assert asked["random_seed"] == 7


@pytest.fixture
def greedy(monkeypatch):
    """A stand-in that writes a matrix in RAS mm and a field in LPS mm."""
    commands = []

    class Greedy3D:
        def execute(self, command, out=None):
            commands.append(command)
            print("chatter", file=out)
            target = pathlib.Path(re.findall(r'-o "([^"]+)"', command)[0])
            if target.suffix == ".mat":
                target.write_text("2 0 0 0\n0 1 0 0\n0 0 1 0\n0 0 0 1\n")
                return
            field = constant_field([1.0, 2.0, 3.0])
            displacements.write_nifti(target, field, make_grid())

    monkeypatch.setitem(
        sys.modules, "picsl_greedy", types.SimpleNamespace(Greedy3D=Greedy3D)
    )
    return Greedy3D, commands


def test_greedy_is_a_field_and_then_a_matrix(greedy, capfd):
    found = baselines.register_greedy(scan(), scan(), iterations="5x5")
    np.testing.assert_allclose(found.map_points(POINTS), EXPECTED, atol=1e-4)
    affine, deformable = greedy[1]
    assert "-a -dof 12" in affine
    assert "-m NCC 2x2x2" in affine
    assert "-n 5x5" in deformable
    assert re.search(r'-it "[^"]+affine.mat"', deformable)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["SyN", "greedy"])
def test_failure_of_a_tool_names_the_scans(name, ants, greedy, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("out of\nluck")

    monkeypatch.setattr(ants[0], "registration", fail)
    monkeypatch.setattr(greedy[0], "execute", fail)
    message = rf"{name} failed on fixed f and moving m \(out of luck\)"
    with pytest.raises(UserError, match=message):
        baselines.TOOLS[name](scan(name="m"), scan(name="f"))


@pytest.mark.parametrize("name", ["SyN", "greedy"])
def test_sheared_grids_are_refused(name, ants, greedy):
    fixed = scan(name="f")
    affine = fixed.grid.affine_mm.copy()
    affine[:3, 0] += 0.1 * affine[:3, 1]
    sheared = Volume(fixed.array, Grid(SHAPE, affine), "s")
    with pytest.raises(UserError, match="s has a sheared voxel grid"):
        baselines.TOOLS[name](sheared, fixed)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("SyN", "ants", "antspyx"), ("greedy", "picsl_greedy", "picsl_greedy")],
)
def test_a_missing_package_is_named(monkeypatch, name, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf'{package} is not installed .* pip install "jaxreg\[comparison\]"'
    for call in (
        lambda: baselines.check_installed([name]),
        lambda: baselines.TOOLS[name](scan(), scan()),
    ):
        with pytest.raises(UserError, match=message):
            call()


def test_an_unknown_tool_is_refused():
    with pytest.raises(UserError, match="tool elastix is unknown, expected one of SyN"):
        baselines.check_installed(["elastix"])


# --- the tools themselves ------------------------------------------------------------

MOVED_MM = make_grid().affine_mm[:3, :3] @ [2.0, -1.0, 1.5]


def shift_error_mm(found: Transform) -> float:
    """Distance to the known shift near the object."""
    index = np.array([11.0, 13.0, 12.0]) + np.array([[0, 0, 0], [4, 0, 0], [0, -4, 2]])
    grid = make_grid()
    places = index @ grid.affine_mm[:3, :3].T + grid.affine_mm[:3, 3]
    mapped = np.asarray(found.map_points(places[None]))[0]
    return float(np.linalg.norm(mapped - places - MOVED_MM, axis=1).max())


@pytest.mark.parametrize(
    ("name", "module"), [("SyN", "ants"), ("greedy", "picsl_greedy")]
)
def test_tool_finds_a_shift(name, module):
    pytest.importorskip(module)
    found = baselines.TOOLS[name](scan((13.0, 12.0, 13.5)), scan())
    assert shift_error_mm(found) < 0.5


def test_syn_transform_warps_as_ants_does(tmp_path):
    ants = pytest.importorskip("ants")
    moving, fixed = scan((13.0, 12.0, 13.5)), scan()
    for name, volume in (("moving", moving), ("fixed", fixed)):
        volumes.write_volume(tmp_path / f"{name}.nii.gz", volume)
    images = {
        name: ants.image_read(str(tmp_path / f"{name}.nii.gz"))
        for name in ("moving", "fixed")
    }
    answer = ants.registration(
        **images, outprefix=f"{tmp_path}/", write_composite_transform=True
    )
    theirs = ants.apply_transforms(
        **images, transformlist=answer["fwdtransforms"], interpolator="linear"
    ).numpy()
    found = itk_transforms.read(tmp_path / "Composite.h5")
    ours = warping.warp_volume(moving, found, fixed.grid).array
    np.testing.assert_allclose(ours, theirs.T, atol=0.05)
    assert np.abs(theirs.T - moving.array).max() > 50


def test_greedy_transform_warps_as_greedy_does(tmp_path):
    greedy = pytest.importorskip("picsl_greedy").Greedy3D()
    moving, fixed = scan((13.0, 12.0, 13.5)), scan()
    paths = {}
    for name, volume in (("moving", moving), ("fixed", fixed)):
        paths[name] = tmp_path / f"{name}.nii.gz"
        volumes.write_volume(paths[name], volume)
    common = f'-V 0 -i "{paths["fixed"]}" "{paths["moving"]}" -m NCC 2x2x2 -n 20x10'
    affine, warp, out = (tmp_path / n for n in ("a.mat", "w.nii.gz", "o.nii.gz"))
    greedy.execute(f'{common} -a -dof 12 -ia-image-centers -o "{affine}"')
    greedy.execute(f'{common} -it "{affine}" -o "{warp}"')
    greedy.execute(
        f'-V 0 -rf "{paths["fixed"]}" -rm "{paths["moving"]}" "{out}" '
        f'-r "{warp}" "{affine}"'
    )
    theirs = volumes.read_volume(out).array
    matrix = Transform((Affine(np.loadtxt(affine)),))
    found = displacements.read_nifti(warp).then(matrix)
    ours = warping.warp_volume(moving, found, fixed.grid).array
    # Greedy fades to 0 beyond the last voxel's centre, ITK and jaxreg half a voxel on.
    inner = np.zeros(SHAPE, np.uint8)
    inner[1:-1, 1:-1, 1:-1] = 1
    inside = warping.warp_volume(Volume(inner, moving.grid), found, fixed.grid)
    inside = inside.array == 1
    assert inside.mean() > 0.5
    np.testing.assert_allclose(ours[inside], theirs[inside], atol=0.05)
    assert np.abs(theirs - moving.array).max() > 50
