"""PromptReg and RDP in PyTorch, from its own layers, for benchmarks to run against.

Not the released program, which cannot be installed: the same network and losses written
with PyTorch's layers as its authors would (grid_sample, instance_norm, avg_pool3d), in
the released form, on a state dictionary of the released names. A dictionary without
prompts is RDP. Coordinates are float32 whatever the features are (autocast).

References:
  Xie et al., PromptReg, MICCAI 2025, section 2.
"""

from collections.abc import Mapping

import torch
from torch.nn import functional

State = Mapping[str, torch.Tensor]
Tensor = torch.Tensor
_PASSES = {3: 2, 2: 3, 1: 1}
_NEIGHBOURS = (
    (-1, 0, 0), (0, 0, -1), (0, -1, 0), (0, 0, 1), (1, 0, 0), (0, 1, 0)
)  # fmt: skip
_EDGES = (
    (1, 0), (2, 0), (2, 1), (3, 0), (3, 2), (4, 1),
    (4, 2), (4, 3), (5, 0), (5, 1), (5, 3), (5, 4),
)  # fmt: skip


def conv(state: State, name: str, x: Tensor, stride: int = 1) -> Tensor:
    """A convolution of the state dictionary; same size at stride 1."""
    weight = state[f"{name}.weight"]
    padding = weight.shape[-1] // 2
    return functional.conv3d(x, weight, state[f"{name}.bias"], stride, padding)


def norm(x: Tensor, slope: float) -> Tensor:
    """Instance normalisation and leaky ReLU."""
    return functional.leaky_relu(functional.instance_norm(x), slope)


def block(state: State, name: str, x: Tensor) -> Tensor:
    """Convolution, normalisation, leaky ReLU."""
    return norm(conv(state, name, x), 0.01)


def blocks(state: State, name: str, *parts: Tensor) -> Tensor:
    """Two blocks on a concatenation."""
    x = block(state, f"{name}.0.conv", torch.cat(parts, 1))
    return block(state, f"{name}.1.conv", x)


def up(state: State, name: str, x: Tensor) -> Tensor:
    """Transposed convolution to twice the size."""
    weight, bias = state[f"{name}.upconv.weight"], state[f"{name}.upconv.bias"]
    return norm(functional.conv_transpose3d(x, weight, bias, 2, 1), 0.1)


def voxels(field: Tensor) -> Tensor:
    """Where a displacement in voxels leads: p + field(p), N 3 D H W, float32."""
    sizes = field.shape[2:]
    axes = [torch.arange(n, dtype=torch.float32, device=field.device) for n in sizes]
    return torch.stack(torch.meshgrid(axes, indexing="ij")) + field


def warp(x: Tensor, field: Tensor, outside: str = "zeros") -> Tensor:
    """Samples at p + field(p), voxels; `outside` is grid_sample's padding mode."""
    places, sizes = voxels(field), field.shape[2:]
    unit = [places[:, i] * (2 / max(n - 1, 1)) - 1 for i, n in enumerate(sizes)]
    last_first = torch.stack(unit[::-1], -1)
    return functional.grid_sample(
        x, last_first, padding_mode=outside, align_corners=True
    )


def compose(field: Tensor, step: Tensor) -> Tensor:
    """The displacement of the field after the step."""
    return step + warp(field, step)


def integrate(velocity: Tensor) -> Tensor:
    """Scaling and squaring, seven times."""
    field = velocity / 2**7
    for _ in range(7):
        field = compose(field, field)
    return field


def encode(state: State, name: str, image: Tensor) -> list[Tensor]:
    """Features at four resolutions, finest first."""
    features = [block(state, f"{name}.conv0.conv", image)]
    for level in (1, 2, 3):
        x = conv(state, f"{name}.conv{level}.0", features[-1], 2)
        y = conv(state, f"{name}.conv{level}.1.block.2", norm(x, 0.1))
        features.append(norm(x + y, 0.1))
    return features


