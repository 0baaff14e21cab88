"""Names of the arrays that travel between the rooms.

Axes: N batch, D H W the array axes 0, 1, 2 of a volume (NIfTI's k, j, i), C channel,
P points. Component i of a coordinate or displacement moves along array axis i.
Coordinates are *unit*: 0 is the centre of an axis' first voxel, 1 of its last.

An axis with an underscore may have another size in each argument and result: a function
that resizes has two of each.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

Image = Float[Array, "_N _D _H _W _C"]
"""Intensities, [0, 1] after preprocessing."""
Labels = Shaped[Array, "_N _D _H _W _C"]
"""Integer label maps or masks."""
Field = Float[Array, "_N _D _H _W 3"]
"""Displacement in unit coordinates."""
Points = Float[Array, "_N *_P 3"]
"""Unit coordinates; N is 1 where one set of points serves the whole batch."""
Key = PRNGKeyArray
"""A key from jax.random.key."""
Variables = Mapping[str, Any]
"""Flax variables: {"params": tree} and, for batch norm, {"batch_stats": tree}."""


@dataclasses.dataclass(frozen=True)
class Batching:
    """What the batch that a network sees is made of; batch norm's statistics follow it.

    Attributes:
      calls: the batch is this many calls of the network, end to end. Each is
        normalised by its own statistics, and the running ones move once per call, in
        order: the same numbers as separate calls.
      replicas: 0 takes a call's statistics over its whole batch (over `axis` too, the
        global batch). A positive number splits each call into that many replicas with
        statistics of their own, as on as many GPUs under PyTorch's DataParallel; the
        running statistics take the replicas' average.
      mirrored: of two calls, the second has the first's moving and fixed images
        exchanged: what depends on one image alone is known from the first.
      axis: the name of the mapped axis (pmap, shard_map) over which the batch is split,
        None where this array is all of it.
      span: with one replica: the number of neighbouring devices that it spans.
    """

    calls: int = 1
    replicas: int = 0
    mirrored: bool = False
    axis: str | None = None
    span: int = 1

    def mean_over_devices(self, x: jax.Array) -> jax.Array:
        """Returns the mean over the mapped axis, if there is one."""
        return x if self.axis is None else jax.lax.pmean(x, self.axis)

    def sharers(self) -> int:
        """Returns how many devices share one set of statistics."""
        if self.axis is None:
            return 1
        return self.span if self.replicas else jax.lax.axis_size(self.axis)

    def mean_over_sharers(self, x: jax.Array) -> jax.Array:
        """Returns the mean over the devices that share one set of statistics."""
        if self.axis is None or self.sharers() == 1:
            return x
        if not self.replicas:
            return self.mean_over_devices(x)
        of_all = jax.lax.all_gather(x, self.axis)
        first = jax.lax.axis_index(self.axis) // self.span * self.span
        return jax.lax.dynamic_slice_in_dim(of_all, first, self.span).mean(0)


ONE_CALL = Batching()
"""The whole batch belongs to one call and lies on one device."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "moving",
        "fixed",
        "moving_mask",
        "fixed_mask",
        "moving_onehot",
        "fixed_onehot",
        "valid",
        "moving_target",
        "fixed_target",
        "task",
        "objective",
        "smoothness",
        "similarity_range",
    ],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Pair:
    """What a model and its objective see of two scans on the network grid.

    Attributes:
      moving: preprocessed image, N D H W C, [0, 1].
      fixed: the same for the fixed scan.
      moving_mask: where similarity counts (non-zero), N D H W 1.
      fixed_mask: the same for the fixed scan.
      moving_onehot: one channel per class of the Dice term, N D H W K, float.
      fixed_onehot: the same for the fixed scan.
      valid: classes that both members of a pair contain, N K, bool.
      moving_target: image for the similarity instead of `moving` (loss
        randomisation), N D H W C.
      fixed_target: the same for the fixed scan.
      task: number of each pair's task, N; its row in a bank of prompts.
      objective: which of several objectives each pair is trained by, N.
      smoothness: each pair's own weight of the smoothness term, N, in place of the
        objective's; shown to networks that are conditioned on it.
      similarity_range: the part of [0, 1] of each pair's images that the similarity
        compares, N 2: they are cut to it first; the whole of it if None.
    """

    moving: Image
    fixed: Image
    moving_mask: Labels | None = None
    fixed_mask: Labels | None = None
    moving_onehot: Image | None = None
    fixed_onehot: Image | None = None
    valid: Bool[Array, "N K"] | None = None
    moving_target: Image | None = None
    fixed_target: Image | None = None
    task: Int[Array, " N"] | None = None
    objective: Int[Array, " N"] | None = None
    smoothness: Float[Array, " N"] | None = None
    similarity_range: Float[Array, "N 2"] | None = None
