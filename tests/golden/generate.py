"""Writes reference arrays of the form described in README.md, for another seed.

Every size, image and weight follows from the seed, and the numbers from the original
PyTorch packages, so that the golden tests can be run on arrays that nobody looked at
while writing them:

    python tests/golden/generate.py /tmp/other --seed 7
    JAXREG_GOLDEN=/tmp/other pytest -m golden

Written are the files of uniGradICON (`unigradicon` and `icon_registration`, with ITK)
and those of PromptReg and UniReg's pyramid, from the PyTorch networks of benchmarks/.
Not written: the ITK transform's, and SAM's and SAME's, whose programs are not among the
packages; their tests are skipped.
"""

import argparse
import importlib
import pathlib
import sys
import types

import numpy as np

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError, AttributeError):
    # icon_registration imports it without using it; no CPU build of it may exist.
    sys.modules["torchvision"] = types.ModuleType("torchvision")

import icon_registration as icon
import itk
import pyramids
import torch
import torch.nn.functional as F
import unigradicon
from icon_registration import itk_wrapper, mermaidlite, networks
from icon_registration import losses as icon_losses

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
# Of the four networks' tensors, those whose gradient and final value are stored.
NAMED = (
    "netPhi.netPhi.net.netPhi.net.net.downConvs.0.weight",
    "netPsi.net.lastConv.weight",
    "netPhi.netPsi.net.batchNorms.1.weight",
    "netPhi.netPhi.net.netPsi.net.upConvs.0.weight",
)
FINAL = (
    "netPhi.netPhi.net.netPhi.net.net.downConvs.0.weight",
    "netPsi.net.lastConv.weight",
    "netPsi.net.batchNorms.0.weight",
    "netPsi.net.batchNorms.0.running_mean",
)
STAGES = (
    "netPhi.netPhi.net.netPhi.net.net",
    "netPhi.netPhi.net.netPsi.net",
    "netPhi.netPsi.net",
    "netPsi.net",
)
LOSS_COLUMNS = icon.losses.ICONLoss._fields


# --- what is drawn --------------------------------------------------------------------


def lengths(rng, low, high):
    """Three axes of different length: equal ones would hide a swap."""
    return tuple(int(n) for n in rng.choice(np.arange(low, high), 3, replace=False))


def scan(rng, shape, batch=1):
    """Soft ellipsoids over weak noise, N 1 D H W, in [0, 1)."""
    grid = np.stack(
        np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij"), -1
    )
    images = []
    for _ in range(batch):
        image = np.zeros(shape)
        for _ in range(8):
            centre, width = rng.uniform(0.2, 0.8, 3), rng.uniform(0.06, 0.16, 3)
            distance = (((grid - centre) / width) ** 2).sum(-1)
            image += rng.uniform(0.2, 0.6) * np.exp(-distance / 2)
        image += 0.02 * rng.random(shape)
        images.append(image / (1.2 * image.max()))
    return torch.tensor(np.stack(images)[:, None], dtype=torch.float32)


def regions(rng, shape, labels, batch=1):
    """Ellipsoids of these labels on 0, N 1 D H W."""
    grid = np.stack(
        np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij"), -1
    )
    images = np.zeros((batch, 1, *shape))
    for image in images[:, 0]:
        for label in labels:
            centre, width = rng.uniform(0.25, 0.75, 3), rng.uniform(0.15, 0.35, 3)
            image[(((grid - centre) / width) ** 2).sum(-1) < 1] = label
        for label in labels:  # none is hidden
            places = tuple(rng.integers(0, n, 5) for n in shape)
            image[places] = label
    return torch.tensor(images, dtype=torch.float32)


def map_of(rng, shape, batch=1, size=0.1):
    """Points of a rough map, N 3 D H W, unit; some outside, some folded."""
    spacing = 1.0 / (np.asarray(shape) - 1)
    identity = mermaidlite.identity_map_multiN((batch, 1, *shape), spacing)
    return torch.tensor(identity + rng.normal(0, size, identity.shape)).float()


