"""Damaged transforms and points: each is read or refused in one sentence, and soon.

JAXREG_FUZZ_SEED and JAXREG_FUZZ_COUNT (files in all) give other and more ones.
"""

import itertools
import json
import os
import pathlib
import sys

import jax
import mutation
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from jaxreg.io import hdf5, tables, transforms

COUNT = int(os.environ.get("JAXREG_FUZZ_COUNT", "800"))

FCSV = """# Markups fiducial file version = 4.11
# CoordinateSystem = LPS
# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID
vtkMRMLMarkupsFiducialNode_0,1.5,-2.0,3.25,0,0,0,1,1,1,0,F-1,a note,
vtkMRMLMarkupsFiducialNode_1,-4.5,5.0,6.75,0,0,0,1,1,1,0,F-2,,
"""
MRK = {
    "markups": [
        {
            "type": "Fiducial",
            "coordinateSystem": "LPS",
            "coordinateUnits": "mm",
            "controlPoints": [
                {"id": "1", "label": "F-1", "position": [1.5, -2.0, 3.25]},
                {"id": "2", "label": "F-2", "position": [-4.5, 5.0, 6.75]},
            ],
        }
    ]
}


def vectors():
    return np.random.default_rng(0).normal(size=(4, 5, 6, 3)).astype(np.float32)


def field(path):
    image = sitk.GetImageFromArray(vectors(), isVector=True)
    if path.suffix in (".nrrd", ".mha"):
        sitk.WriteImage(image, str(path), useCompression=path.suffix == ".nrrd")
        return
    sitk.WriteTransform(
        sitk.DisplacementFieldTransform(sitk.Cast(image, sitk.sitkVectorFloat64)),
        str(path),
    )


def nifti(path):
    stored = vectors().transpose(2, 1, 0, 3)[:, :, :, None]
    image = nib.Nifti1Image(stored, np.diag([2.0, 1.5, 3.0, 1.0]))
    image.header.set_intent("vector")
    nib.save(image, path)


def composite(path):
    rigid = sitk.VersorRigid3DTransform()
    rigid.SetRotation((0.0, 0.6, 0.8), 0.35)
    parts = [rigid, sitk.AffineTransform(3), sitk.BSplineTransform(3, 3)]
    sitk.WriteTransform(sitk.CompositeTransform(parts), str(path))


def affine(path):
    sitk.WriteTransform(sitk.AffineTransform(3), str(path))


MADE = {
    "field.h5": field,
    "composite.h5": composite,
    "composite.tfm": composite,
    "affine.mat": affine,
    "field.nii.gz": nifti,
    "field.nrrd": field,
    "field.mha": field,
    "points.fcsv": lambda path: path.write_text(FCSV),
    "points.mrk.json": lambda path: path.write_text(json.dumps(MRK, indent=1)),
    "points.csv": lambda path: path.write_text("label,x,y,z\na,1,2,3\nb,4,5,6\n"),
}
EACH = max(1, COUNT // len(MADE))


def outcomes_of(folder, name):
    """Reads damaged copies of a file; returns how many were read and refused."""
    MADE[name](folder / name)
    path = folder / f"damaged_{name}"
    copies = mutation.mutations((folder / name).read_bytes(), mutation.SEED)

    def read(_):
        if name.startswith("points"):
            table = tables.read(path, "points")
            assert np.isfinite(tables.points_mm(table, "ras")).all()
        else:
            for step in transforms.read_transform(path).steps:
                assert all(np.isfinite(array).all() for array in vars(step).values()
                           if isinstance(array, np.ndarray | jax.Array))  # fmt: skip

    found = mutation.outcomes(read, path, itertools.islice(copies, EACH))
    hdf5._WORKER.close()  # the memory of a process is known when it has ended
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return mutation.run(__file__, tmp_path_factory.mktemp("damaged"))


def test_the_process_comes_to_its_end(found):
    assert "process" not in found, found["process"]["trouble"]


@pytest.mark.parametrize("name", MADE)
def test_damaged_files_are_read_or_refused(found, name):
    mutation.check(found[name], EACH)


if __name__ == "__main__":
    mutation.main(outcomes_of, MADE, pathlib.Path(sys.argv[1]))
