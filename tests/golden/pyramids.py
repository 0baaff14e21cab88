"""PromptReg and UniReg's pyramid for `generate.py`, by the networks of benchmarks/."""

import numpy as np
import torch
import torch.nn.functional as F

from jaxreg.weights.pytorch import promptreg as promptreg_lib
from jaxreg.weights.pytorch import unireg_rpn

PROMPTREG_GRADIENTS = (
    "prompt_generator.static_prompt",
    "encoder_moving.conv0.conv.weight",
    "defconv4.weight",
    "prompt_generator.cross_attention.v.weight",
    "upconv2.upconv.weight",
    "prompt_generator.prompt_template",
)
# Name in the file: the layer whose result it is.
PROMPTREG_BETWEEN = {
    "c4": "cconv_4.1.conv",
    "p_d": "prompt_generator.dynamic_fusion.3",
    "p_w_conv": "prompt_generator.conv.0",
    "p_fused": "prompt_generator.fusion.3",
    "c4_fused": "prompt_fusion_layer.1.conv",
}
HEADS = {"defconv4": 0.005, "defconv3": 0.008, "defconv2": 0.014, "defconv1": 0.035}
ITERATIONS, DELTA = 10, 0.005


def uniform(rng, shape):
    """PyTorch's own start: within 1 / sqrt(inputs of an output)."""
    bound = 1 / np.sqrt(np.prod(shape[1:]) if len(shape) > 1 else shape[0])
    return rng.uniform(-bound, bound, shape)


def tensors(state):
    return {k: torch.tensor(v, dtype=torch.float32) for k, v in state.items()}


def grouped(group, values):
    return {f"{group}/{name}": value for name, value in values.items()}


def recorded(module, names, run):
    """Runs with the results of these functions of (state, layer, ...) kept by layer."""
    own, kept = {name: getattr(module, name) for name in names}, {}

    def keeping(function):
        def call(state, layer, *rest):
            found = function(state, layer, *rest)
            kept.setdefault((function.__name__, layer), []).append(found)
            return found

        return call

    for name, function in own.items():
        setattr(module, name, keeping(function))
    try:
        return run(), kept
    finally:
        for name, function in own.items():
            setattr(module, name, function)


# --- PromptReg ------------------------------------------------------------------------


def promptreg_small(rng, scan, promptreg):
    """PromptReg as released, with what it computes on the way."""
    grid = tuple(int(n) for n in rng.permutation([3, 4, 5]))
    tasks, width = int(rng.integers(2, 6)), int(rng.integers(3, 6))
    sizes = promptreg_lib.Sizes(width, 1, tasks, grid)
    state = {}
    for entry in promptreg_lib.PROMPTREG.entries(sizes):
        key, shape = entry.key, entry.torch_shape
        state[key] = uniform(rng, shape)
        if key.split(".")[0] in HEADS:
            size = HEADS[key.split(".")[0]] if key.endswith("weight") else 0.02
            state[key] = rng.normal(0, size, shape)
        elif key.endswith("static_prompt"):
            offsets = rng.uniform(-0.05, 0.05, (tasks, 1, 1, 1, 1))
            state[key] = rng.uniform(-0.1, 0.1, shape) + offsets
        elif key.endswith("prompt_template"):
            state[key] = rng.normal(0, 0.5, shape)
    state, shape = tensors(state), tuple(8 * n for n in grid)
    moving, fixed = scan(rng, shape), scan(rng, shape)
    task = int(rng.integers(tasks))
    found = {
        "moving": moving, "fixed": fixed, "task_id": np.array(task),
        "channels": np.array(width), "task_total_number": np.array(tasks),
        "inshape": np.array(shape), **grouped("state", state),
    }  # fmt: skip
    (flow, orthogonality, alike), kept = recorded(
        promptreg,
        ("conv", "block"),
        lambda: promptreg.network(state, moving, fixed, task),
    )
    warped = promptreg.warp(moving, flow)
    mind = ((promptreg.mind(warped) - promptreg.mind(fixed)) ** 2).mean()
    between = {k: kept["block", v][0] for k, v in PROMPTREG_BETWEEN.items()}
    found |= between | {
        "flow": flow, "warped": warped, "orthogonal_loss": orthogonality,
        "classification_loss": alike, "mind_loss": mind,
        "grad3d_l2": promptreg.rough(flow),
        "prompt": promptreg.prompt(state, between["c4"], task)[0],
    }  # fmt: skip
    for head in HEADS:
        for index, velocity in enumerate(kept["conv", head]):
            found[f"velocity/{head}_{index}"] = velocity
    total = promptreg.loss(_leaves(state), moving, fixed, task)
    found["total_loss"] = total
    leaves = _leaves(state)
    promptreg.loss(leaves, moving, fixed, task).backward()
    found |= {f"grad/{k}": leaves[k].grad for k in PROMPTREG_GRADIENTS}
    return found | _paper_forms(state, between["p_d"], task, found)


