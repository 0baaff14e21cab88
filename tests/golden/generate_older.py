"""Writes what an older jaxreg leaves on disk, for `tests/test_older_files.py`.

Run in a checkout of that version (the files in `older/` are of commit c6bb5dd), whose
names of modules the first lines have:

    cd CHECKOUT && PYTHONPATH=$PWD python .../tests/golden/generate_older.py FOLDER

The run is a real one; other weights are drawn from few values, so that their archives
stay small, and described as a run describes them. Beside them lie the numbers that the
same version gave with them.
"""

# ruff: noqa: I001 (sorted as in that version, whose modules these are)

import csv
import dataclasses
import os
import pathlib
import shlex
import shutil
import sys
import zipfile

import jax
import nibabel as nib
import numpy as np
from scipy import ndimage

from jaxreg import cli, sources, trainer
from jaxreg.data import synthetic
from jaxreg.data.pipeline import Loading
from jaxreg.experiment import Experiment, Stage
from jaxreg.io import checkpoints
from jaxreg.models import kinds, promptreg, sam
from jaxreg.models.rdp import RdpConfig
from jaxreg.models.unireg import UniRegConfig
from jaxreg.models.unireg_rpn import UniRegRpnConfig
from jaxreg.nn.dynamic import SmoothnessRange

SHAPE = (14, 15, 12)  # X Y Z voxels
GRID = (16, 16, 16)
LOADING = Loading(shape=GRID)
RUN = (
    "--train.batch 1 --data.pairs_per_epoch 2 --loading.shape 16,16,16 "
    "--loading.prefetch 0 --loop.image_every 0 --loop.log_every 1 "
    "--loop.checkpoint_every 1 --data.validation_pairs 0"
)
GRADICON = (
    "--model.channels_down 2,4 --model.channels_up 4 --model.halvings 0 "
    "--model.refinements 1 --data.synthetic inter_mono --data.synthetic_labels 2 "
    "--optimizer.name sgd --optimizer.learning_rate 1e-3 --stages.stage_1.epochs 3"
)
SCANS = "--fixed fixed.nii.gz --moving moving.nii.gz"
MRI = f"{SCANS} --fixed-modality mri --moving-modality mri"
CT = f"{SCANS} --fixed-modality ct --moving-modality ct"
PREDICT = "--io-iterations None --transform-out"


def jaxreg(line: str) -> None:
    """Runs one command line of the version that is imported."""
    print("jaxreg", line, flush=True)
    if cli.main(shlex.split(line)) != 0:
        raise SystemExit(f"failed: {line}")


def write_scans(folder: pathlib.Path) -> None:
    """Two scans of Hounsfield units with labels, lists of them, and points."""
    affine = np.diag([2.0, 2.0, 2.5, 1.0])
    affine[:3, 3] = [-12.0, -14.0, -10.0]
    x, y, z = np.meshgrid(*map(np.arange, SHAPE), indexing="ij")
    for name, shift in (("fixed", 0.0), ("moving", 1.0)):
        blob = np.exp(-((x - 6 - shift) ** 2 + (y - 7) ** 2 + (z - 6) ** 2) / 9.0)
        noise = np.random.default_rng(1).normal(size=SHAPE)
        texture = 300 * ndimage.gaussian_filter(noise, 1.5)
        scan = np.rint(900 * blob + texture - 500).astype(np.int16)
        nib.save(nib.Nifti1Image(scan, affine), folder / f"{name}.nii.gz")
        labels = (blob > 0.5).astype(np.uint8) + (blob > 0.2)
        nib.save(
            nib.Nifti1Image(labels.astype(np.uint8), affine),
            folder / f"{name}_labels.nii.gz",
        )
    names = ("fixed", "moving")
    rows = [
        {
            "image": f"{name}.nii.gz", "label": f"{name}_labels.nii.gz",
            "subject": f"{name}{split}", "dataset": "chest", "region": "chest",
            "modality": "mri", "pairing": "inter", "split": split,
        }
        for split in ("train", "val") for name in names
    ]  # fmt: skip
    write_rows(folder / "manifest.csv", rows)
    pair = {
        "fixed": "fixed.nii.gz", "moving": "moving.nii.gz",
        "fixed_label": "fixed_labels.nii.gz", "moving_label": "moving_labels.nii.gz",
        "fixed_modality": "mri", "moving_modality": "mri", "task": "chest",
        "region": "chest", "pairing": "inter", "transform_out": "listed.nii.gz",
    }  # fmt: skip
    write_rows(folder / "pairs.csv", [pair])
    points = "x,y,z,name\n-2.0,1.0,3.0,a\n1.5,-4.0,6.5,b\n"
    (folder / "points.csv").write_text(points)