def prompt(state: State, x: Tensor, task: int) -> tuple[Tensor, Tensor, Tensor]:
    """The prompt and the two auxiliary losses, released form."""
    name = "prompt_generator"
    bank, template = state[f"{name}.static_prompt"], state[f"{name}.prompt_template"]
    template = template.expand_as(x)
    dynamic = block(state, f"{name}.dynamic_fusion.0", torch.cat([x, template], 1))
    dynamic = block(state, f"{name}.dynamic_fusion.3", dynamic)
    rows = bank.flatten(1)
    alike = functional.cosine_similarity(dynamic.flatten(1)[:, None], rows[None], 2)
    weights = torch.softmax(alike / 0.5, 1)
    weighted = (weights @ rows).view_as(x)
    processed = block(state, f"{name}.conv.0", weighted)
    joined = block(state, f"{name}.fusion.0", torch.cat([dynamic, processed], 1))
    joined = block(state, f"{name}.fusion.3", joined)
    vector = joined.mean((2, 3, 4))
    for layer in ("v", "proj"):
        layer = f"{name}.cross_attention.{layer}"
        vector = functional.linear(
            vector, state[f"{layer}.weight"], state[f"{layer}.bias"]
        )
    unit = functional.normalize(rows)
    identity = torch.eye(len(rows), device=rows.device)
    orthogonality = torch.linalg.norm(unit @ unit.T - identity)
    own = functional.cosine_similarity(processed.flatten(1), rows[task : task + 1])
    return (
        vector[:, :, None, None, None].expand_as(x),
        orthogonality,
        ((1 - own) ** 2).mean(),
    )


def is_prompted(state: State) -> bool:
    """Whether it is PromptReg's, not RDP's."""
    return "prompt_generator.static_prompt" in state


def network(
    state: State, moving: Tensor, fixed: Tensor, task: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the field in voxels and the two auxiliary losses.

    Args:
      state: see the module.
      moving: N 1 D H W.
      fixed: N 1 D H W.
      task: the bank's row of all pairs.
    """
    m = encode(state, "encoder_moving", moving)
    f = encode(state, "encoder_fixed", fixed)
    x = blocks(state, "cconv_4", f[3], m[3])
    orthogonality = task_loss = x.new_zeros(())
    if is_prompted(state):
        made, orthogonality, task_loss = prompt(state, x, task)
        x = blocks(state, "prompt_fusion_layer", x, made)
    field = integrate(conv(state, "defconv4", x))
    x = blocks(state, "dconv4", f[3], warp(m[3], field), x)
    step = integrate(conv(state, "defconv4", x))
    for level in (3, 2, 1):
        decoded = up(state, f"upconv{level}", x)
        field = functional.interpolate(
            2 * compose(field, step),
            scale_factor=2,
            mode="trilinear",
            align_corners=True,
        )
        for number in range(_PASSES[level]):
            if number:
                field = compose(field, step)
                decoded = block(state, f"dconv{level}.conv", x)
            warped = warp(m[level - 1], field)
            x = blocks(state, f"cconv_{level}.conv", f[level - 1], warped, decoded)
            step = integrate(conv(state, f"defconv{level}", x))
    return compose(field, step), orthogonality, task_loss


def mind(x: Tensor) -> Tensor:
    """MIND-SSC, radius 2, dilation 2: N 12 D H W."""
    padded = functional.pad(x, (2,) * 6, mode="replicate")
    d, h, w = x.shape[2:]
    shifted = [
        padded[:, :, 2 + 2 * a :, 2 + 2 * b :, 2 + 2 * c :][:, :, :d, :h, :w]
        for a, b, c in _NEIGHBOURS
    ]
    differences = torch.cat([(shifted[a] - shifted[b]) ** 2 for a, b in _EDGES], 1)
    padded = functional.pad(differences, (2,) * 6, mode="replicate")
    distance = functional.avg_pool3d(padded, 5, 1)
    distance = distance - distance.amin(1, keepdim=True)
    variance = distance.mean(1, keepdim=True)
    mean = variance.mean().detach()
    return torch.exp(-distance / variance.clamp(mean * 0.001, mean * 1000))


def rough(field: Tensor) -> Tensor:
    """Mean squared forward difference of a displacement, over all axes."""
    per_axis = [(field.diff(dim=axis) ** 2).mean() for axis in (2, 3, 4)]
    return torch.stack(per_axis).mean()


def loss(state: State, moving: Tensor, fixed: Tensor, task: int = 0) -> Tensor:
    """The training loss: MIND, smoothness and the two prompt terms."""
    field, orthogonality, task_loss = network(state, moving, fixed, task)
    alike = ((mind(warp(moving, field)) - mind(fixed)) ** 2).mean()
    return alike + 0.1 * rough(field) + 0.001 * orthogonality + 0.001 * task_loss
