"""Registers a list on one device and on all; prints by how much the results differ.

Argument: a folder with the scans 0.nii.gz to 4.nii.gz and broken.nii.gz, and pairs.csv,
which lists them in that order onto 0.nii.gz.
"""

import dataclasses
import json
import pathlib
import re
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.data import pair_list
from jaxreg.io import volumes
from jaxreg.models.base import Prediction, RegistrationModel
from jaxreg.registration import many, together
from jaxreg.registration import options as options_lib
from jaxreg.registration.optimization import network as network_lib
from jaxreg.registration.result import RegistrationResult
from jaxreg.space.transform import Affine, Displacement, Transform
from jaxreg.typing import Pair
from jaxreg.weights import bundle as bundle_lib
from jaxreg.weights import zoo
from jaxreg.xla import spreading


@dataclasses.dataclass(frozen=True)
class Bending(RegistrationModel):
    """Depends on both images, and on a mean over all that is seen at once.

    The transform has a part without a batch axis.
    """

    def apply(self, variables, moving, fixed, **_):
        step = (moving - fixed) * variables["params"]["scale"] / (1 + jnp.mean(moving))
        linear = jnp.eye(4) * (1 + 0.01 * jnp.mean(fixed)) ** jnp.array([1, 1, 1, 0])
        displaced = Displacement(step.repeat(3, -1))
        return Prediction(Transform((displaced, Affine(linear)))), {}


MODES = {
    "predict": options_lib.Options(io_iterations=None, io_sim="mse"),
    # MIND divides by a mean variance of all that it sees.
    "network": options_lib.Options(io_iterations=3, io_lr=1e-2, io_sim="mind"),
    "map": options_lib.Options(io_iterations=3, io_target="map", io_sim="mse"),
}


def model() -> zoo.LoadedModel:
    variables = {"params": {"scale": np.full((), 0.1, np.float32)}}
    rule = {"shape": [9, 8, 10], "orientation": "any"}
    bundle = bundle_lib.Bundle(variables, "gradicon", {}, rule, "a test", "none")
    return zoo.LoadedModel("bending", Bending(), variables, bundle)


def watched(used: set[int]):
    """Notes on which devices the network's results lie."""
    split = spreading.split

    def noting(tree, mesh, to):
        for leaf in jax.tree.leaves(tree):
            used.update(d.id for d in leaf.sharding.device_set)
            assert len({str(s.index) for s in leaf.addressable_shards}) == len(to)
        return split(tree, mesh, to)

    spreading.split = noting


def in_memory(folder: pathlib.Path, options, devices) -> list[RegistrationResult]:
    """Five pairs: on four devices the last batch has one."""
    scans = [volumes.read_volume(folder / f"{n}.nii.gz") for n in range(5)]
    found, weights = [], model()
    requests = [together.Request(scan, scans[0], weights, options) for scan in scans]
    for first in range(0, len(requests), len(devices)):
        batch = requests[first : first + len(devices)]
        found += together.register_each(batch, devices)
    return found


def difference(one: RegistrationResult, other: RegistrationResult) -> float:
    """The largest of any displacement in mm, similarity and part of the objective."""
    points = one.fixed_grid.affine_mm[:3, 3] + np.mgrid[:9, :8, :10].reshape(3, -1).T
    found = [
        np.abs(np.asarray(getattr(one, name).map_points(points[None]))
               - np.asarray(getattr(other, name).map_points(points[None]))).max()
        for name in ("transform", "inverse")
    ]  # fmt: skip
    found.append(abs(one.similarity_after - other.similarity_after))
    assert one.history.keys() == other.history.keys()
    for name, values in one.history.items():
        assert values.shape == other.history[name].shape
        found.append(np.abs(values - other.history[name]).max())
    return float(max(found))


def collectives() -> list[str]:
    """What the devices tell each other while the network predicts."""
    devices, weights = jax.local_devices(), model()
    mesh = spreading.mesh_of(devices)
    image = jnp.ones((1, 9, 8, 10, 1))
    compiled = network_lib._predict_each.lower(
        weights.model,
        mesh,
        spreading.replicate(weights.variables, mesh),
        spreading.place([Pair(image, image)] * len(devices), mesh),
    ).compile()
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(names, compiled.as_text())


def main(folder: pathlib.Path) -> None:
    warnings.simplefilter("ignore")
    devices, said = jax.local_devices(), {}
    for name, options in MODES.items():
        used: set[int] = set()
        alone = in_memory(folder, options, devices[:1])
        watched(used)
        every = in_memory(folder, options, devices)
        said[name] = {
            "difference": max(map(difference, alone, every)),
            "devices": len(used),
            "apart": max(difference(alone[1], other) for other in alone[2:]),
        }
    rows = many.with_outputs(pair_list.read_rows(folder / "pairs.csv"), folder / "out")
    (folder / "out").mkdir()
    outcomes = list(many.register_all(rows, model(), MODES["predict"]))
    said["rows"] = [(o.row, o.status) for o in outcomes]
    said["in order"] = [o.row for o in outcomes] == list(rows)
    scans = [volumes.read_volume(folder / f"{n}.nii.gz") for n in range(2)]
    options = MODES["predict"]
    good = together.Request(scans[1], scans[0], model(), options)
    asking = dataclasses.replace(options, io_target="network", prealign="none")
    bad = together.Request(scans[1], scans[0], None, asking)
    found = together.register_each([good, bad, good], devices)
    said["one failing"] = [type(one).__name__ for one in found]
    said["collectives"] = collectives()
    print(json.dumps(said))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