def write_rows(path: pathlib.Path, rows: list[dict[str, str]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def draw(shapes, seed: int = 1):
    """Variables of these shapes, of three values each, which an archive packs well.

    Their spread keeps that of the activations from layer to layer, about.
    """
    generator = np.random.default_rng(seed)

    def one(path, leaf):
        if "batch_stats" in jax.tree_util.keystr(path):
            return np.ones(leaf.shape, leaf.dtype)
        inputs = np.prod(leaf.shape[:-1]) if len(leaf.shape) > 1 else 100
        step = 2.0 ** np.round(np.log2(np.sqrt(1.5 / inputs)))
        return (step * generator.integers(-1, 2, leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(one, shapes)


def save(name: str, model, regions, loading=LOADING, more=None) -> None:
    """Writes a network's weights as a run leaves them."""
    found = sources.Sources(
        train=synthetic.SyntheticPairs([synthetic.SyntheticConfig()]),
        validation=None, validation_count=0, objectives=(0,) * len(regions),
        classes=(), tasks=regions, regions=regions,
        pairings=("inter",) * len(regions),
        rules=tuple(sources.TaskRule(smoothness=1.0) for _ in regions),
    )  # fmt: skip
    told = Experiment(name, (Stage("one", 1),), model=model, loading=loading)
    found = sources.with_bank(found, found.bank, model)
    chosen = sources.with_tasks(told, found)
    shapes = jax.eval_shape(
        lambda: kinds.build(chosen.model).init(jax.random.key(0), loading.shape)
    )
    variables = {**draw(shapes), **(more or {})}
    checkpoints.save_bundle(name, trainer.bundle_of(chosen, variables, found))


def save_all() -> None:
    """Writes weights of every network but GradICON, whose come from the run."""
    config = sam.SamConfig((2, 2, 3, 3), 4, form="native")
    embed = jax.tree.map(np.asarray, sam.init(config, jax.random.key(5)))
    trained = sam.TrainedSam(config, embed, 2.0, sam.HU_RANGE, (0.0, 0.99))
    checkpoints.save_bundle("sam", trainer._bundle_of_sam(trained))
    two = ("chest", "liver")
    bank = dataclasses.replace(promptreg.AS_PAPER, channels=1)
    aligned = dataclasses.replace(LOADING, resize="aligned", axes="ijk")
    save("promptreg", bank, two, aligned)
    save("rdp", RdpConfig(channels=1), two, aligned)
    asked = SmoothnessRange(0.1, 10.0, 3)
    save(
        "unireg_rpn",
        UniRegRpnConfig(channels=1, hidden=2, smoothness_range=asked),
        two,
    )
    save(
        "unireg",
        UniRegConfig(form="native"),
        two,
        Loading(shape=GRID, ct_window=sam.HU_RANGE, resize="pad_crop", axes="spl"),
        {"sam": embed},
    )


def pack(source: str, target: pathlib.Path) -> None:
    """Writes a folder as an archive."""
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path in sorted(pathlib.Path(source).rglob("*")):
            if path.is_file() and "tfevents" not in path.name:
                archive.write(path, path.relative_to(source))


def write_run() -> None:
    """Trains, then makes of the run one that was killed before its last step."""
    jaxreg(f"train --config configs/demo.py --out run {RUN} {GRADICON}")
    shutil.copytree("run/weights", "gradicon")
    variables = checkpoints.load_bundle("run/weights").variables
    leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
    np.savez_compressed(
        "run_end.npz", **{jax.tree_util.keystr(path): leaf for path, leaf in leaves}
    )
    shutil.rmtree("run/weights")
    saved = pathlib.Path("run/stage_1/checkpoints").glob("[0-9]*")
    *earlier, before, last = sorted(saved, key=lambda path: int(path.name))
    print("it goes on from", before)
    for path in (*earlier, last):
        shutil.rmtree(path)


def predict() -> None:
    """Runs what reads these weights, lists and tables."""
    for name in ("gradicon", "promptreg", "rdp"):
        jaxreg(f"register {MRI} --model {name} {PREDICT} {name}.nii.gz")
    task = "--task chest --pairing inter"
    jaxreg(f"register {MRI} --model unireg_rpn {task} {PREDICT} unireg_rpn.nii.gz")
    jaxreg(f"register {CT} --model unireg {task} {PREDICT} unireg.nii.gz")
    jaxreg(f"match {MRI} --model sam --points points.csv --points-out sam.csv")
    for name in ("gradicon", "gradicon_dice", "promptreg"):
        jaxreg(
            f"register {MRI} --model weights/hippocampus_{name} --shape 16 {PREDICT} "
            f"hippocampus_{name}.nii.gz"
        )
    jaxreg(
        f"match {MRI} --model weights/hippocampus_sam --points points.csv "
        "--points-out hippocampus_sam.csv"
    )
    jaxreg(f"register {MRI} --model gradicon {PREDICT} transform.h5")
    jaxreg("warp --transform transform.h5 --points points.csv --points-out mapped.csv")
    jaxreg("register --pairs pairs.csv --model unireg_rpn --io-iterations None "
           "--summary summary.csv")  # fmt: skip
    jaxreg("evaluate --pairs pairs.csv --model unireg_rpn --out results.csv")
    jaxreg("evaluate --pairs pairs.csv --model gradicon --out other.csv")


def main(out: pathlib.Path) -> None:
    """Writes all files into a new folder."""
    out.mkdir(parents=True)
    root = pathlib.Path.cwd()
    work = out / "work"
    work.mkdir()
    write_scans(work)
    shutil.copytree(root / "configs", work / "configs")
    (work / "weights").symlink_to(root / "weights")
    os.chdir(work)

    write_run()
    save_all()
    jaxreg(
        "tune-lambda --manifest manifest.csv --split val --neighbours 1 --model "
        "unireg_rpn --smoothness 0.1,10 --out lambda.csv --write"
    )

    predict()
    fields = {}
    for path in sorted(pathlib.Path().glob("*.nii.gz")):
        if not path.name.startswith(("fixed", "moving", "listed")):
            field = np.asarray(nib.load(path).dataobj)
            field = field[::2, ::2, ::2].astype(np.float32)
            fields[path.name.removesuffix(".nii.gz")] = field
    np.savez_compressed(out / "predictions.npz", **fields)
    for name in ("gradicon", "promptreg", "rdp", "unireg_rpn", "sam", "unireg", "run"):
        pack(name, out / f"{name}.zip")
    for name in (
        "fixed.nii.gz", "moving.nii.gz", "fixed_labels.nii.gz", "moving_labels.nii.gz",
        "points.csv", "mapped.csv", "sam.csv", "hippocampus_sam.csv", "manifest.csv",
        "pairs.csv", "results.csv", "other.csv", "lambda.csv", "summary.csv",
        "run_end.npz", "transform.h5",
    ):  # fmt: skip
        shutil.copy(name, out / name)
    os.chdir(root)
    shutil.rmtree(work)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).absolute())
