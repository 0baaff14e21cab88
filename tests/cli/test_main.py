"""The command line, run in process: mistakes, the older spellings, tiny real runs."""

import csv
import dataclasses
import gzip
import pathlib
import re
import subprocess
import sys

import jax
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.cli import main, progress
from jaxreg.cli import options as cli_options
from jaxreg.errors import UserError
from jaxreg.io import transforms, volumes
from jaxreg.models import sam
from jaxreg.models.gradicon import GradIcon, GradIconConfig
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair, report, result
from jaxreg.space import background, warping
from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid, Volume
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import load

SHAPE = (20, 24, 22)
SMALL = GradIconConfig((2, 4, 8), (4, 4), downsampled_steps=1, fullres_steps=0)
NETWORK_GRID = "8,8,8"  # every level of the displacement has this size: one program
VERBS = ("register", "warp", "jacobian", "report", "convert", "models", "demo")


def grid(*, spacing=(1.5, 1.0, 1.2), offset=0.0) -> Grid:
    affine = np.eye(4)
    affine[:3, :3] = np.eye(3)[:, ::-1] * np.asarray(spacing)
    affine[:3, 3] = [-10.0 + offset, -12.0, -14.0]
    return Grid(SHAPE, affine)


def blob(shift=0.0) -> np.ndarray:
    """Two smooth blobs, shifted by `shift` voxels along the last axis."""
    d, h, w = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    first = np.exp(-((d - 9) ** 2 + (h - 11) ** 2 + (w - 10 - shift) ** 2) / 30.0)
    second = np.exp(-((d - 13) ** 2 + (h - 15) ** 2 + (w - 13 - shift) ** 2) / 9.0)
    return (1000 * (first + 0.5 * second)).astype(np.int16)


def save(path: pathlib.Path, array, place: Grid | None = None) -> str:
    volumes.write_volume(path, Volume(np.asarray(array), place or grid()))
    return str(path)


def save_nifti(path: pathlib.Path, array, affine=None) -> str:
    affine = np.eye(4) if affine is None else affine
    nib.save(nib.Nifti1Image(array, affine), path)
    return str(path)


@pytest.fixture(autouse=True)
def no_progress(monkeypatch):
    """A progress callback is part of the compiled program: without it, runs share."""
    monkeypatch.setattr(progress.Bar, "step", None)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Good and bad files by name."""
    folder = tmp_path_factory.mktemp("inputs")
    labels = (blob() > 300).astype(np.uint8)
    files = {
        "fixed": save(folder / "fixed.nii.gz", blob()),
        "moving": save(folder / "moving.nii.gz", blob(2.0)),
        "mask": save(folder / "mask.nii.gz", labels),
        "labels": save(folder / "labels.nii.gz", labels),
        "other_labels": save(folder / "other_labels.nii.gz", 7 * labels),
        "minus": save(folder / "minus.nii.gz", labels.astype(np.int16) - 1),
        "elsewhere": save(folder / "elsewhere.nii.gz", labels, grid(offset=30.0)),
        "constant": save(folder / "constant.nii.gz", np.full(SHAPE, 4, np.int16)),
    }
    for name, bad in (("nan", np.nan), ("inf", np.inf)):
        array = blob().astype(np.float32)
        array[3, 4, 5] = bad
        files[name] = save_nifti(folder / f"{name}.nii.gz", array)
    files["flat"] = save_nifti(folder / "flat.nii.gz", np.ones((9, 8), np.float32))
    files["series"] = save_nifti(
        folder / "series.nii.gz", np.random.default_rng(0).random((9, 8, 7, 3))
    )
    colour = np.zeros((9, 8, 7), np.dtype([(c, "u1") for c in "RGB"]))
    files["rgb"] = save_nifti(folder / "rgb.nii.gz", colour)
    files["singular"] = singular(folder / "singular.nii.gz")
    files["truncated"] = truncated(folder / "truncated.nii.gz", files["fixed"])
    text = folder / "text.nii.gz"
    text.write_text("no image")
    files["text"] = str(text)
    files["missing"] = str(folder / "missing.nii.gz")
    return files


def singular(path: pathlib.Path) -> str:
    image = nib.Nifti1Image(np.ascontiguousarray(blob().T), np.eye(4))
    image.header["qform_code"] = 0
    image.header["sform_code"] = 1
    for i, row in enumerate("xyz"):
        image.header[f"srow_{row}"] = [1.0, 1.0, 0.0, 0.0] if i < 2 else [0, 0, 1, 0]
    path.write_bytes(
        gzip.compress(image.header.binaryblock + bytes(4) + blob().tobytes())
    )
    return str(path)


def truncated(path: pathlib.Path, source: str) -> str:
    data = pathlib.Path(source).read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return str(path)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A tiny network with random weights in a checkpoint folder."""
    path = tmp_path_factory.mktemp("weights") / "small"
    save_weights(path, random_variables())
    return str(path)


def random_variables():
    """Variables of the small network, drawn without running its initialiser."""
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        if "batch_stats" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, leaf.dtype)
        return (0.1 * generator.normal(size=leaf.shape)).astype(leaf.dtype)

    shapes = jax.eval_shape(
        lambda: GradIcon(SMALL).init(jax.random.key(0), (16, 16, 16))
    )
    return jax.tree.map_with_path(draw, shapes)


def save_weights(path: pathlib.Path, variables) -> None:
    config = dataclasses.asdict(SMALL)
    config.pop("form")
    bundle_lib.save_bundle(
        path,
        bundle_lib.Bundle(
            variables=variables,
            model="gradicon",
            config={
                name: list(value) if isinstance(value, tuple) else value
                for name, value in config.items()
            },
            preprocessing={},
            source="random",
            licence="none",
        ),
    )


def arguments(inputs, out: pathlib.Path, **changes) -> list[str]:
    """A good `register` command line, with options replaced, added or (None) dropped.

    Names have underscores; a list gives several values, True a flag.
    """
    options = {
        "fixed": inputs["fixed"],
        "moving": inputs["moving"],
        "fixed_modality": "mri",
        "moving_modality": "mri",
        "transform_out": str(out / "transform.h5"),
        "io_target": "displacement",
        "io_iterations": "2",
        "io_sim": "mse",  # compiles faster than the default
        "shape": NETWORK_GRID,
        **changes,
    }
    return ["register", *spelled(options)]


def spelled(options, dash="-") -> list[str]:
    argv = []
    for name, value in options.items():
        if value is None or value is False:
            continue
        values = [] if value is True else value if isinstance(value, list) else [value]
        argv += ["--" + name.replace("_", dash), *map(str, values)]
    return argv