def randomise(module, rng, size):
    """Draws what a trained network has and a fresh one lacks.

    The last layers, which start at zero, are of this size; norms and their statistics
    are those of a few images seen, away from 0 and 1.
    """
    state = module.state_dict()
    for name, tensor in state.items():
        shape = tuple(tensor.shape)
        if name.endswith("num_batches_tracked"):
            tensor.fill_(int(rng.integers(1, 20)))
        elif "lastConv.weight" in name:
            tensor.copy_(torch.tensor(rng.normal(0, size, shape)))
        elif "lastConv.bias" in name:
            tensor.copy_(torch.tensor(rng.normal(0, size / 2, shape)))
        elif name.endswith("running_mean"):
            tensor.copy_(torch.tensor(rng.normal(0.1, 0.25, shape)))
        elif name.endswith("running_var"):
            tensor.copy_(torch.tensor(rng.uniform(0.3, 1.3, shape)))
        elif "batchNorms" in name and name.endswith("weight"):
            tensor.copy_(torch.tensor(rng.uniform(0.65, 1.4, shape)))
        elif "batchNorms" in name:
            tensor.copy_(torch.tensor(rng.normal(0, 0.2, shape)))
        elif name.endswith("weight"):
            bound = 1 / np.sqrt(np.prod(shape[1:]))
            tensor.copy_(torch.tensor(rng.uniform(-2 * bound, 2 * bound, shape)))
        else:
            tensor.copy_(torch.tensor(rng.normal(0, 0.1, shape)))
    module.load_state_dict(state)


def channels(rng):
    """Widths of the U-Net's three levels, the images first."""
    base = int(rng.integers(3, 7))
    return [[2, base, 2 * base, 4 * base], [base, 2 * base, 2 * base + 1]]


def network(widths, shape, similarity=None, **options):
    """uniGradICON's four U-Nets of these widths."""

    def unet():
        return icon.FunctionFromVectorField(networks.UNet2(3, widths, 3))

    inner = unet()
    for _ in range(2):
        coarse = icon.DownsampleRegistration(inner, dimension=3)
        inner = icon.TwoStepRegistration(coarse, unet())
    inner = icon.TwoStepRegistration(inner, unet())
    return wrapped(inner, shape, similarity, **options)


def wrapped(inner, shape, similarity=None, kind=None, **options):
    """A network with its objective, on a grid."""
    kind = kind or unigradicon.GradientICONSparse
    net = kind(inner, similarity or icon.LNCC(sigma=5), lmbda=1.5, **options)
    net.assign_identity_map((1, 1, *shape))
    return net.eval()


def arrays(module):
    return {k: v.detach().cpu().numpy().copy() for k, v in module.state_dict().items()}


def grouped(group, values):
    return {f"{group}/{name}": value for name, value in values.items()}


class Noise:
    """Stands for torch.randn: hands out the given draws, one after the other."""

    def __init__(self, draws):
        self.draws = iter(draws)

    def __enter__(self):
        self.own, torch.randn = torch.randn, self
        return self

    def __exit__(self, *_):
        torch.randn = self.own

    def __call__(self, *shape, **_):
        draw = next(self.draws)
        assert tuple(draw.shape) == shape
        return draw


def numbers(losses):
    return {k: torch.as_tensor(v).detach() for k, v in losses._asdict().items()}


# --- uniGradICON ----------------------------------------------------------------------


