"""The tasks of a benchmark in PyTorch, as its users run them or with autocast."""

import contextlib
import functools
import pathlib
import sys
import types
from collections.abc import Callable, Mapping

import torch
from contestants import LEARNING_RATE, Built, Job, Task, images_of


def build(job: Job) -> Built:
    """Returns a task of PyTorch, with autocast and channels last where asked for."""
    torch.set_num_threads(job.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    automatic = job.library == "autocast"
    pair = [torch.tensor(x, device=device) for x in images_of(job.folder, job.batch)]
    weights = torch.load(
        pathlib.Path(job.folder) / "weights.pth",
        weights_only=True,
        map_location=device,
    )
    forward, loss, parameters = SIDES[job.network](weights, *pair, job.task)
    del weights  # a second copy
    if automatic:
        for leaf in [*pair, *parameters]:
            if leaf.ndim == 5:
                leaf.data = leaf.data.contiguous(memory_format=torch.channels_last_3d)
    runner = _Runner(forward, loss, parameters, device, automatic=automatic)
    if job.task == "forward":
        run, first = runner.predict, runner.predict().float().cpu().numpy()
    elif job.io_steps:
        run = functools.partial(runner.optimise, job.io_steps)
        first = run()
    else:
        # Without jitter, so that both libraries' first loss is the same number.
        jittered, torch.randn = torch.randn, lambda *a, **k: torch.zeros(*a, **k)
        run, first = runner.step, runner.step()
        torch.randn = jittered
    if device == "cpu":
        return Built(run, first, device)
    return Built(
        run,
        first,
        torch.cuda.get_device_name(),
        reset_peak=torch.cuda.reset_peak_memory_stats,
        peak=torch.cuda.max_memory_allocated,
    )


class _Runner:
    """Prediction, step and optimisation; each returns when the device is done."""

    def __init__(self, forward, loss, parameters, device: str, *, automatic: bool):
        self._forward, self._loss, self._device = forward, loss, device
        self._automatic = automatic
        self._optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)

    def _reduced(self):
        if not self._automatic:
            return contextlib.nullcontext()
        return torch.autocast(self._device, dtype=torch.bfloat16)

    def _wait(self) -> None:
        if self._device == "cuda":
            torch.cuda.synchronize()

    def predict(self) -> torch.Tensor:
        """Returns the map."""
        with torch.no_grad(), self._reduced():
            found = self._forward()
        self._wait()
        return found

    def step(self) -> float:
        """Returns the loss before an update."""
        self._optimizer.zero_grad()
        with self._reduced():
            value = self._loss()
        value.backward()
        self._optimizer.step()
        self._wait()
        return float(value.detach())

    def optimise(self, steps: int) -> float:
        """Returns the loss after a whole optimisation; the weights come back."""
        with self._reduced():
            value = self._loss.optimise(steps)
        self._wait()
        return value


def import_unigradicon():
    """Returns the package without what it imports and never uses here."""
    for name in ("torchvision", "itk"):
        sys.modules[name] = types.ModuleType(name)
    vars(sys.modules["itk"])["Image"] = object  # of an annotation
    import unigradicon

    return unigradicon


class _UniGradIcon:
    """unigradicon's loss, and its instance optimisation as `register_pair` calls it."""

    def __init__(self, net, moving, fixed):
        self._all = (net, moving, fixed)

    def __call__(self):
        net, moving, fixed = self._all
        return net(moving, fixed).all_loss

    def optimise(self, steps: int) -> float:
        """Returns the last loss."""
        from icon_registration import itk_wrapper

        found = itk_wrapper.finetune_execute(*self._all, steps, LEARNING_RATE)
        return float(found.all_loss)


def _unigradicon(weights, moving, fixed, task: Task):
    net = import_unigradicon().make_network(moving.shape, include_last_step=True)
    net.regis_net.load_state_dict(weights)
    net.to(moving.device)
    net.train(task == "train")

    def forward():
        # As the package's own forward does, so that a field on its grid is added.
        vars(net.identity_map)["isIdentity"] = True
        return net.regis_net(moving, fixed)(net.identity_map)

    return forward, _UniGradIcon(net, moving, fixed), list(net.parameters())


def _trained(weights, idle: tuple[str, ...] = ()):
    """The tensors that have an effect, as leaves of a gradient."""
    return {
        name: tensor.requires_grad_()
        for name, tensor in weights.items()
        if not any(word in name for word in idle)
    }


def _unit_map(field):
    """A displacement in voxels as a map in unit coordinates, for the comparison."""
    import pytorch_promptreg

    scale = [max(n - 1, 1) for n in field.shape[2:]]
    places = pytorch_promptreg.voxels(field)
    return torch.stack([places[:, i] / n for i, n in enumerate(scale)], 1)


def _promptreg(weights, moving, fixed, _task: Task):
    import pytorch_promptreg as net

    # What has no effect is stored by the released program; it is not trained here.
    idle = ("prompt_mlp", "x_proj", "cross_attention.q", "cross_attention.k", "grid")
    state = _trained(weights, idle)
    return (
        lambda: _unit_map(net.network(state, moving, fixed)[0]),
        lambda: net.loss(state, moving, fixed),
        list(state.values()),
    )


def _uniregs(field: str, loss: str, known: tuple[int, ...]):
    """A UniReg by the names of its functions and the row of its first task."""

    def build(weights, moving, fixed, _task: Task):
        import pytorch_unireg as net

        state = _trained(weights)
        rows = torch.tensor(known, dtype=torch.float32, device=moving.device)
        given = (state, moving, fixed, rows.expand(len(moving), -1))
        return (
            lambda: _unit_map(getattr(net, field)(*given)),
            lambda: getattr(net, loss)(*given),
            list(state.values()),
        )

    return build


SIDES: Mapping[str, Callable] = types.MappingProxyType(
    {
        "unigradicon": _unigradicon,
        "promptreg": _promptreg,
        "rdp": _promptreg,
        "unireg": _uniregs("network", "network_loss", (1, 0, 0, 0, 0, 1)),
        "unireg_rpn": _uniregs("pyramid", "pyramid_loss", (1, 0, 1, 0, 0, 0, 0, 0)),
    }
)
"""Tensors, moving, fixed and the task to (forward, loss, parameters), by network."""