def refused(argv, capsys) -> str:
    """Runs a command line that must be refused, and returns its one sentence."""
    status = main.main(argv)
    captured = capsys.readouterr()
    passed_over = ("warning", "so far)")  # which a slow machine prints while compiling
    lines = [line for line in captured.err.splitlines()
             if not any(part in line for part in passed_over)]  # fmt: skip
    assert status == 2, captured
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("jaxreg: ")
    assert "Traceback" not in captured.err
    assert captured.out == ""
    return lines[0]


# What is changed in a good command line, and what the sentence must name.
# Values starting with @ are files of `inputs`, with % files in the output folder.
BAD = {
    "missing file": ({"moving": "@missing"}, "missing.nii.gz"),
    "truncated file": ({"moving": "@truncated"}, "truncated.nii.gz"),
    "no image": ({"fixed": "@text"}, "text.nii.gz"),
    "2D image": ({"fixed": "@flat"}, "flat.nii.gz"),
    "4D image": ({"moving": "@series"}, "series.nii.gz"),
    "RGB image": ({"moving": "@rgb"}, "rgb.nii.gz"),
    "NaN": ({"moving": "@nan"}, "nan.nii.gz"),
    "infinity": ({"moving": "@inf"}, "inf.nii.gz"),
    "constant": ({"moving": "@constant"}, "constant.nii.gz"),
    "singular affine": ({"moving": "@singular"}, "singular.nii.gz"),
    "mask elsewhere": (
        {"fixed_mask": "@elsewhere", "input_masking": True},
        "elsewhere.nii.gz",
    ),
    "segmentation elsewhere": (
        {
            "fixed_segmentation": "@labels",
            "moving_segmentation": "@elsewhere",
            "dice_loss_weight": "1",
        },
        "elsewhere.nii.gz",
    ),
    "labels share nothing": (
        {
            "fixed_segmentation": "@labels",
            "moving_segmentation": "@other_labels",
            "dice_loss_weight": "1",
        },
        "other_labels.nii.gz",
    ),
    "negative labels": (
        {
            "fixed_segmentation": "@minus",
            "moving_segmentation": "@labels",
            "dice_loss_weight": "1",
        },
        "minus.nii.gz has negative labels (down to -1)",
    ),
    "scan as labels": (
        {
            "fixed_segmentation": "@nan",
            "moving_segmentation": "@labels",
            "dice_loss_weight": "1",
        },
        "nan.nii.gz",
    ),
    "unknown model": ({"io_target": None, "model": "unigradicom"}, "unigradicon"),
    "no such weights": (
        {"io_target": None, "network_weights": "@missing"},
        "missing.nii.gz",
    ),
    "model none": ({"io_target": "network", "model": "none"}, "--io-target network"),
    "model with displacement": ({"model": "unigradicon"}, "--model"),
    "weights with displacement": ({"network_weights": "x.trch"}, "--network-weights"),
    "two sets of weights": (
        {"io_target": None, "model": "a/b.trch", "network_weights": "x.trch"},
        "--network-weights",
    ),
    "folder missing": ({"transform_out": "%no/such/t.h5"}, "--transform-out"),
    "output is a folder": ({"warped_moving_out": "%folder.nii.gz"}, "folder.nii.gz"),
    "transform extension": ({"transform_out": "%t.xfm"}, "t.xfm"),
    "transform .mat": ({"transform_out": "%t.mat"}, "t.mat"),
    "image extension": ({"warped_moving_out": "%warped.png"}, "warped.png"),
    "inverse extension": ({"inverse_out": "%inverse.csv"}, "--inverse-out"),
    "report extension": ({"report": "%report.pdf"}, "--report"),
    "output is input": ({"warped_moving_out": "@moving"}, "--warped-moving-out"),
    "one file twice": ({"inverse_out": "%transform.h5"}, "--inverse-out"),
    "no output": ({"transform_out": None}, "--transform-out"),
    "no fixed": ({"fixed": None}, "--fixed"),
    "modality": ({"fixed_modality": "xray"}, "--fixed-modality"),
    "iterations abc": ({"io_iterations": "abc"}, "--io-iterations"),
    "iterations 0": ({"io_iterations": "0"}, "--io-iterations"),
    "iterations negative": ({"io_iterations": "-3"}, "--io-iterations"),
    "iterations fraction": ({"io_iterations": "2.5"}, "--io-iterations"),
    "displacement without steps": ({"io_iterations": "None"}, "--io-iterations"),
    "learning rate 0": ({"io_lr": "0"}, "--io-lr"),
    "learning rate negative": ({"io_lr": "-1e-3"}, "--io-lr"),
    "learning rate text": ({"io_lr": "fast"}, "--io-lr"),
    "learning rate nan": ({"io_lr": "nan"}, "--io-lr"),
    "similarity": ({"io_sim": "ssim"}, "--io-sim"),
    "target": ({"io_target": "affine"}, "--io-target"),
    "quantiles swapped": ({"quantile_range": [0.9, 0.1]}, "--quantile-range"),
    "quantiles outside": ({"quantile_range": [-5, 7]}, "--quantile-range"),
    "one quantile": ({"quantile_range": [0.5]}, "--quantile-range"),
    "quantiles for CT": (
        {
            "fixed_modality": "ct",
            "moving_modality": "ct",
            "quantile_range": [0.1, 0.9],
        },
        "--quantile-range",
    ),
    "window swapped": (
        {"fixed_modality": "ct", "ct_window": [5, 1]},
        "--ct-window",
    ),
    "window for MRI": ({"ct_window": [-100, 100]}, "--ct-window"),
    "window misses": (
        {"fixed_modality": "ct", "ct_window": [5000, 6000]},
        "fixed.nii.gz",
    ),
    "Dice negative": ({"dice_loss_weight": "-1"}, "--dice-loss-weight"),
    "Dice without labels": ({"dice_loss_weight": "1"}, "--fixed-segmentation"),
    "one segmentation": ({"fixed_segmentation": "@labels"}, "--fixed-segmentation"),
    "Dice without steps": (
        {
            "io_target": None,
            "io_iterations": "None",
            "fixed_segmentation": "@labels",
            "moving_segmentation": "@labels",
            "dice_loss_weight": "1",
        },
        "--dice-loss-weight",
    ),
    "idle mask": ({"fixed_mask": "@mask"}, "--fixed-mask"),
    "input masking alone": ({"input_masking": True}, "--input-masking"),
    "loss masking, one mask": (
        {"loss_function_masking": True, "fixed_mask": "@mask"},
        "--moving-mask",
    ),
    "conservation in MRI": (
        {"intensity_conservation_loss": True},
        "--intensity-conservation-loss",
    ),
    "shape of two": ({"shape": "16,16"}, "--shape"),
    "shape text": ({"shape": "large"}, "--shape"),
    "shape negative": ({"shape": "16,16,-16"}, "--shape"),
    "shape tiny": ({"shape": "2,16,16"}, "--shape"),
    "precision": ({"precision": "float64"}, "--precision"),
    "seed": ({"seed": "-1"}, "--seed"),
    "seed beyond 32 bits": ({"seed": "100000000000000000000"}, "--seed"),
    "stored orientation without a network": (
        {"stored_orientation": True, "io_target": "displacement"},
        "--stored-orientation",
    ),
    "SAM's pre-alignment without SAM": (
        {"prealign": "sam", "fixed_modality": "ct", "moving_modality": "ct"},
        "--sam-weights",
    ),
    "SAM weights that are missing": (
        {"prealign": "affine", "sam_weights": "@missing"},
        "missing.nii.gz",
    ),
    "pre-alignment of a scan as stored": (
        {"prealign": "centre", "stored_orientation": True, "io_target": "features"},
        "leave one of the two away",
    ),
    "SAM is looked for before scans": (
        {
            "prealign": "sam-affine",
            "moving": "@text",
            "model": "unigradicon",
            "io_target": None,
        },
        "--sam-weights",
    ),
    "SAM's path is looked at before scans": (
        {"prealign": "sam", "moving": "@text", "sam_weights": "%nowhere"},
        "no SAM weights at",
    ),
    "features without steps": (
        {"io_target": "features", "io_iterations": "None"},
        "--io-target features",
    ),
    "fill of integers": (
        {"fill": "0.5", "warped_moving_out": "%warped.nii.gz"},
        "--fill",
    ),
    "unknown option": ({"transform": "%t.h5"}, "--transform"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistake_is_one_sentence_and_leaves_nothing(case, inputs, tmp_path, capsys):
    (tmp_path / "folder.nii.gz").mkdir()
    changes, named = BAD[case]

    def place(value):
        if isinstance(value, str) and value.startswith("@"):
            return inputs[value[1:]]
        if isinstance(value, str) and value.startswith("%"):
            return str(tmp_path / value[1:])
        return value

    changes = {name: place(value) for name, value in changes.items()}
    before = pathlib.Path(inputs["moving"]).read_bytes()

    sentence = refused(arguments(inputs, tmp_path, **changes), capsys)

    assert named in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["folder.nii.gz"]
    assert pathlib.Path(inputs["moving"]).read_bytes() == before


NOT_ONE_NUMBER = {
    "vectors": ((9, 8, 7, 1, 3), "numbers per voxel as in a displacement field"),
    "series": ((9, 8, 7, 5), "is a 4D image of 9 x 8 x 7 x 5"),
    "colours": ((9, 8, 7, 1, 4), "4 numbers per voxel as in a vector image"),
}


@pytest.mark.parametrize("name", NOT_ONE_NUMBER)
@pytest.mark.parametrize("role", ["fixed", "moving"])
@pytest.mark.parametrize("verb", ["register", "warp", "evaluate", "match"])
def test_several_numbers_a_voxel_are_refused(
    verb, role, name, inputs, tmp_path, capsys
):
    """Of headers without an intent, as nibabel writes them."""
    shape, said = NOT_ONE_NUMBER[name]
    bad = tmp_path / f"{name}.nii"
    save_nifti(bad, np.random.default_rng(0).random(shape, np.float32))
    scans = {"fixed": inputs["fixed"], "moving": inputs["moving"]} | {role: str(bad)}
    given = spelled(scans)
    out = tmp_path / "out.nii.gz"
    argv = {
        "register": arguments(scans, tmp_path),
        "warp": ["warp", *given, "--linear", "--warped-moving-out", str(out)],
        "match": ["match", *given, "--fixed-modality", "mri", "--moving-modality",
                  "mri", "--model", "mind", "--point", "1", "2", "3"],
        "evaluate": ["evaluate", "--pairs", str(tmp_path / "pairs.csv"), "--out",
                     str(tmp_path / "r.csv"), "--io-target", "displacement",
                     "--io-iterations", "1"],
    }  # fmt: skip
    (tmp_path / "pairs.csv").write_text("fixed,moving\n" + ",".join(scans.values()))
    sentence = refused(argv[verb], capsys)
    assert str(bad) in sentence and said in sentence
    assert {p.name for p in tmp_path.iterdir()} == {bad.name, "pairs.csv"}


def test_output_folder_without_permission(inputs, tmp_path, capsys):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    try:
        (locked / "probe").touch()
    except PermissionError:
        sentence = refused(arguments(inputs, locked), capsys)
        assert "permission" in sentence
    else:
        pytest.skip("this user may write everywhere")


def test_weights_of_another_architecture(inputs, tmp_path, capsys):
    other = tmp_path / "other"
    variables = random_variables()
    params = dict(variables["params"])
    params["step_9"] = params.pop("step_1")
    save_weights(other, {**variables, "params": params})
    argv = arguments(inputs, tmp_path, io_target=None, network_weights=str(other))

    sentence = refused(argv, capsys)

    assert "step_1" in sentence or "step_9" in sentence
    assert [p.name for p in tmp_path.iterdir()] == ["other"]


def test_displacement_end_to_end(inputs, tmp_path, capsys):
    argv = arguments(
        inputs,
        tmp_path,
        warped_moving_out=str(tmp_path / "warped.nii.gz"),
        inverse_out=str(tmp_path / "inverse.nii.gz"),
        report=str(tmp_path / "report.html"),
    )

    assert main.main(argv) == 0

    captured = capsys.readouterr()
    for word in (
        "loss before",
        "loss after",
        "folded voxels",
        "seconds",
        "transform.h5",
    ):
        assert word in captured.out
    moving, warped = (
        volumes.read_volume(path, kind="stored")
        for path in (inputs["moving"], tmp_path / "warped.nii.gz")
    )
    assert warped.array.dtype == moving.array.dtype
    assert warped.grid.matches(grid())
    mapping = transforms.read_transform(tmp_path / "transform.h5")
    fixed = volumes.read_grid(inputs["fixed"])  # as rounded by its header
    again = warping.warp_volume(moving, mapping, fixed)
    np.testing.assert_array_equal(again.array, warped.array)
    assert_residual_is_that_of_the_files(
        captured.out, tmp_path / "transform.h5", tmp_path / "inverse.nii.gz"
    )
    page = (tmp_path / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "--transform-out" in page
    leftovers = {p.name for p in tmp_path.iterdir()}
    assert leftovers == {
        "transform.h5", "warped.nii.gz", "inverse.nii.gz", "report.html",
    }  # fmt: skip


def assert_residual_is_that_of_the_files(said: str, there: pathlib.Path, back) -> None:
    """Against SimpleITK, which composes the two files at points of its own."""
    field = sitk.ReadImage(str(back), sitk.sitkVectorFloat64)
    inverse = sitk.DisplacementFieldTransform(field)
    transform = sitk.ReadTransform(str(there))
    span = np.asarray(SHAPE) - 1
    rng = np.random.default_rng(1)
    lps = np.array([-1, -1, 1, 1.0])
    gaps = []
    for voxel in rng.random((4000, 3)) * span:
        x = (grid().affine_mm @ [*voxel, 1.0] * lps)[:3]
        partner = inverse.TransformPoint(x)
        at = np.linalg.inv(grid().affine_mm) @ (np.array([*partner, 1.0]) * lps)
        if (at[:3] >= 0).all() and (at[:3] <= span).all():
            gaps.append(np.linalg.norm(np.array(transform.TransformPoint(partner)) - x))
    line = next(row for row in said.splitlines() if row.startswith("inverse residual"))
    mean, largest = (float(word) for word in re.findall(r"([0-9.]+) mm", line))
    deviation = np.std(gaps) / np.sqrt(len(gaps))
    assert abs(mean - np.mean(gaps)) < 5 * deviation + 2e-4
    assert np.quantile(gaps, 0.999) - 2e-3 < largest
    assert mean > 5e-4  # a field of 8 voxels is not its own inverse between them


def test_network_end_to_end(inputs, weights, tmp_path, capsys):
    out = tmp_path / "transform.nii.gz"
    argv = arguments(
        inputs, tmp_path, io_target=None, io_iterations="None", model=weights,
        transform_out=str(out),
    )  # fmt: skip

    assert main.main(argv) == 0

    displacement = warping.displacement_mm(transforms.read_transform(out), grid())
    assert np.abs(displacement).max() > 1e-3
    assert np.isfinite(displacement).all()


def test_same_seed_same_bits(inputs, tmp_path, capsys):
    outs = [tmp_path / f"{i}.nii.gz" for i in range(2)]
    for out in outs:
        argv = arguments(inputs, tmp_path, transform_out=str(out), seed="3")
        assert main.main(argv) == 0
    first, second = (np.asarray(nib.load(out).dataobj) for out in outs)
    np.testing.assert_array_equal(first, second)


@pytest.fixture
def asked(monkeypatch):
    """Stops a good command line where registering would begin; what was asked for."""
    calls = []

    def stop(moving, fixed, model, options, **more):
        calls.append((model, options, more["regions"]))
        raise UserError("stopped")

    monkeypatch.setattr(pair, "register", stop)
    return calls


def test_network_is_optimised_with_everything_on(inputs, weights, tmp_path, capsys):
    argv = arguments(
        inputs, tmp_path, io_target=None, network_weights=weights, io_iterations="1",
        fixed_mask=inputs["mask"], moving_mask=inputs["mask"], input_masking=True,
        loss_function_masking=True, fixed_segmentation=inputs["labels"],
        moving_segmentation=inputs["labels"], dice_loss_weight="0.5",
    )  # fmt: skip
    assert main.main(argv) == 0
    assert (tmp_path / "transform.h5").is_file()


def test_sam_weights_and_pre_alignment_arrive(inputs, tmp_path, capsys, monkeypatch):
    config = sam.SamConfig(channels=(1, 1, 1, 1), embedding=1)
    frozen = jax.tree.map(np.asarray, dict(sam.init(config, jax.random.key(0))))
    fields = {"channels": [1, 1, 1, 1], "embedding": 1}
    bundle = bundle_lib.Bundle(frozen, "sam", fields, {}, "random", "none")
    bundle_lib.save_bundle(tmp_path / "sam", bundle)
    seen = []

    def stop(moving, fixed, model, options, **more):
        seen.append((model, options, more["sam"]))
        raise UserError("stopped")

    monkeypatch.setattr(pair, "register", stop)
    argv = arguments(
        inputs, tmp_path, prealign="sam-affine", sam_weights=str(tmp_path / "sam"),
        fixed_modality="ct", moving_modality="ct", model="none", io_target="features",
    )  # fmt: skip
    assert refused(argv, capsys) == "jaxreg: stopped"
    ((model, options, network),) = seen
    assert model is None
    assert (options.prealign, options.io_target) == ("sam-affine", "features")
    assert network.config == config
    jax.tree.map(np.testing.assert_array_equal, dict(network.variables), frozen)
    wrong = arguments(
        inputs, tmp_path, io_target=None, network_weights=str(tmp_path / "sam")
    )
    assert "pass it as --sam-weights" in refused(wrong, capsys)


def test_command_line_of_the_pytorch_tool(asked, inputs, weights, tmp_path, capsys):
    """Only the first word differs from a unigradicon-register command line."""
    options = {
        "fixed": inputs["fixed"],
        "moving": inputs["moving"],
        "fixed_modality": "ct",
        "moving_modality": "mri",
        "fixed_mask": inputs["mask"],
        "moving_mask": inputs["mask"],
        "input_masking": True,
        "loss_function_masking": True,
        "fixed_segmentation": inputs["labels"],
        "moving_segmentation": inputs["labels"],
        "dice_loss_weight": 0.5,
        "transform_out": tmp_path / "trans.hdf5",
        "warped_moving_out": tmp_path / "warped.nii.gz",
        "io_iterations": 20,
        "io_lr": 0.0001,
        "io_sim": "lncc2",
        "model": "multigradicon",
        "network_weights": weights,
        "ct_window": [-900, 1100],
        "quantile_range": [0.01, 0.98],
    }
    main.main(["register", *spelled(options, dash="_")])
    assert capsys.readouterr().err == "jaxreg: stopped\n"
    ((model, chosen, regions),) = asked
    assert model.name == weights
    assert None not in dataclasses.astuple(regions)
    assert chosen == options_lib.Options(
        fixed_modality="ct", moving_modality="mri", ct_window=(-900.0, 1100.0),
        quantile_range=(0.01, 0.98), input_masking=True, loss_function_masking=True,
        io_iterations=20, io_lr=1e-4, io_sim="lncc2", dice_loss_weight=0.5,
        shape=(175, 175, 175), inverse=False,
    )  # fmt: skip


def test_pytorch_spelling_of_warp_and_jacobian(inputs, shift, tmp_path, capsys):
    argv = f"""warp --fixed {inputs["fixed"]} --moving {inputs["moving"]}
        --transform {shift} --warped_moving_out {tmp_path}/w.nii.gz
        --nearest_neighbor""".split()
    assert main.main(argv) == 0
    argv = f"""jacobian --fixed {inputs["fixed"]} --transform {shift}
        --jacob {tmp_path}/j.nii.gz --log_jacob {tmp_path}/lj.nii.gz""".split()
    assert main.main(argv) == 0
    assert {p.name for p in tmp_path.iterdir()} == {
        "w.nii.gz", "j.nii.gz", "lj.nii.gz",
    }  # fmt: skip


@pytest.mark.parametrize("masking", ["none", "loss", "both"])
def test_legacy_segmentations_become_masks(masking, asked, inputs, tmp_path, capsys):
    argv = arguments(
        inputs,
        tmp_path,
        fixed_segmentation=inputs["labels"],
        moving_segmentation=inputs["labels"],
        loss_function_masking=masking != "none",
        input_masking=masking == "both",
    )
    main.main(argv)
    assert "deprecated" in capsys.readouterr().err
    ((_, options, regions),) = asked
    assert regions.fixed_mask is not None
    assert regions.moving_mask is not None
    assert regions.fixed_segmentation is None
    assert options.loss_function_masking == (masking != "none")
    assert options.input_masking == (masking != "loss")


def test_defaults(asked, inputs, weights, tmp_path, capsys, monkeypatch):
    argv = ["register", "--fixed", inputs["fixed"], "--moving", inputs["moving"],
            "--fixed-modality", "mri", "--moving-modality", "CT", "--transform-out",
            str(tmp_path / "t.h5"), "--model", weights]  # fmt: skip
    main.main(argv)
    ((model, options, regions),) = asked
    assert model.name == weights
    assert regions == options_lib.Regions()
    assert options == options_lib.Options(
        fixed_modality="mri", moving_modality="ct", shape=model.shape, inverse=False
    )
    assert model.shape == (175, 175, 175)


def test_fill_is_auto_or_a_number():
    assert cli_options.parse_fill("auto") is None
    assert cli_options.parse_fill("AUTO") is None
    assert cli_options.parse_fill("-1e3") == -1000
    with pytest.raises(UserError, match='--fill is "air", expected auto or a number'):
        cli_options.parse_fill("air")


def odd_circle(around: int, padding: int) -> np.ndarray:
    """The blob in a CT's numbers, padded outside a circle of the slices."""
    _, h, w = np.indices(SHAPE)
    outside = (h - 11.5) ** 2 + (w - 10.5) ** 2 > 110
    noise = np.random.default_rng(0).integers(0, 40, SHAPE)
    return np.where(outside, padding, blob() + around + noise).astype(np.int16)


SCANS = {
    "ct of -1024": ("ct", (blob() - 1024).astype(np.int16), -1024),
    "ct of -1000": ("ct", (blob() - 1000.0).astype(np.float32), -1000),
    "ct with padding": ("ct", odd_circle(-1040, -3024), -1000),
    "ct, windowed": ("ct", np.clip(blob() - 1000, -200, 300).astype(np.int16), -200),
    "mr": ("mri", blob(), 0),
    "mr, standardised": ("t1", blob().astype(np.float64) / 300 - 0.7, -0.7),
    "labels": ("mri", ((blob() > 200) * 3).astype(np.uint8), 0),
}


@pytest.fixture
def curved(monkeypatch):
    """Registering answers with one curved map, over other fields of view."""

    def answer(moving, fixed, model, options, **_):
        shape = (6, 7, 5)
        index = np.indices(shape).transpose(1, 2, 3, 0)
        field = 0.03 * np.sin(1.0 + index[..., ::-1]).astype(np.float32)
        grids = fixed.grid.resized(shape), moving.grid.resized((5, 5, 6))
        placed = np.linalg.inv(grids[1].unit_to_mm) @ grids[0].unit_to_mm
        steps = (transform_lib.Displacement(field[None]), transform_lib.Affine(placed))
        world = transform_lib.in_world(transform_lib.Transform(steps), *grids)
        return result.RegistrationResult(
            transform=world, inverse=None, inverse_residual_mm=None,
            fixed_grid=grids[0], moving_grid=grids[1], history={}, similarity="mse",
            similarity_before=0.0, similarity_after=0.0, similarity_prealigned=None,
            folding_percent=0.0, sdlogj=0.0, domains={}, seconds={},
            fixed_image=np.zeros(shape), warped_before=np.zeros(shape),
            warped_after=np.zeros(shape), conditioning="",
        )  # fmt: skip

    monkeypatch.setattr(pair, "register", answer)


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("suffix", [".h5", ".tfm", ".nii.gz"])
def test_register_writes_the_scan_that_warp_gives(
    name, suffix, curved, tmp_path, capsys
):
    """To the voxel, whatever the kind of scan, in other fields of view."""
    modality, array, fill = SCANS[name]
    place = grid(spacing=(0.9, 0.7, 0.8), offset=4.0)
    moving = save(tmp_path / "moving.nii.gz", array, place)
    fixed = save(tmp_path / "fixed.nii.gz", blob(), grid(spacing=(1.5, 1.3, 1.6)))
    out = {n: str(tmp_path / f"{n}.nii.gz") for n in ("registered", "warped", "told")}
    files = {"fixed": fixed, "moving": moving}
    transform = str(tmp_path / f"transform{suffix}")
    line = arguments(
        files, tmp_path, moving_modality=modality, transform_out=transform,
        warped_moving_out=out["registered"],
    )  # fmt: skip
    assert main.main(line) == 0
    again = {**files, "transform": transform, "linear": True}
    for given, extra in (("warped", {}), ("told", {"moving_modality": modality})):
        more = {**again, "warped_moving_out": out[given], **extra}
        assert main.main(["warp", *spelled(more)]) == 0
    found = {n: volumes.read_volume(p, kind="stored").array for n, p in out.items()}
    assert found["registered"].dtype == array.dtype
    np.testing.assert_array_equal(found["warped"], found["registered"])
    np.testing.assert_array_equal(found["told"], found["registered"])
    assert 0.3 < np.isclose(found["registered"], fill).mean() < 0.999
    assert found["registered"].min() >= fill - 40
    assert ("looks like a label map" in capsys.readouterr().err) == (name == "labels")


def test_a_report_without_a_warped_scan_is_filled_alike(
    curved, inputs, tmp_path, capsys, monkeypatch
):
    seen = []

    def note(path, scans, *_, **__):
        seen.append(scans.background)

    monkeypatch.setattr(report, "write_report", note)
    moving = save(tmp_path / "ct.nii.gz", odd_circle(-1040, -3024))
    line = arguments(
        {**inputs, "moving": moving}, tmp_path, moving_modality="ct",
        report=str(tmp_path / "r.html"),
    )  # fmt: skip
    assert main.main(line) == 0
    assert seen == [background.Background(-1000, -3024)]


def test_progress_lines_and_bar(capsys, monkeypatch):
    bar = progress.Bar("optimise")
    monkeypatch.undo()
    with bar:
        for step in range(1, 101):
            bar.step(step, 100, {"loss": 1.0})
    lines = capsys.readouterr().err.splitlines()
    assert 3 <= len(lines) <= 7
    assert "1 of 100" in lines[0]


@pytest.fixture(scope="module")
def shift(tmp_path_factory) -> str:
    """A transform file that moves points by (1, 2, 3) mm, RAS."""
    matrix = np.eye(4)
    matrix[:3, 3] = [1.0, 2.0, 3.0]
    path = tmp_path_factory.mktemp("shift") / "shift.tfm"
    transforms.write_transform(
        path, transform_lib.Transform((transform_lib.Affine(matrix),)), grid()
    )
    return str(path)


@pytest.mark.parametrize("frame", ["lps", "ras"])
def test_points_move_from_fixed_to_moving(frame, shift, tmp_path, capsys):
    source, target = tmp_path / "points.csv", tmp_path / "out.csv"
    source.write_text("name,X,y,z\nnose,1.0,2.0,3.0\near,-4.5,0,1\n")
    argv = f"warp --points {source} --points-out {target} --transform {shift}".split()

    assert main.main([*argv, "--points-frame", frame]) == 0

    with open(target, newline="") as file:
        rows = list(csv.DictReader(file))
    sign = -1.0 if frame == "lps" else 1.0
    assert [row["name"] for row in rows] == ["nose", "ear"]
    got = [[float(row[c]) for c in "Xyz"] for row in rows]
    expected = np.array([[1.0, 2, 3], [-4.5, 0, 1]]) + [sign, sign * 2, 3]
    np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("suffix", [".csv", ".fcsv"])
def test_points_far_outside_are_warned_about(suffix, shift, tmp_path, capsys):
    """In the scan as RAS; read as LPS on the other side of the world's origin."""
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    far = affine[:3, 3] = [200.0, 300.0, 0.0]
    save_nifti(tmp_path / "f.nii", np.ones((8, 7, 6), np.float32), affine)
    x, y, z = far + affine[:3, :3] @ (2, 2, 2)
    head = "x,y,z" if suffix == ".csv" else "# CoordinateSystem = LPS\n# columns=x,y,z"
    (tmp_path / f"p{suffix}").write_text(f"{head}\n{x},{y},{z}\n")
    line = ["warp", "--fixed", tmp_path / "f.nii", "--transform", shift, "--points",
            tmp_path / f"p{suffix}", "--points-out", tmp_path / "q.csv"]  # fmt: skip
    assert main.main([*map(str, line)]) == 0
    said = capsys.readouterr().err
    assert "1 of 1 points" in said and "outside the scan" in said
    if suffix == ".fcsv":
        assert "in the frame lps that the file says" in said
        return
    assert "pass --points-frame ras, where all are inside" in said
    assert main.main([*map(str, line), "--points-frame", "ras"]) == 0
    assert "outside" not in capsys.readouterr().err


def test_points_beyond_the_field_are_warned_about(tmp_path, capsys):
    place = Grid((6, 7, 8), np.diag([2.0, 2.0, 2.0, 1.0]))
    field = transform_lib.Displacement(np.zeros((1, 6, 7, 8, 3), np.float32))
    mapping = transform_lib.in_world(transform_lib.Transform((field,)), place, place)
    transforms.write_transform(tmp_path / "t.h5", mapping, place)
    (tmp_path / "p.csv").write_text("x,y,z\n4,4,6\n5,6,7\n")
    line = ["warp", "--transform", tmp_path / "t.h5", "--points", tmp_path / "p.csv",
            "--points-out", tmp_path / "q.csv"]  # fmt: skip
    assert main.main([*map(str, line)]) == 0
    said = capsys.readouterr().err
    assert "2 of 2 points" in said and "--points-frame ras" in said
    assert main.main([*map(str, line), "--points-frame", "ras"]) == 0
    assert not capsys.readouterr().err


def test_points_agree_with_simpleitk(shift, tmp_path, capsys):
    source, target = tmp_path / "points.csv", tmp_path / "out.csv"
    places = np.random.default_rng(0).normal(size=(5, 3))
    np.savetxt(source, places, delimiter=",")
    argv = f"warp --points {source} --points-out {target} --transform {shift}".split()
    assert main.main(argv) == 0
    itk = sitk.ReadTransform(shift)
    expected = [itk.TransformPoint(place.tolist()) for place in places]
    np.testing.assert_allclose(np.loadtxt(target, delimiter=","), expected, atol=1e-5)


def warped(tmp_path, capsys, array, *more, place=None):
    """Warps an array by the command line: the result, and what is said."""
    moving = save(tmp_path / "moving.nii.gz", array, place)
    out = tmp_path / "w.nii.gz"
    line = ["--fixed", save(tmp_path / "fixed.nii.gz", blob()), "--moving", moving,
            "--warped-moving-out", str(out), *more]  # fmt: skip
    assert main.main(["warp", *line]) == 0
    told = [t for t in capsys.readouterr().err.splitlines() if "without --tr" not in t]
    return volumes.read_volume(out, kind="stored").array, told


@pytest.mark.parametrize(
    ("array", "more", "fill"),
    [
        (blob() - 1024, ["--linear"], -1024),
        (blob() - 1024, ["--nearest-neighbor"], -1024),
        (blob() - 1024, ["--linear", "--fill", "auto"], -1024),
        (blob() - 1024, ["--linear", "--fill", "-5"], -5),
        ((blob() > 200) * np.int64(-(2**60)), ["--nearest-neighbor"], 0),
        ((blob() > 200) * (2.0**53 - 1), ["--nearest-neighbor"], 0),
    ],
)
def test_warp_fills_by_what_the_scan_is(array, more, fill, tmp_path, capsys):
    got, told = warped(tmp_path, capsys, array, *more, place=grid(offset=8.0))
    assert told == []
    assert got.dtype == array.dtype
    assert set(np.unique(got)) <= {*np.unique(array), fill} or "--linear" in more
    assert np.all(got[..., :6] == fill)
    assert np.any(got[..., 8:] != fill)


def test_a_scan_that_may_be_no_ct_is_asked_about(tmp_path, capsys):
    array = blob()
    array[10, 10, 10] = -800  # an edge that rings
    got, told = warped(tmp_path, capsys, array, "--linear", place=grid(offset=8.0))
    assert np.all(got[..., :6] == -800)
    assert len(told) == 1
    assert "--moving-modality mri" in told[0]
    more = ("--linear", "--moving-modality", "mri")
    got, told = warped(tmp_path, capsys, array, *more, place=grid(offset=8.0))
    assert np.all(got[..., :6] == 0)
    assert told == []


def test_a_result_without_anything_of_the_scan_is_warned_about(tmp_path, capsys):
    got, told = warped(tmp_path, capsys, blob(), "--linear", place=grid(offset=900.0))
    assert not got.any()
    assert len(told) == 1
    assert "all of the result is the fill" in told[0]


def test_warp_linear_is_the_identity_without_transform(inputs, tmp_path, capsys):
    out = tmp_path / "w.nii.gz"
    argv = ["warp", "--fixed", inputs["fixed"], "--moving", inputs["moving"],
            "--warped-moving-out", str(out), "--linear"]  # fmt: skip
    assert main.main(argv) == 0
    np.testing.assert_array_equal(
        volumes.read_volume(out, kind="stored").array, blob(2.0)
    )
    said = capsys.readouterr().err
    assert "without --transform the scan is brought" in said and said.count("\n") == 1


@pytest.mark.parametrize("way", ["--linear", "--nearest-neighbor"])
@pytest.mark.parametrize("name", ["labels", "other_labels", "moving"])
def test_warp_of_a_label_map_asks_for_the_nearest(
    name, way, inputs, shift, tmp_path, capsys
):
    argv = ["warp", "--fixed", inputs["fixed"], "--moving", inputs[name], "--transform",
            shift, "--warped-moving-out", str(tmp_path / "w.nii.gz"), way]  # fmt: skip
    assert main.main(argv) == 0
    told = f"{inputs[name]} looks like a label map" in capsys.readouterr().err
    assert told == (way == "--linear" and name != "moving")
    written = volumes.read_volume(tmp_path / "w.nii.gz", kind="stored").array
    # What is warned about: other_labels are 0 and 7.
    new = name == "other_labels" and bool(set(np.unique(written)) - {0, 7})
    assert new == (name == "other_labels" and told)


def test_warp_takes_dicom_folders(tmp_path, capsys, dicom_series):
    """As register does, and what it gives is what the converted scan gives."""
    dicom_series(tmp_path / "a.1", blob())
    scan = volumes.read_volume(tmp_path / "a.1", kind="stored")
    volumes.write_volume(tmp_path / "a.nii.gz", scan)
    matrix = np.eye(4)
    matrix[:3, 3] = [1.0, 2.0, 3.0]
    shift = transform_lib.Transform((transform_lib.Affine(matrix),))
    transforms.write_transform(tmp_path / "t.tfm", shift, scan.grid)
    found = []
    for name in ("a.1", "a.nii.gz"):
        out = tmp_path / f"w{len(found)}.nii.gz"
        argv = ["warp", "--fixed", tmp_path / name, "--moving", tmp_path / name,
                "--transform", tmp_path / "t.tfm", "--linear",
                "--warped-moving-out", out]  # fmt: skip
        assert main.main([*map(str, argv)]) == 0
        found.append(volumes.read_volume(out, kind="stored").array)
    assert found[0].std() > 50
    np.testing.assert_array_equal(*found)
    (tmp_path / "empty").mkdir()
    capsys.readouterr()
    argv = ["warp", "--fixed", tmp_path / "a.1", "--moving", tmp_path / "empty",
            "--linear", "--warped-moving-out", tmp_path / "x.nii.gz"]  # fmt: skip
    assert "holds no DICOM image" in refused([*map(str, argv)], capsys)


@pytest.mark.parametrize("verb", ["warp", "jacobian"])
def test_a_field_that_covers_a_part_of_the_scan_is_told(verb, tmp_path, capsys):
    """12 of 20 slices by two axes of 24 and 22, of which it has 12 and 11."""
    field = np.zeros((12, 12, 11, 3), np.float32) + np.float32([1, 0, 0])
    image = sitk.GetImageFromArray(field, isVector=True)
    affine = grid().affine_mm[:, [2, 1, 0, 3]]
    image.SetSpacing(np.linalg.norm(affine[:3, :3], axis=0).tolist())
    image.SetOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    image.SetDirection([-1, 0, 0, 0, -1, 0, 0, 0, 1])
    sitk.WriteImage(image, str(tmp_path / "t.nrrd"))
    scan = save(tmp_path / "f.nii.gz", blob())
    argv = [verb, "--fixed", scan, "--transform", str(tmp_path / "t.nrrd")]
    if verb == "warp":
        argv += ["--moving", scan, "--linear"]
        argv += ["--warped-moving-out", str(tmp_path / "w.nii.gz")]
    assert main.main(argv) == 0
    said = capsys.readouterr().err
    assert f"85 % of the voxels of {scan} lie beyond the displacement field of" in said
    if verb == "warp":
        warped = volumes.read_volume(tmp_path / "w.nii.gz", kind="stored").array
        still = warped == blob()
        assert still[12:].all() and still[:, 12:].all() and still[:, :, 11:].all()
        assert not still[:12, :12, :11].all()


def test_jacobian_of_a_scaling(inputs, tmp_path, capsys):
    path = tmp_path / "scale.tfm"
    matrix = np.diag([1.1, 1.1, 1.1, 1.0])
    transforms.write_transform(
        path, transform_lib.Transform((transform_lib.Affine(matrix),)), grid()
    )
    maps = {"jacob": tmp_path / "j.nii.gz", "log_jacob": tmp_path / "lj.nii.gz"}
    argv = ["jacobian", *spelled({"fixed": inputs["fixed"], "transform": path, **maps})]

    assert main.main(argv) == 0

    out = capsys.readouterr().out
    assert "1.3310" in out
    assert "0.0000 % (0)" in out
    read = [volumes.read_volume(p, kind="stored").array for p in maps.values()]
    np.testing.assert_allclose(read[0], 1.331, rtol=1e-4)
    np.testing.assert_allclose(read[1], np.log(1.331), rtol=1e-3)


WARP_BAD = {
    "nothing to do": ("", "--warped-moving-out"),
    "no interpolation": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz",
        "--linear",
    ),
    "both interpolations": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz "
        "--linear --nearest-neighbor",
        "--linear",
    ),
    "no moving": (
        "--fixed {fixed} --warped-moving-out {out}/w.nii.gz --linear",
        "--moving",
    ),
    "no result": (
        "--fixed {fixed} --moving {moving} --points {moving} --points-out {out}/p.csv",
        "--warped-moving-out",
    ),
    "points alone": ("--points {moving} --warped-moving-out {out}/w.mha", "--points"),
    "points are no text": ("--points {moving} --points-out {out}/p.csv", "--points"),
    "transform missing": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz "
        "--linear --transform {out}/no.h5",
        "no.h5",
    ),
    "transform is a scan": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz "
        "--linear --transform {fixed}",
        "fixed.nii.gz",
    ),
    "fill too large": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz "
        "--linear --fill 1e9",
        "--fill",
    ),
    "fill is no number": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz "
        "--linear --fill nan",
        "--fill",
    ),
    "fill is a word": (
        "--fixed {fixed} --moving {moving} --warped-moving-out {out}/w.nii.gz "
        "--linear --fill air",
        "auto or a number",
    ),
}