def gradicon_losses(rng):
    """Similarities, Dice and folds."""
    shape = lengths(rng, 18, 30)
    a, b = scan(rng, shape), scan(rng, shape)
    b = 0.6 * b + 0.4 * a
    mask = 3 * (regions(rng, shape, (1,)) > 0).float()
    second = scan(rng, shape)
    batch_a = torch.cat([a, second])
    batch_b = torch.cat([b, 0.5 * second + 0.5 * scan(rng, shape)])
    batch_mask = torch.cat([mask, (regions(rng, shape, (1,)) > 0).float()])
    found = {
        "A": a, "B": b, "mask_B": mask,
        "batch_A": batch_a, "batch_B": batch_b, "batch_mask_B": batch_mask,
    }  # fmt: skip
    measures = {
        "lncc": icon.LNCC(5), "lncc2": icon_losses.SquaredLNCC(5),
        "mind": icon_losses.MINDSSC(2, 2),
    }  # fmt: skip
    for name, measure in measures.items():
        found[name] = measure(a, b)
        found[f"{name}_masked"] = measure(a, b, mask)
        found[f"{name}_batch"] = measure(batch_a, batch_b)
        found[f"{name}_batch_masked"] = measure(batch_a, batch_b, batch_mask)
        found[f"{name}_empty_mask"] = measure(a, b, torch.zeros_like(mask))
        # The descriptor's kernels are float32: no double precision there.
        found[f"{name}_f64"] = (
            np.float64(np.nan) if name == "mind" else measure(a.double(), b.double())
        )
        given = a.clone().requires_grad_()
        measure(given, b).backward()
        found[f"{name}_gradA"] = given.grad
    found["lncc_sigma3"] = icon.LNCC(3)(a, b)
    found["mind_r1_d3"] = icon_losses.MINDSSC(1, 3)(a, b)
    found["lncc_map"] = measures["lncc"].calculate_lncc(a, b)
    found["blur_A"] = measures["lncc"].blur(a)
    found["kernel1d_sigma5"] = icon_losses._get_gaussian_kernel1d(21, 5)
    found["ncc"] = icon_losses.NCC()(a, b)
    found["ncc_batch"] = icon_losses.NCC()(batch_a, batch_b)
    found["ssd"] = icon_losses.SSD()(a, b)
    found["mind_image"] = scan(rng, lengths(rng, 9, 14))
    found["mind_descriptor"] = measures["mind"].compute_mindssc(found["mind_image"])
    return found | gradicon_dice(rng) | gradicon_folds(rng)


def one_hot(labels, classes):
    return torch.cat([(labels == c).float() for c in classes], 1)


def gradicon_dice(rng):
    shape, classes = lengths(rng, 11, 16), (2, 9)
    a, b = regions(rng, shape, (2, 5, 9)), regions(rng, shape, (2, 9, 11))
    second = regions(rng, shape, (2, 5))
    dice = unigradicon.GradientICONSparse.dice_loss
    hot_a, hot_b = one_hot(a, classes), one_hot(b, classes)
    valid = torch.ones(1, 2, dtype=torch.bool)
    soft = torch.cat([scan(rng, shape), scan(rng, shape)], 1) * hot_a
    batch = torch.cat([hot_a, one_hot(second, classes)])
    valid_batch = torch.tensor([[True, True], [True, False]])
    return {
        "dice_label_A": a, "dice_label_B": b, "dice_label_A_second": second,
        "dice_shared_classes": np.array(classes), "dice_soft_pred": soft,
        "dice_loss_unwarped": dice(None, hot_a, hot_b, valid_classes=valid),
        "dice_loss_no_valid": dice(None, hot_a, hot_b),
        "dice_loss_soft": dice(None, soft, hot_b, valid_classes=valid),
        "dice_valid_batch": valid_batch,
        "dice_loss_batch": dice(
            None, batch, torch.cat([hot_b, hot_b]), valid_classes=valid_batch
        ),
    }  # fmt: skip


def gradicon_folds(rng):
    shape = lengths(rng, 8, 13)
    phi = map_of(rng, shape, 2, 0.05)
    flat = map_of(rng, (*lengths(rng, 8, 13)[:2], 2), 1, 0.06)[:, :2, :, :, 0]
    net = types.SimpleNamespace(identity_map=phi)
    determinant = unigradicon.GradientICONSparse.compute_jacobian_determinant
    flips = icon_losses.flips
    return {
        "flip_phi": phi, "flips_count": flips(phi),
        "flips_percent": flips(phi, in_percentage=True),
        "jacobian_det": determinant(net, phi),
        "flip_phi_2d": flat, "flips_count_2d": flips(flat),
        "flips_percent_2d": flips(flat, in_percentage=True),
    }  # fmt: skip