def _leaves(state):
    return {k: v.clone().requires_grad_() for k, v in state.items()}


def _paper_forms(state, dynamic, task, found):
    """In float64, from the prompts and the dynamic one."""
    bank = state["prompt_generator.static_prompt"].double().flatten(1)
    unit, own = F.normalize(bank), F.normalize(dynamic.double().flatten(1))
    cosine = (unit @ own.T)[:, 0]
    products = bank @ bank.T
    derived = {
        "cosine": cosine,
        "orthogonality_raw_frobenius": torch.linalg.norm(
            products - torch.diag(torch.diag(products))
        ),
    }
    for tau in (0.1, 0.5):
        weights = torch.softmax(cosine / tau, 0)
        derived[f"task_weights_tau{tau}"] = weights
        weighted = F.normalize(weights @ bank, dim=0)
        derived[f"task_similarity_raw_tau{tau}"] = (1 - weighted @ unit[task]) ** 2
    found["task_weights"] = derived["task_weights_tau0.5"].float()[None]
    return grouped("derived", derived)


# --- UniReg's pyramid -----------------------------------------------------------------


def _unireg_state(rng):
    sizes = unireg_rpn.Sizes(8, 1, "dynamic", 6, 8)
    state = {}
    for entry in unireg_rpn.TABLE.entries(sizes):
        key, shape = entry.key, entry.torch_shape
        if key.endswith("gap.0.weight"):
            state[key] = rng.uniform(0.6, 1.4, shape)
        elif key.endswith("gap.0.bias"):
            state[key] = rng.normal(0, 0.25, shape)
        elif ".controller." in key:
            state[key] = rng.normal(0, 0.25, shape)
            # Rows of the last layer, W3 and b3: fields of a few voxels.
            state[key][-43:-19] *= 0.12
            state[key][-3:] *= 0.4
        else:
            state[key] = uniform(rng, shape)
    return state


