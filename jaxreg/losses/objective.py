"""Objectives: the weighted sum that training and instance optimisation minimise.

    loss = w_ic * inverse consistency + S(moving o T, fixed) + S(fixed o T', moving)
           + w_dice * dice + w_smooth * smoothness
           + w_ort * orthogonality + w_task * task similarity

with T the forward transform (fixed to moving points) and T' the backward one, without
whose terms an objective of one direction goes. The last two terms are a prompt bank's.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxreg.errors import UserError
from jaxreg.losses import overlap, regularity, similarity
from jaxreg.space import fields, sampling
from jaxreg.space.grid import unit_scale
from jaxreg.space.transform import Transform
from jaxreg.typing import Image, Labels, Pair, Points

_OPTIONAL = MappingProxyType(
    {
        "dice": "dice_weight",
        "smoothness": "smoothness_weight",
        "orthogonality": "orthogonality_weight",
        "task_similarity": "task_weight",
    }
)
"""Parts that are there only with a weight, and the weight's name."""
_WEIGHTS = ("inverse_consistency_weight", *_OPTIONAL.values())
_SHARE = "pairs with "


def as_compared(pair: Pair) -> Pair:
    """Returns the pair with its images as the similarity compares them, N D H W C.

    Each is clipped to `Pair.similarity_range`, whose ends become 0 and 1. Outside an
    image's grid lies then the value of the range's lower end: air in CT.
    """
    if pair.similarity_range is None:
        return pair
    low, high = (pair.similarity_range[:, i, None, None, None, None] for i in (0, 1))

    def cut(image):
        return None if image is None else jnp.clip((image - low) / (high - low), 0, 1)

    names = ("moving", "fixed", "moving_target", "fixed_target")
    images = {name: cut(getattr(pair, name)) for name in names}
    return dataclasses.replace(pair, **images, similarity_range=None)


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimised, uniGradICON's loss by default; call it on two transforms.

    Hashable if its options are, so it can be a static argument of a jitted function.

    Attributes:
      similarity: a name in `similarity.SIMILARITIES`.
      similarity_options: (name, value) pairs passed on to it, such as ("sigma", 5);
        "sigma=5" on the command line.
      inverse_consistency_weight: the paper's lambda.
      dice_weight: 0 leaves the Dice term out.
      smoothness_weight: of `regularity.smoothness`, in voxels; `Pair.smoothness` takes
        its place.
      orthogonality_weight: of the model's auxiliary "orthogonality".
      task_weight: of the model's auxiliary "task_similarity".
      directions: "forward" scores moving onto fixed alone; then there can be no inverse
        consistency.
      loss_masking: similarity counts only inside the target's mask.
      intensity_conservation: multiply the warped image by the Jacobian determinant
        (mass conservation, for CT of the lung).
      original_conservation_offset: the determinant belongs to voxels ``[1:, 1:, 1:]``;
        the original multiplies it onto voxels ``[:-1, :-1, :-1]``, one voxel off on
        each axis. True reproduces that, False puts it where it belongs.
      stride: see `regularity.gradicon_points`; 2 sparse, 1 dense.
      noise_scale: see `regularity.gradicon_points`; 2 sparse, 1 dense.
      outside: how images are warped outside their grid: "zeros" in unigradicon, "edge"
        in the generic losses of icon_registration. One-hot labels and target images
        (`Pair.moving_target`) are always warped with "edge", as the original does, so
        passing a target image changes the rule.
    """

    similarity: str = "lncc"
    similarity_options: tuple[tuple[str, Any], ...] = ()
    inverse_consistency_weight: float = 1.5
    dice_weight: float = 0.0
    smoothness_weight: float = 0.0
    orthogonality_weight: float = 0.0
    task_weight: float = 0.0
    directions: Literal["both", "forward"] = "both"
    loss_masking: bool = False
    intensity_conservation: bool = False
    original_conservation_offset: bool = True
    stride: int = 2
    noise_scale: float = 2.0
    outside: Literal["zeros", "edge"] = "zeros"

    def __post_init__(self):
        """Checks the choices.

        Raises:
          UserError: an unknown similarity, an option that it does not take, or a
            negative weight.
        """
        if self.similarity not in similarity.SIMILARITIES:
            raise UserError(
                f"unknown similarity {self.similarity!r}; choose one of "
                f"{', '.join(similarity.SIMILARITIES)}"
            )
        for name in _WEIGHTS:
            if not getattr(self, name) >= 0:
                raise UserError(f"{name} is {getattr(self, name)}, it must be >= 0")
        if self.directions == "forward" and self.inverse_consistency_weight > 0:
            raise UserError(
                "inverse consistency needs both directions; set "
                "inverse_consistency_weight to 0 or directions to both"
            )
        _check_options(self.similarity, self.similarity_options)

    def __call__(
        self,
        forward: Transform,
        backward: Transform | None,
        pair: Pair,
        noise: Points,
        *,
        aux: Mapping[str, jax.Array] = MappingProxyType({}),
        axis: str | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the loss and its parts.

        Args:
          forward: fixed to moving points, unit.
          backward: moving to fixed points, unit; ignored, and may be None, where only
            the forward direction counts.
          pair: the images and what else the chosen terms need.
          noise: standard normal, 1 D H W 3, see `regularity.gradicon_points`.
          aux: auxiliary values of the model, one entry per pair.
          axis: name of the mapped axis (pmap, shard_map) over which the batch is split,
            if it is. Everything returned is then of the whole batch.

        Returns:
          (loss, parts) with the scalars "loss", "inverse_consistency" and
          "similarity" (both unweighted), "transform_magnitude" (mean squared
          displacement of forward, unit), "folds" (voxels where the backward map's
          Jacobian determinant is negative, per sample; the forward map's in one
          direction) and, with a weight, "dice", "smoothness", "orthogonality" and
          "task_similarity" (unweighted, the first two of all directions).

        Raises:
          UserError: a mask, a label map or an auxiliary value that the objective needs
            is missing.

        References:
          unigradicon 1.0.6, __init__.py: GradientICONSparse.forward.
        """
        _check_pair(self, pair)
        grid = sampling.identity(pair.fixed.shape[1:4])
        to_moving, to_fixed, consistency = self._maps(forward, backward, grid, noise)
        alike = _similarity(self, pair, to_moving, to_fixed, axis)
        parts = {
            "inverse_consistency": consistency,
            "similarity": alike,
            "transform_magnitude": jnp.mean((grid - to_moving) ** 2),
            "folds": _folds(to_moving if to_fixed is None else to_fixed),
        }
        loss = self.inverse_consistency_weight * consistency + alike
        optional, weighted = self._optional_terms(pair, to_moving, to_fixed, aux, axis)
        loss = sum(weighted, loss)
        parts = {"loss": loss, **parts, **optional}
        if axis is not None:
            parts = jax.lax.pmean(parts, axis)
        return parts["loss"], parts

    def _maps(
        self, forward: Transform, backward: Transform | None, grid: Points, noise
    ) -> tuple[Points, Points | None, jax.Array]:
        """Returns where each direction maps the voxels, and `regularity.gradicon`."""
        map_forward = _mapper(forward)
        to_moving = map_forward(grid)
        if self.directions == "forward":
            return to_moving, None, jnp.zeros(())
        assert backward is not None  # the caller's promise
        map_backward = _mapper(backward)
        to_fixed = map_backward(grid)
        points = regularity.gradicon_points(
            grid.shape[1:4], noise, stride=self.stride, noise_scale=self.noise_scale
        )
        consistency = regularity.gradicon(map_forward, map_backward, points)
        return to_moving, to_fixed, consistency

    def _optional_terms(
        self,
        pair: Pair,
        to_moving: Points,
        to_fixed: Points | None,
        aux: Mapping[str, jax.Array],
        axis: str | None,
    ) -> tuple[dict[str, jax.Array], list[jax.Array]]:
        """Returns the optional parts by name, and what each adds to the loss."""
        parts, weighted = {}, []
        if self.dice_weight > 0:
            parts["dice"] = _dice(pair, to_moving, to_fixed, axis)
        if _has("smoothness", self, pair):
            each = _smoothness(to_moving, to_fixed)
            parts["smoothness"] = jnp.mean(each)
            own = pair.smoothness
            weight = self.smoothness_weight if own is None else own
            weighted.append(jnp.mean(weight * each))
        for name in ("orthogonality", "task_similarity"):
            if _has(name, self, pair):
                parts[name] = _mean_of(aux, name)
        weighted += [
            getattr(self, weight) * parts[name]
            for name, weight in _OPTIONAL.items()
            if name in parts and name != "smoothness"  # whose weight may be a pair's
        ]
        return parts, weighted