def gradicon_preprocess(rng):
    """Intensities, resizes, augmentation, warps, pooling."""
    shape = lengths(rng, 14, 24)
    ct = rng.normal(-100, 700, shape).astype(np.int16)
    mr = rng.gamma(2.0, 140.0, shape).astype(np.float32) - 15
    mask = (2 * (regions(rng, shape, (1,))[0, 0] > 0)).numpy().astype(np.uint8)

    def image(array, modality, **options):
        made = unigradicon.preprocess(
            itk.image_from_array(np.ascontiguousarray(array)), modality, **options
        )
        return np.array(made)

    shown = itk.image_from_array(mask)
    mri = image(mr, "mri")
    net_shape = lengths(rng, 10, 18)
    quantiles = np.sort(np.r_[0, 1, rng.uniform(0, 1, 7)])
    found = {
        "ct": ct, "mr": mr, "mask": mask,
        "ct_default": image(ct, "ct"),
        "ct_window_m150_250": image(ct, "ct", ct_window=(-150, 250)),
        "mri_default": mri,
        "mri_quantile_01_98": image(mr, "mri", quantile_range=(0.01, 0.98)),
        "mri_masked": image(mr, "mri", mask=shown),
        "ct_masked": image(ct, "ct", mask=shown),
        "q": quantiles,
        "q_values": np.array(
            [float(unigradicon.quantile(torch.tensor(mr), q)) for q in quantiles]
        ),
        "net_shape": np.array(net_shape),
        "mri_resized": F.interpolate(
            torch.tensor(mri)[None, None],
            size=net_shape, mode="trilinear", align_corners=False,
        ),
        "mask_resized_nearest": F.interpolate(
            torch.tensor(mask).float()[None, None], size=net_shape, mode="nearest"
        ),
    }  # fmt: skip
    return found | gradicon_resampling(rng)


def gradicon_resampling(rng):
    shape = lengths(rng, 10, 15)
    images, labels = scan(rng, shape, 2), regions(rng, shape, (1, 2), 2)
    theta = np.zeros((2, 3, 4))
    for matrix in theta:
        matrix[np.arange(3), rng.permutation(3)] = rng.choice([-1, 1], 3)
    theta = torch.tensor(theta + rng.normal(0, 0.05, theta.shape)).float()
    found = {"aug_image": images, "aug_label": labels, "aug_theta": theta}
    for aligned in (True, False):
        grid = F.affine_grid(theta, [2, 3, *shape], align_corners=aligned)
        for name, values, mode in (
            ("image", images, "bilinear"), ("label", labels, "nearest")
        ):  # fmt: skip
            found[f"aug_{name}_align_{str(aligned).lower()}"] = F.grid_sample(
                values, grid, mode=mode, padding_mode="border", align_corners=aligned
            )
    shape = lengths(rng, 7, 12)
    image, phi = scan(rng, shape), map_of(rng, shape, 1, 0.15)
    spacing = 1.0 / (np.asarray(shape) - 1)
    warp = mermaidlite.compute_warped_image_multiNC
    rough = torch.tensor(rng.normal(size=(1, 2, *lengths(rng, 4, 9)))).float()
    return found | {
        "warp_image": image, "warp_phi": phi,
        "warp_border": warp(image, phi, spacing, 1),
        "warp_zeros": warp(image, phi, spacing, 1, zero_boundary=True),
        "warp_nearest_zeros": warp(image, phi, spacing, 0, zero_boundary=True),
        "pool_in": rough, "pool_out": F.avg_pool3d(rough, 2, ceil_mode=True),
        "up_in": rough,
        "up_out": F.interpolate(
            rough, scale_factor=2, mode="trilinear", align_corners=False
        ),
    }  # fmt: skip


