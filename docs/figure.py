"""Makes the README's picture: a synthetic pair, registered without weights.

    python docs/figure.py

The bodies are made of a seed alone (`jaxreg.data.synthetic`): no scan is needed, and
none is shown. Writes docs/before_after.png, in about two minutes of processor time.
"""

import pathlib

import numpy as np

import jaxreg
from jaxreg.data import synthetic
from jaxreg.registration import report
from jaxreg.space import warping

SIDE = 72
SPACING_MM = 2.5


def main() -> None:
    """Registers pair 0 of population 0 and draws one plane of it."""
    config = synthetic.SyntheticConfig(
        shape=(SIDE, SIDE, SIDE), labels=9, deformation_voxel=9.0, noise=0.005
    )
    pair = synthetic.pair(config, seed=0, index=0)
    # D to the head, H to the back, W to the left.
    axes = [[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1 / SPACING_MM]]
    grid = jaxreg.Grid((SIDE, SIDE, SIDE), SPACING_MM * np.array(axes))
    moving, fixed = (
        jaxreg.Volume(array[..., 0], grid) for array in (pair.moving, pair.fixed)
    )
    options = jaxreg.Options(io_target="displacement", io_sim="lncc", shape=SIDE)
    found = jaxreg.register(moving, fixed, None, options).transform
    picture = report.before_after_figure(
        fixed,
        moving,
        jaxreg.warp_volume(moving, found, grid),
        displacement_mm=warping.displacement_mm(found, grid),
        determinant=warping.jacobian_map(found, grid),
        planes=["coronal"],
    )
    pathlib.Path(__file__).with_name("before_after.png").write_bytes(picture)


if __name__ == "__main__":
    main()