@dataclasses.dataclass(frozen=True)
class TaskObjective:
    """Several objectives in one batch, each pair scored by its own task's.

    Attributes:
      objectives: `Pair.objective` is an index into them.
    """

    objectives: tuple[Objective, ...]

    @property
    def directions(self) -> Literal["both", "forward"]:
        """Both, unless no objective uses the backward transform."""
        several = {objective.directions for objective in self.objectives}
        return "both" if "both" in several else "forward"

    def __call__(
        self,
        forward: Transform,
        backward: Transform | None,
        pair: Pair,
        noise: Points,
        *,
        aux: Mapping[str, jax.Array] = MappingProxyType({}),
        axis: str | None = None,
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Returns the mean loss and its parts; arguments as `Objective`.

        Pairs are scored one by one, so only a pair's own objective is computed. Parts
        that only some objectives have are means over the pairs that have them.

        Raises:
          ValueError: the pair has no index of its objective.
          UserError: see `Objective`.
        """
        if pair.objective is None:
            raise ValueError("TaskObjective needs Pair.objective, the pair has none")
        optional = [
            name
            for name in _OPTIONAL
            if any(_has(name, objective, pair) for objective in self.objectives)
        ]

        def scored_by(objective):
            def score(forward, backward, pair, aux):
                _, parts = objective(forward, backward, pair, noise, aux=aux)
                for name in optional:
                    parts[_SHARE + name] = jnp.float32(name in parts)
                    parts.setdefault(name, jnp.float32(0))
                return parts

            return score

        def score_one(sample):
            one = jax.tree.map(lambda leaf: leaf[None], sample)
            branches = [scored_by(objective) for objective in self.objectives]
            return jax.lax.switch(sample[2].objective, branches, *one)

        scores = jax.lax.map(score_one, (forward, backward, pair, dict(aux)))
        parts = jax.tree.map(jnp.mean, scores)
        if axis is not None:
            parts = jax.lax.pmean(parts, axis)
        for name in optional:
            share = parts.pop(_SHARE + name)
            parts[name] = parts[name] / jnp.maximum(share, 1e-12)
        return parts["loss"], parts


def _check_options(name: str, options: tuple[tuple[str, Any], ...]) -> None:
    taken = {
        parameter.name: parameter.default
        for parameter in inspect.signature(
            similarity.SIMILARITIES[name]
        ).parameters.values()
        # The mask and the mapped axis are the caller's, not options.
        if parameter.kind is parameter.KEYWORD_ONLY
        and parameter.name not in ("mask", "axis")
    }
    for option, value in options:
        if option not in taken:
            known = f", only {', '.join(taken)}" if taken else ""
            better = [f"{first}={default}" for first, default in taken.items()][:1]
            raise UserError(
                f"similarity {name} takes no option {option}{known}; give "
                f"`objective.similarity_options` {' or '.join([*better, 'None'])}"
            )
        if option == "intensity_range":
            fits, expected = _increasing(value), "two numbers, the lower first"
        elif option == "window":
            fits = _odd(value)
            expected = "an odd number of voxels, or one for each of three axes"
        else:
            least = 4 if option == "bins" else 1  # a window of nmi spans four bins
            fits = type(value) is int and value >= least
            expected = f"a whole number of at least {least}"
        if not fits:
            raise UserError(
                f"option {option} of similarity {name} is {value!r}, expected "
                f"{expected}"
            )


def _increasing(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(number, int | float) for number in value)
        and value[0] < value[1]
    )


def _odd(value: Any) -> bool:
    edges = value if isinstance(value, tuple) else (value,) * 3
    whole = all(type(edge) is int and edge > 0 for edge in edges)
    return whole and len(edges) == 3 and all(edge % 2 for edge in edges)


def _check_pair(objective: Objective, pair: Pair) -> None:
    if objective.loss_masking and (pair.moving_mask is None or pair.fixed_mask is None):
        raise UserError(
            "loss masking needs a mask of the moving and of the fixed image; pass both "
            "or switch loss masking off"
        )
    if objective.dice_weight > 0 and (
        pair.moving_onehot is None or pair.fixed_onehot is None
    ):
        raise UserError(
            f"a Dice weight of {objective.dice_weight} needs a segmentation of the "
            "moving and of the fixed image; pass both or set the weight to 0"
        )


def _mapper(transform: Transform) -> Callable[[jax.Array], jax.Array]:
    return lambda points: jnp.asarray(transform.map_points(points))


def _folds(points: Points) -> jax.Array:
    # Without a scale: the sign is all that counts, and the original has none.
    determinant = fields.jacobian_determinant(points, spacing=(1.0, 1.0, 1.0))
    return jnp.sum(determinant < 0) / points.shape[0]


def _similarity(
    objective: Objective,
    pair: Pair,
    to_moving: Points,
    to_fixed: Points | None,
    axis: str | None,
) -> jax.Array:
    """All directions; each mask is that of the image compared with."""
    pair = as_compared(pair)
    moving, fixed, outside = pair.moving, pair.fixed, objective.outside
    options = dict(objective.similarity_options)
    if objective.similarity in ("mind", "box_ncc"):  # others: one sample at a time
        options["axis"] = axis
    if pair.moving_target is not None or pair.fixed_target is not None:
        outside = "edge"
        moving = moving if pair.moving_target is None else pair.moving_target
        fixed = fixed if pair.fixed_target is None else pair.fixed_target

    def one_way(image: Image, points: Points, target: Image, mask: Labels | None):
        warped = fields.warp(image, points, outside=outside)
        if objective.intensity_conservation:
            quirk = objective.original_conservation_offset
            cells = slice(None, -1) if quirk else slice(1, None)
            inside = (slice(None), cells, cells, cells)
            determinant = fields.jacobian_determinant(points)[..., None]
            warped, target = warped[inside] * determinant, target[inside]
            mask = None if mask is None else mask[inside]
        return similarity.SIMILARITIES[objective.similarity](
            warped, target, mask=mask, **options
        )

    masks = (
        (pair.fixed_mask, pair.moving_mask) if objective.loss_masking else (None, None)
    )
    alike = one_way(moving, to_moving, fixed, masks[0])
    if to_fixed is None:
        return alike
    return alike + one_way(fixed, to_fixed, moving, masks[1])


def _dice(
    pair: Pair, to_moving: Points, to_fixed: Points | None, axis: str | None
) -> jax.Array:
    moving, fixed = pair.moving_onehot, pair.fixed_onehot
    assert moving is not None and fixed is not None  # _check_pair
    loss = overlap.dice_loss(
        fields.warp(moving, to_moving), fixed, pair.valid, axis=axis
    )
    if to_fixed is None:
        return loss
    warped = fields.warp(fixed, to_fixed)
    return loss + overlap.dice_loss(warped, moving, pair.valid, axis=axis)


def _has(name: str, objective: Objective, pair: Pair) -> bool:
    """Whether a part that is optional is there."""
    own = name == "smoothness" and pair.smoothness is not None
    return own or getattr(objective, _OPTIONAL[name]) > 0


def _smoothness(*maps: Points | None) -> jax.Array:
    """Of all directions, for each pair."""

    def one(points):
        d, h, w, _ = points.shape
        moved = points[None] - sampling.identity((d, h, w))
        scale = unit_scale((d, h, w))[None, None, None, None]
        return regularity.smoothness(moved * scale)

    return sum(
        (jax.vmap(one)(points) for points in maps if points is not None),
        jnp.zeros(()),
    )


def _mean_of(aux: Mapping[str, jax.Array], name: str) -> jax.Array:
    if name not in aux:
        raise UserError(
            f"the objective has a weight for {name}, which this network does not give; "
            "set the weight to 0, or take a network with a prompt bank and pairs with "
            "a task"
        )
    return jnp.mean(aux[name])