def unigradicon_unet_small(rng, widths):
    """One U-Net."""
    shape = lengths(rng, 16, 26)
    images = {name: scan(rng, shape) for name in ("A", "B", "A_second", "B_second")}
    unet = networks.UNet2(3, widths, 3)
    randomise(unet, rng, float(rng.uniform(0.01, 0.1)))
    before = arrays(unet)
    found = {
        **images, **grouped("state", before),
        "channels_down": np.array(widths[0]), "channels_up": np.array(widths[1]),
        "out_eval": unet.eval()(images["A"], images["B"]),
        "out_train": unet.train()(images["A"], images["B"]),
        **grouped("state_after_train", arrays(unet)),
    }  # fmt: skip
    unet.load_state_dict({k: torch.tensor(v) for k, v in before.items()})
    pairs = (torch.cat([images[n], images[f"{n}_second"]]) for n in "AB")
    found["out_train_batch2"] = unet(*pairs)
    after = {k: v for k, v in arrays(unet).items() if "num_batches" not in k}
    return found | grouped("state_after_train_batch2", after)


def with_gradients(group, net, losses, names=NAMED):
    losses.all_loss.backward()
    parameters = dict(net.regis_net.named_parameters())
    found = grouped(group, numbers(losses))
    found |= {f"{group}/grad/{n}": parameters[n].grad.clone() for n in names}
    net.zero_grad()
    return found


def unigradicon_net_small(rng, widths):
    """The composed network and its objective in all variants."""
    shape = lengths(rng, 24, 36)
    size = float(rng.uniform(0.004, 0.012))
    a, b, c = (scan(rng, shape) for _ in range(3))
    noise = torch.tensor(rng.standard_normal((1, 3, *shape))).float()
    masks = {f"mask_{n}": regions(rng, shape, (1,)) > 0 for n in "AB"}
    segmentations = {
        f"seg_{n}": regions(rng, shape, (1, 3, 7)).to(torch.uint8) for n in "AB"
    }
    labels = {"label_A": 1 - 0.5 * a, "label_B": 0.8 * b + 0.1 * c}
    net = network(widths, shape)
    randomise(net.regis_net, rng, size)
    inner, before = net.regis_net, arrays(net.regis_net)
    found = {
        "A": a, "B": b, "C": c, "noise": noise, **masks, **segmentations, **labels,
        **grouped("state", before),
    }  # fmt: skip

    def run(net, *images, draw=noise, **extras):
        with Noise([draw]):
            return net(*images, **extras)

    fields = {}

    def keep(name):
        def hook(_, __, out):  # called for AB, then for BA
            fields.setdefault(name, out.detach())

        return hook

    modules = dict(inner.named_modules())
    hooks = [modules[name].register_forward_hook(keep(name)) for name in STAGES]
    found |= with_gradients("eval_lncc", net, run(net, a, b))
    for hook in hooks:
        hook.remove()
    found |= grouped("stage_disp_AB", fields)
    for way in ("AB", "BA"):
        found[f"phi_{way}"] = getattr(net, f"phi_{way}_vectorfield").detach()
        found[f"warped_{way[0]}"] = getattr(net, f"warped_image_{way[0]}").detach()
    spacing = net.spacing
    found["warped_label_A"] = mermaidlite.compute_warped_image_multiNC(
        labels["label_A"], found["phi_AB"], spacing, 1
    )
    double = net.double()
    found |= with_gradients(
        "eval_lncc_f64", net, run(double, a.double(), b.double(), draw=noise.double())
    )
    net.float()
    net.assign_identity_map((1, 1, *shape))
    lncc2 = {"similarity": icon_losses.SquaredLNCC(5)}
    masks = {k: v.float() for k, v in masks.items()}
    segmentations = {
        f"segmentation_{k[-1]}": v.float() for k, v in segmentations.items()
    }
    variants = {
        "eval_lncc2": (lncc2, {}),
        "eval_mind": ({"similarity": icon_losses.MINDSSC(2, 2)}, {}),
        "eval_lncc2_mask": ({**lncc2, "loss_function_masking": True}, masks),
        "eval_lncc2_label": ({**lncc2, "use_label": True}, labels),
        "eval_lncc_dice": ({"dice_loss_weight": 0.7}, segmentations),
        "eval_lncc_ic": ({"apply_intensity_conservation_loss": True}, {}),
        "icon_dense": ({"kind": icon.losses.GradientICON}, {}),
        "icon_sparse": ({"kind": icon.losses.GradientICONSparse}, {}),
    }  # fmt: skip
    for name, (options, extras) in variants.items():
        other = wrapped(inner, shape, **options)
        with torch.no_grad():
            found |= grouped(name, numbers(run(other, a, b, **extras)))
    net = wrapped(inner, shape)
    with torch.no_grad():
        losses = run(net, torch.cat([a, c]), torch.cat([b, a]))
    found |= grouped("eval_lncc_batch2", numbers(losses))
    net.train()
    found |= with_gradients("train_lncc", net, run(net, a, b))
    found["train_phi_AB"] = net.phi_AB_vectorfield.detach()
    return found | grouped("state_after_train_forward", arrays(inner))