def box_ncc(warped, fixed, window, mask=None):
    """Box NCC of the specification, zeros beyond the image, masked by local counts."""

    def total(x):
        padding = [n // 2 for n in window]
        mean = F.avg_pool3d(x, window, 1, padding)  # zeros counted
        return mean * float(np.prod(window))

    known = torch.ones_like(fixed) if mask is None else mask.float()
    count = torch.full_like(fixed, float(np.prod(window)))
    if mask is not None:
        count = total(known).clamp(min=1e-5)
    i, j = warped * known, fixed * known
    sum_i, sum_j = total(i), total(j)
    cross = total(i * j) - sum_i * sum_j / count
    var_i, var_j = total(i * i) - sum_i**2 / count, total(j * j) - sum_j**2 / count
    cc = cross**2 / (var_i * var_j + 1e-5)
    if mask is None:
        return -cc.mean()
    valid = (count >= 0.25 * float(np.prod(window))).float()
    return -(cc * valid).sum() / valid.sum().clamp(min=1)


def _cropped_roughness(field):
    squares = []
    for axis in (2, 3, 4):
        cut = [slice(None), slice(None)] + [
            slice(None) if a == axis else slice(0, -1) for a in (2, 3, 4)
        ]
        squares.append((field[tuple(cut)].diff(dim=axis) ** 2).mean())
    return sum(squares) / 3


def _determinants(field, differences):
    """Of p + field(p) in voxels, by forward differences or central ones."""
    f = field.double().numpy()
    columns = []
    for axis in (2, 3, 4):
        ends = (0, -1) if differences == "forward" else (1, -1)
        step = 1 if differences == "forward" else 2
        n = f.shape[axis]
        slope = (f.take(range(step, n), axis) - f.take(range(n - step), axis)) / step
        rest = [slice(None)] * 5
        for other in {2, 3, 4} - {axis}:
            rest[other] = slice(*ends)
        columns.append(slope[tuple(rest)])
    matrix = np.moveaxis(np.stack(columns, 1), (1, 2), (-1, -2))
    return np.linalg.det(np.eye(3) + matrix)


def _iterated(state, unireg, moving, fixed, known):
    """The iterative inference of one pair: field, counts, traces of correlation."""
    m, f = unireg.encode(state, moving), unireg.encode(state, fixed)
    up = {"mode": "trilinear", "align_corners": True}

    def judged(field, level):
        scale = 2 ** (level - 1)
        if scale > 1:
            field = F.interpolate(field * scale, scale_factor=scale, **up)
        a, b = unireg.warp(moving, field, "border"), fixed
        spread = a.std().clamp(min=1e-6) * b.std().clamp(min=1e-6)
        return float(((a - a.mean()) * (b - b.mean()) / spread).mean())

    def refined(field, level):
        warped = m[level - 1]
        if field is not None:
            warped = unireg.warp(warped, field, "border")
        step = unireg.decode(state, level, warped, f[level - 1], known)
        return step if field is None else unireg.warp(field, step, "border") + step

    field, counts, traces = None, [], {}
    for level in (4, 3, 2, 1):
        best, count, trace = 0.0, 0, []
        if level < 4:
            field = F.interpolate(2 * field, scale_factor=2, **up)
        for _ in range(ITERATIONS):
            before, tried = field, field
            if level == 4:
                tried = refined(field, 4)
            trace.append(judged(tried, level))
            if trace[-1] < best + DELTA and before is not None:
                break
            best, count = trace[-1], count + 1
            field = tried if level == 4 else refined(field, level)
        counts.append(count)
        traces[f"ncc_trace_l{level}"] = np.float32(trace)
    return field, counts, traces


def unireg_rpn_small(rng, scan, unireg):
    """UniReg as released: two pairs in one pass, and one with iterations."""
    shape = tuple(int(n) for n in 8 * rng.permutation([3, 4, 5]))
    state = tensors(_unireg_state(rng))
    moving, fixed = scan(rng, shape, 2), scan(rng, shape, 2)
    types = np.array([0, 1], np.int32)
    ids = rng.choice(6, 2, replace=False).astype(np.int32)

    def one_hot(rows):
        rows = np.concatenate([np.eye(2)[types], np.eye(6)[ids]], 1)[rows]
        return torch.tensor(rows, dtype=torch.float32)

    known, found = one_hot([0, 1]), {"task_type": types, "task_id": ids}
    own, levels = unireg.decode, []

    def decode(state, level, *rest):
        levels.append((level, own(state, level, *rest)))
        return levels[-1][1]

    unireg.decode = decode
    try:
        flow, kept = recorded(
            unireg, ("controlled",),
            lambda: unireg.pyramid(state, moving, fixed, known),
        )  # fmt: skip
    finally:
        unireg.decode = own
    found |= {f"inter/delta{n}": delta for n, delta in levels if n > 1}
    for level in (4, 3, 2, 1):
        row = kept["controlled", f"decoder{level}.dynamic_flow"][0]
        found[f"inter/params{level}"] = row
    for level, x in enumerate(unireg.encode(state, moving), start=1):
        found[f"inter/enc{level}_stats"] = torch.stack(
            [x.mean(), x.std(), *x.flatten()[:6]]
        )
    warped = unireg.warp(moving, flow, "border")
    forward, central = (_determinants(flow, d) for d in ("forward", "central"))
    threshold = 0.15
    found |= {
        **grouped("state", state), "moving": moving, "fixed": fixed, "flow": flow,
        "warped": warped,
        "flow_swapped_ids": unireg.pyramid(state, moving, fixed, one_hot([1, 0])),
        "loss/ncc9": box_ncc(warped, fixed, (9, 9, 9)),
        "loss/ncc_3_9_9": box_ncc(warped, fixed, (3, 9, 9)),
        f"loss/masked_ncc9_mask_fixed_gt_{threshold}": box_ncc(
            warped, fixed, (9, 9, 9), fixed > threshold
        ),
        "loss/grad_l2": _cropped_roughness(flow),
        "metric/fold_neg": np.int32((forward[0] < 0).sum()),
        "metric/fold_total": np.int32(forward[0].size),
        "metric/sdlogj_voxel_units": np.float32(
            np.log(central[central > 1e-6]).std(ddof=1)
        ),
        "metric/nonpos_ratio_voxel_units": np.float32(np.mean(central <= 0)),
    }  # fmt: skip
    return found | _iterations_of(rng, scan, unireg, state, shape)


def _iterations_of(rng, scan, unireg, state, shape):
    moving = scan(rng, shape)
    fixed = 0.7 * moving + 0.3 * scan(rng, shape)
    kind, region = int(rng.integers(2)), int(rng.integers(6))
    known = torch.tensor(np.concatenate([np.eye(2)[kind], np.eye(6)[region]])[None])
    field, counts, traces = _iterated(state, unireg, moving, fixed, known.float())
    return grouped(
        "iir",
        {
            "moving": moving, "fixed": fixed, "flow": field,
            "task_type": np.int32([kind]), "task_id": np.int32([region]),
            "warped": unireg.warp(moving, field, "border"),
            "counts": np.int32(counts), **traces,
        },
    )  # fmt: skip
