"""UniReg in PyTorch, from its own layers, for benchmarks to run against.

Not the released program, which cannot be installed. `pyramid` is the released
UniReg-RPN on a state dictionary of the released names; `network` the paper's UniReg
with MIND descriptors in place of SAM's embeddings, whose weights nobody released, on
a dictionary of jaxreg's own names (`state_of`). Both are written with PyTorch's layers
as its authors would (grid_sample, group_norm, grouped convolutions for the layers that
are made for each pair).

References:
  Li et al., UniReg, 2025; its released code for the pyramid; Tian et al., SAME++,
  2023, for the U-Net and the correlation.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pytorch_promptreg import State, Tensor, mind, rough, warp
from torch.nn import functional

_HIDDEN = 8
_HEAD_SLOPE = 0.2
_LEVELS = (4, 3, 2, 1)


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution of the state dictionary; same size at stride 1."""
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2
    return functional.conv3d(x, weight, state[f"{name}.bias"], stride, padding)


def dynamic_head(x: Tensor, parameters: Tensor) -> Tensor:
    """Three 1x1x1 layers of each pair's own weights, N D H W of 3 channels.

    Args:
      x: N C D H W.
      parameters: a row per pair, W1 W2 W3 b1 b2 b3, kernels by rows of outputs.
    """
    n, inputs = x.shape[:2]
    widths = [(inputs, _HIDDEN), (_HIDDEN, _HIDDEN), (_HIDDEN, 3)]
    sizes = [i * o for i, o in widths] + [o for _, o in widths]
    parts = parameters.split(sizes, 1)
    y = x.reshape(1, n * inputs, *x.shape[2:])
    for index, (i, o) in enumerate(widths):
        kernel = parts[index].reshape(n * o, i, 1, 1, 1)
        y = functional.conv3d(y, kernel, parts[index + 3].reshape(-1), groups=n)
        if index < 2:
            y = functional.leaky_relu(y, _HEAD_SLOPE)
    return y.reshape(n, 3, *x.shape[2:])


def controlled(state: State, name: str, condition: Tensor) -> Tensor:
    """What the controller makes of a condition, N K: a row of head weights."""
    made = conv(state, f"{name}.controller", condition[:, :, None, None, None])
    return made.flatten(1)


# --- the released pyramid -------------------------------------------------------------


def encode(state: State, image: Tensor) -> list[Tensor]:
    """Features at four resolutions, finest first."""
    found = []
    x = image
    for level in (1, 2, 3, 4):
        x = conv(state, f"encoder.block{level}.main", x)
        found.append(functional.leaky_relu(x, 0.1))
        x = functional.avg_pool3d(found[-1], 2)
    return found


def decode(state: State, level: int, moving: Tensor, fixed: Tensor, known: Tensor):
    """One level's displacement in its voxels."""
    name = f"decoder{level}"
    x = torch.cat([moving, fixed], 1)
    x = functional.leaky_relu(conv(state, f"{name}.Conv1.main", x), 0.1)
    for index in (2, 3):
        y = conv(state, f"{name}.Conv{index}.main", x)
        x = functional.leaky_relu(x + y, 0.1)
    x = conv(state, f"{name}.Conv4", x)
    head = f"{name}.dynamic_flow"
    groups = next(g for g in (8, 4, 2, 1) if x.shape[1] % g == 0)
    scale, shift = state[f"{head}.gap.0.weight"], state[f"{head}.gap.0.bias"]
    pooled = functional.relu(functional.group_norm(x, groups, scale, shift))
    condition = torch.cat([pooled.mean((2, 3, 4)), known], 1)
    return dynamic_head(x, controlled(state, head, condition))


def pyramid(state: State, moving: Tensor, fixed: Tensor, known: Tensor) -> Tensor:
    """Returns the released pyramid's field in voxels, N 3 D H W.

    Args:
      state: of the released names.
      moving: N 1 D H W.
      fixed: N 1 D H W.
      known: type and region of each pair, one-hot, N 8.
    """
    m, f = encode(state, moving), encode(state, fixed)
    field = decode(state, 4, m[3], f[3], known)
    for level in _LEVELS[1:]:
        field = functional.interpolate(
            2 * field, scale_factor=2, mode="trilinear", align_corners=True
        )
        warped = warp(m[level - 1], field, "border")
        step = decode(state, level, warped, f[level - 1], known)
        field = warp(field, step, "border") + step
    return field