def unigradicon_io(rng, widths, steps=5):
    """Instance optimisation at two rates."""
    shape = lengths(rng, 18, 28)
    size = float(rng.uniform(0.004, 0.012))
    a, b = scan(rng, shape), scan(rng, shape)
    noise = torch.tensor(rng.standard_normal((steps + 1, 3, *shape))).float()
    net = network(widths, shape)
    randomise(net.regis_net, rng, size)
    before = arrays(net.regis_net)
    found = {
        "A": a, "B": b, "noise": noise, "loss_columns": np.array(LOSS_COLUMNS),
        **grouped("state", before),
    }  # fmt: skip
    for rate in ("lr2e-5", "lr1e-3"):
        rows, states = [], []

        def seen(_, __, losses, rows=rows, states=states):
            rows.append([float(v) for v in losses])
            states.append(arrays(net.regis_net))

        hook = net.register_forward_hook(seen)
        with Noise([draw[None] for draw in noise]):
            itk_wrapper.finetune_execute(net, a, b, steps, float(rate[2:]))
        hook.remove()
        found[f"{rate}/losses"] = np.array(rows)
        for way in ("AB", "BA"):
            found[f"{rate}/phi_{way}"] = getattr(net, f"phi_{way}_vectorfield").detach()
        found |= grouped(f"{rate}/final", {n: states[-1][n] for n in FINAL})
    return found


def main():
    """Writes the files of one seed into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--only", nargs="*", help="names of files, without suffix")
    given = parser.parse_args()
    sys.path.insert(0, str(BENCHMARKS))
    torch.set_num_threads(1)  # sums in one order
    given.folder.mkdir(parents=True, exist_ok=True)
    widths = channels(np.random.default_rng([given.seed, 0]))
    makers = {
        "gradicon_losses": gradicon_losses,
        "gradicon_preprocess": gradicon_preprocess,
        "unigradicon_unet_small": lambda rng: unigradicon_unet_small(rng, widths),
        "unigradicon_net_small": lambda rng: unigradicon_net_small(rng, widths),
        "unigradicon_io": lambda rng: unigradicon_io(rng, widths),
        "promptreg_small": lambda rng: pyramids.promptreg_small(
            rng, scan, importlib.import_module("pytorch_promptreg")
        ),
        "unireg_rpn_small": lambda rng: pyramids.unireg_rpn_small(
            rng, scan, importlib.import_module("pytorch_unireg")
        ),
    }
    for number, (name, make) in enumerate(makers.items(), start=1):
        if given.only and name not in given.only:
            continue
        # Each file of its own stream: one alone is the same as among the others.
        found = make(np.random.default_rng([given.seed, number]))
        values = {
            k: v.detach().numpy() if isinstance(v, torch.Tensor) else np.asarray(v)
            for k, v in found.items()
        }
        np.savez_compressed(given.folder / f"{name}.npz", **values)
        print(name, {k: v.shape for k, v in values.items() if k in ("A", "mr")})


if __name__ == "__main__":
    main()
