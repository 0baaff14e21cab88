"""TwoStep and Downsample: coarse to fine by composition of displacement fields.

Coordinates are shared by all resolutions (0 and 1 are corner voxel centres), so a
coarse step's map serves the finer grids unchanged. Pooled voxels sit half a fine voxel
off these coordinates; released weights were trained with that offset.
"""

from collections.abc import Callable

from jaxreg.nn.conv import api
from jaxreg.space import fields
from jaxreg.space.transform import Displacement, Transform
from jaxreg.typing import Field, Image

FieldNetwork = Callable[[Image, Image], Field]
Network = Callable[[Image, Image], Transform]


def field_step(network: FieldNetwork) -> Network:
    """Returns a network whose transform is ``x -> x + u(x)``."""

    def run(moving, fixed):
        return Transform((Displacement(network(moving, fixed)),))

    return run


def downsample(inner: Network) -> Network:
    """Returns `inner` run on both images at half resolution."""

    def run(moving, fixed):
        return inner(api.average_pool2(moving), api.average_pool2(fixed))

    return run


def two_step(first: Network, second: Network) -> Network:
    """Returns the network of ``x -> first(second(x))``.

    `second` sees the moving image warped by `first`; its map acts on a point first.

    References:
      Greer et al., ICON, ICCV 2021; Tian et al., GradICON, CVPR 2023, section 3.4.
    """

    def run(moving, fixed):
        outer = first(moving, fixed)
        warped = fields.warp(moving, outer.on_grid(moving.shape[1:4]))
        inner = second(warped, fixed)
        return inner.then(outer)

    return run