def box_ncc(warped: Tensor, fixed: Tensor, window: int = 9) -> Tensor:
    """Minus the mean squared correlation in boxes of voxels, zeros beyond the image.

    By average pooling, which is quicker than convolution with a kernel of ones.
    """
    count = window**3

    def total(x: Tensor) -> Tensor:
        return count * functional.avg_pool3d(x, window, 1, window // 2)

    i, j = warped.float(), fixed.float()
    sum_i, sum_j = total(i), total(j)
    cross = total(i * j) - sum_i * sum_j / count
    variances = (total(i * i) - sum_i**2 / count) * (total(j * j) - sum_j**2 / count)
    return -(cross**2 / (variances + 1e-5)).mean()


def pyramid_loss(state: State, moving: Tensor, fixed: Tensor, known: Tensor) -> Tensor:
    """The loss of configs/unireg_rpn.py: box NCC and smoothness."""
    field = pyramid(state, moving, fixed, known)
    return box_ncc(warp(moving, field), fixed) + rough(field)


# --- the paper's network --------------------------------------------------------------


def state_of(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns jaxreg's variables of `models.unireg.paper` as PyTorch's tensors.

    Names are the modules' with dots between them; kernels become O I D H W.
    """
    state = {}

    def walk(tree, path):
        for name, leaf in tree.items():
            if isinstance(leaf, Mapping):
                walk(leaf, (*path, name))
            elif name == "kernel":
                state[".".join((*path, "weight"))] = np.transpose(leaf, (4, 3, 0, 1, 2))
            else:
                state[".".join((*path, name))] = np.asarray(leaf)

    walk(variables["params"], ())
    return state


@torch.no_grad()
def descriptors(image: Tensor) -> tuple[Tensor, Tensor]:
    """MIND of length 1 per voxel, at 2 x 2 x 2 and at 4 x 16 x 16 voxels."""
    halved = functional.avg_pool3d(image, 2)
    # One by one, since the descriptor's floor follows its batch.
    fine = torch.cat([mind(one) for one in halved.split(1)])
    coarse = functional.avg_pool3d(fine, (2, 8, 8))
    return functional.normalize(fine), functional.normalize(coarse)


@torch.no_grad()
def correlation(source: Tensor, target: Tensor) -> Tensor:
    """Cosine of each target voxel and the source's 27 around it, N 27 D H W."""
    d, h, w = target.shape[2:]
    around = functional.pad(source, (1,) * 6, mode="replicate")
    found = [
        functional.cosine_similarity(
            around[:, :, a : a + d, b : b + h, c : c + w], target, 1, 1e-4
        )
        for a in range(3)
        for b in range(3)
        for c in range(3)
    ]
    return torch.stack(found, 1)


def matched(moving: Tensor, fixed: Tensor) -> Tensor:
    """Fine and coarse correlation of two images' descriptors, added."""
    source, target = descriptors(moving), descriptors(fixed)
    coarse = functional.interpolate(
        correlation(source[1], target[1]),
        target[0].shape[2:],
        mode="trilinear",
        align_corners=True,
    )
    return correlation(source[0], target[0]) + coarse


def network(state: State, moving: Tensor, fixed: Tensor, known: Tensor) -> Tensor:
    """Returns the paper's field in voxels, N 3 D H W: strided form, MIND, MR.

    Args:
      state: see `state_of`.
      moving: N 1 D H W, [0, 1].
      fixed: N 1 D H W, [0, 1].
      known: region and type of each pair, one-hot, N 6.
    """

    def layer(name: str, *parts: Tensor, stride: int = 1) -> Tensor:
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return functional.leaky_relu(
            conv(state, f"unet.{name}.conv", x, stride), _HEAD_SLOPE
        )

    def doubled(x: Tensor) -> Tensor:
        return functional.interpolate(x, scale_factor=2)

    e0 = layer("encoder_0", 2 * moving - 1, 2 * fixed - 1)
    x = layer("halve", e0, stride=2)
    e1 = layer("encoder_1", x, matched(moving, fixed))
    e2 = layer("encoder_2", e1, stride=2)
    e3 = layer("encoder_3", e2, stride=2)
    x = layer("decoder_0", e3, stride=2)
    for index, skip in enumerate((e3, e2, e1), start=1):
        x = layer(f"decoder_{index}", doubled(x), skip)
    x = layer("remaining_0", doubled(x), e0)
    x = layer("remaining_2", layer("remaining_1", x))
    x = functional.leaky_relu(conv(state, "embedding.conv", x), _HEAD_SLOPE)
    condition = torch.cat([x.mean((2, 3, 4)), known], 1)
    return dynamic_head(x, controlled(state, "head", condition))


def network_loss(state: State, moving: Tensor, fixed: Tensor, known: Tensor) -> Tensor:
    """The loss of configs/unireg.py without its Dice term: NCC and smoothness."""
    field = network(state, moving, fixed, known)
    axes = (2, 3, 4)

    def normalised(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / centred.square().mean(axes, keepdim=True).sqrt()

    alike = (normalised(warp(moving, field)) * normalised(fixed)).mean()
    return 1 - alike + rough(field)