@pytest.mark.parametrize("case", WARP_BAD)
def test_warp_mistakes(case, inputs, tmp_path, capsys):
    line, named = WARP_BAD[case]
    argv = ["warp", *line.format(out=tmp_path, **inputs).split()]
    assert named in refused(argv, capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "text", ["a,b,c\n1,2,3\n", "1,2\n", "x,y,z\n1,2,three\n", "", "x,y,z\n1,nan,2\n"]
)
def test_bad_points_tables(text, tmp_path, capsys):
    source = tmp_path / "points.csv"
    source.write_text(text)
    argv = ["warp", "--points", str(source), "--points-out", str(tmp_path / "o.csv")]
    assert "points.csv" in refused(argv, capsys)
    assert not (tmp_path / "o.csv").exists()


@pytest.mark.parametrize(
    "line",
    [
        "jacobian --fixed {missing} --transform {shift}",
        "jacobian --fixed {fixed} --transform {missing}",
        "jacobian --fixed {fixed} --transform {shift} --jacob {out}/j.png",
        "jacobian --fixed {fixed}",
        "convert --from {out}/no.trch --to {out}/weights",
        "convert --from {fixed} --to {out}/weights",
        "convert --from {out}/a.trch --to {out}/b.trch",
        "demo --out {fixed}",
        "demo --out {out}/demo --shape 1,2",
        "demo --out {out}/demo --io-iterations None",
        "demo",
        "regsiter",
        "--no-such-option",
    ],
)
def test_mistakes_of_the_other_verbs(line, inputs, shift, tmp_path, capsys):
    refused(line.format(out=tmp_path, shift=shift, **inputs).split(), capsys)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb(verb, capsys):
    assert main.main([verb, "--help"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "--help" in captured.out


def test_help_lists_the_verbs_and_version(capsys):
    for argv in ([], ["--help"]):
        assert main.main(argv) == 0
        out = capsys.readouterr().out
        assert all(verb in out for verb in VERBS)
    assert main.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("jaxreg ")


def test_help_does_not_import_jax():
    code = (
        "import sys; from jaxreg.cli import main; main.main(['register', '--help']);"
        "sys.exit('jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, timeout=60
    )
    assert done.returncode == 0


def test_models_lists_the_zoo(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("JAXREG_CACHE", str(tmp_path))
    assert main.main(["models"]) == 0
    out = capsys.readouterr().out
    for word in ("unigradicon", "multigradicon", "Apache", "not downloaded"):
        assert word in out


def test_interrupt_and_memory(inputs, tmp_path, capsys, monkeypatch):
    for error, status in (
        (KeyboardInterrupt(), 130),
        (MemoryError(), 2),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(pair, "register", fail)
        assert main.main(arguments(inputs, tmp_path)) == status
        assert "Traceback" not in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_defects_show_their_traceback(inputs, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a defect")

    monkeypatch.setattr(pair, "register", fail)
    with pytest.raises(RuntimeError, match="a defect"):
        main.main(arguments(inputs, tmp_path))


def test_idle_options_warn(asked, inputs, weights, tmp_path, capsys):
    argv = arguments(
        inputs, tmp_path, io_target=None, io_iterations="None", model=weights,
        io_lr="1e-4", fill="1",
    )  # fmt: skip
    main.main(argv)
    warnings = [t for t in capsys.readouterr().err.splitlines() if "warning" in t]
    assert len(warnings) == 2
    assert "--io-lr" in warnings[0]
    assert "--fill" in warnings[1]


def test_idle_sam_and_similarity_warn(asked, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_sam", lambda path: "a network")
    argv = arguments(
        inputs, tmp_path, io_target="features", model="none", io_sim="mse",
        sam_weights=str(tmp_path),
    )  # fmt: skip
    main.main(argv)
    warnings = [t for t in capsys.readouterr().err.splitlines() if "warning" in t]
    assert len(warnings) == 2
    assert "--io-sim mse affects only the printed similarity" in warnings[0]
    assert "--sam-weights has no effect" in warnings[1]


def test_a_pre_alignment_alone(inputs, tmp_path, capsys):
    out = {name: tmp_path / name for name in ("t.tfm", "w.nii.gz", "r.html")}
    argv = arguments(
        inputs, tmp_path, io_target=None, io_iterations="None", model="none",
        prealign="centre", transform_out=out["t.tfm"], report=out["r.html"],
        warped_moving_out=out["w.nii.gz"],
    )  # fmt: skip
    assert main.main(argv) == 0
    assert "mse loss pre-aligned" in capsys.readouterr().out
    mapping = transforms.read_transform(out["t.tfm"])
    moved = np.asarray(mapping.map_points(np.zeros((1, 1, 3))))[0, 0]
    # Two voxels of 1.2 mm along the last axis, which is x.
    np.testing.assert_allclose(moved, [2.4, 0, 0], atol=0.7)
    assert all(path.is_file() for path in out.values())


@pytest.mark.parametrize("text", ["16,16,16", "16x16x16", "16X16x16", "16"])
def test_one_form_of_shape(text):
    assert options_lib.read_shape(text) == (16, 16, 16)


def test_hyphens_leaves_values_alone():
    argv = ["--fixed_mask", "a_b.nii", "--moving_mask=c_d.nii", "x_y", "-h"]
    assert main._hyphens(argv) == [
        "--fixed-mask", "a_b.nii", "--moving-mask=c_d.nii", "x_y", "-h",
    ]  # fmt: skip
