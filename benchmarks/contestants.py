"""What the benchmarks compare: each network in jaxreg and in PyTorch, alike.

`prepare` writes random weights and images; `jaxreg_side.build` and `pytorch_side.build`
load them in a process of their own and return what there is to time (`Built`).
"""

import dataclasses
import importlib.util
import multiprocessing
import pathlib
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

Task = Literal["forward", "train", "io"]
Library = Literal["jaxreg", "pytorch", "autocast"]
Precision = Literal["float32", "tf32", "bfloat16"]
LEARNING_RATE = 2e-5
HEAD_DEVIATION = 0.01
"""Of the last layers' weights: fresh networks move nothing."""
_CONTROLLER_DEVIATION = 0.1


@dataclasses.dataclass(frozen=True)
class Job:
    """What one process is to do.

    Attributes:
      library: jaxreg, PyTorch as its users run it, or PyTorch with autocast to
        bfloat16 and channels last.
      network: a key of `NETWORKS`.
      task: "forward", one direction: network and its map on the grid; "train": loss,
        gradient and Adam, with batch statistics; "io": the same with running ones.
      folder: of `prepare`.
      batch: pairs.
      precision: jaxreg's.
      threads: PyTorch's on CPU.
      io_steps: above 0, "io" is a whole optimisation of that many steps.
      alone: whether no other process needs the device's memory.
    """

    library: Library
    network: str
    task: Task
    folder: str
    batch: int = 1
    precision: Precision = "float32"
    threads: int = 2
    io_steps: int = 0
    alone: bool = False


@dataclasses.dataclass(frozen=True)
class Built:
    """What is timed, warm.

    Attributes:
      run: does it once, and waits for the device.
      first: the first result: the map N 3 D H W, or a loss.
      device: its name.
      compile: seconds and CPU seconds of tracing and compilation; zeros in PyTorch.
      reset_peak: forgets the device's peak so far, where that is possible.
      peak: the device's peak in bytes; None on CPU.
    """

    run: Callable[[], Any]
    first: np.ndarray | float
    device: str
    compile: tuple[float, float] = (0.0, 0.0)
    reset_peak: Callable[[], None] = lambda: None
    peak: Callable[[], float | None] = lambda: None


@dataclasses.dataclass(frozen=True)
class Network:
    """A network that both libraries have.

    Attributes:
      kind: a key of `jaxreg.models.registry`.
      fields: of its configuration, where they are not the default ones.
      tasks: that it has.
      recipe: the file of configs/ whose objective it trains by; "" for uniGradICON's.
      has_width: whether its number of channels can be chosen.
    """

    kind: str
    fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tasks: tuple[Task, ...] = ("forward", "train")
    recipe: str = ""
    has_width: bool = False


NETWORKS: Mapping[str, Network] = types.MappingProxyType(
    {
        "unigradicon": Network("gradicon", tasks=("forward", "train", "io")),
        "promptreg": Network("promptreg", recipe="promptreg", has_width=True),
        "rdp": Network("rdp", recipe="rdp", has_width=True),
        # MIND in place of SAM, and images that are no Hounsfield units.
        "unireg": Network(
            "unireg", {"features": "mind", "backbone_window": None}, recipe="unireg"
        ),
        "unireg_rpn": Network("unireg_rpn", recipe="unireg_rpn"),
    }
)


# --- weights and images ---------------------------------------------------------------


def prepare(
    folder: pathlib.Path, name: str, shape: tuple[int, int, int], channels: int = 16
) -> None:
    """Writes random weights and a pair of smooth random images for both libraries.

    In a process of its own and on the CPU, so that this one holds no device.

    Args:
      folder: gets weights/, images.npz and, where there is PyTorch, weights.pth.
      name: a key of `NETWORKS`.
      shape: the network grid.
      channels: width of PromptReg and RDP.
    """
    process = multiprocessing.get_context("spawn").Process(
        target=_write, args=(folder, name, shape, channels)
    )
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{name} could not be prepared; the reason is above")


def _write(
    folder: pathlib.Path, name: str, shape: tuple[int, int, int], channels: int
) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")
    from jaxreg.models import registry
    from jaxreg.weights import bundle as bundle_lib
    from jaxreg.weights.pytorch import state as state_lib
    from jaxreg.weights.pytorch.table import table_of

    network, generator = NETWORKS[name], np.random.default_rng(0)
    width = {"channels": channels} if network.has_width else {}
    config = registry.config_of(network.kind, {**network.fields, **width})
    variables = config.build().init(jax.random.key(0), shape)
    variables = stirred(jax.tree.map(np.array, variables), generator)
    fields = dataclasses.asdict(config)
    bundle = bundle_lib.Bundle(
        variables, network.kind, fields, {"shape": list(shape)}, "random", "none"
    )
    bundle_lib.save_bundle(folder / "weights", bundle)
    if importlib.util.find_spec("torch"):
        if network.kind == "unireg":  # whose weights have no PyTorch file
            import pytorch_unireg

            state = pytorch_unireg.state_of(variables)
        else:
            table = table_of(type(config), source="the variables")
            state = table.from_variables(variables, fields)
        state_lib.write_state_dict(folder / "weights.pth", state)
    moving, fixed = smooth_pair(shape)
    np.savez(folder / "images.npz", moving=moving, fixed=fixed)


def smooth_pair(shape: tuple[int, int, int]) -> list[np.ndarray]:
    """Returns two smooth random images, 1 1 D H W each, [0, 1]."""
    import jax.numpy as jnp

    from jaxreg.space import sampling

    coarse = np.random.default_rng(1).uniform(size=(2, 12, 12, 12, 1))
    found = sampling.resize_half_pixel(jnp.asarray(coarse, jnp.float32), shape)
    return np.split(np.moveaxis(np.asarray(found), -1, 1), 2)


def stirred(variables: dict[str, Any], generator: np.random.Generator):
    """Returns variables whose last layers move something, as fresh ones do not."""
    import jax

    def stir(path, leaf):
        *_, layer, kind = (part.key for part in path)
        if layer == "controller":
            deviation = HEAD_DEVIATION if kind == "kernel" else _CONTROLLER_DEVIATION
        elif kind == "kernel" and (layer == "last" or layer.startswith("head_")):
            deviation = HEAD_DEVIATION
        else:
            return leaf
        return generator.normal(scale=deviation, size=leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(stir, variables["params"])
    return {**variables, "params": params}


def images_of(folder: str, batch: int) -> list[np.ndarray]:
    """Returns moving and fixed, N 1 D H W: the pair, shifted a little for each item."""
    with np.load(pathlib.Path(folder) / "images.npz") as images:
        return [
            np.concatenate([np.roll(images[name], i, -1) for i in range(batch)])
            for name in ("moving", "fixed")
        ]
