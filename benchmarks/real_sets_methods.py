"""The methods of real_sets.py: how a pair's transform is found.

Ours is what a user gets who says nothing but what the scans are, `OURS`; nothing is
chosen by the set.
"""

import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Protocol

from real_sets_process import Process

from jaxreg import settings as settings_lib
from jaxreg.errors import UserError, near_match
from jaxreg.evaluation import baselines
from jaxreg.evaluation.cases import Case
from jaxreg.io import transforms
from jaxreg.registration.options import Options
from jaxreg.space.transform import Transform

OURS: Mapping[str, Any] = MappingProxyType({})
"""Fields of `Options` without weights: all by default."""


@dataclasses.dataclass(frozen=True)
class Found:
    """What a method made of a pair.

    Attributes:
      transform: fixed mm to moving mm.
      seconds: from the scans in memory (greedy: as files) to the transform, without
        compilation.
      compile_seconds: of tracing and compilation.
      cpu_seconds: of all processors, compilation included.
      version: of the package.
    """

    transform: Transform
    seconds: float = 0.0
    compile_seconds: float = 0.0
    cpu_seconds: float = 0.0
    version: str = ""


class Method(Protocol):
    """A way to register."""

    def settings(self) -> dict[str, Any]:
        """Returns what a row's numbers depend on besides the pair, for JSON."""
        ...

    def find(self, case: Case) -> Found:
        """Returns a pair's transform, or raises `real_sets_process.FailedError`."""
        ...

    def stop(self) -> None:
        """Ends its process, if it has one."""


class Start:
    """The scans where their headers place them."""

    def settings(self) -> dict[str, Any]:
        """Returns nothing."""
        return {}

    def find(self, case: Case) -> Found:
        """Returns the identity."""
        return Found(Transform(()))

    def stop(self) -> None:
        """Does nothing."""


@dataclasses.dataclass(frozen=True, eq=False)
class Ours:
    """jaxreg, in a process of its own.

    Attributes:
      process: real_sets_ours.py.
      options: fields of `Options`.
      weights: a checkpoint's folder, or a name; none if None.
    """

    process: Process
    options: Mapping[str, Any]
    weights: str | None = None

    def settings(self) -> dict[str, Any]:
        """Returns the weights and the options."""
        return {"weights": self.weights, "options": {"inverse": False, **self.options}}

    def find(self, case: Case) -> Found:
        """Returns what `register` gives, as its file has it."""
        pair = {
            name: str(value) if isinstance(value, pathlib.Path) else value
            for name, value in vars(case.spec).items()
            if name in _REGISTERED and value is not None
        }
        with tempfile.TemporaryDirectory(prefix="jaxreg-sets-") as folder:
            path = pathlib.Path(folder) / "transform.h5"
            job = {**self.settings(), "pair": pair}
            answer = self.process.ask({**job, "transform_out": str(path)})
            return Found(transforms.read_transform(path), **answer)

    def stop(self) -> None:
        """Ends the process."""
        self.process.stop()


_REGISTERED = (
    "fixed", "moving", "fixed_modality", "moving_modality", "task", "region", "pairing"
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Peer:
    """Another tool, asked by jaxreg.evaluation.baselines in its own environment.

    Attributes:
      process: real_sets_peers.py.
      register: a function of `baselines`.
      arguments: of it.
    """

    process: Process
    register: Callable[..., Transform]
    arguments: Mapping[str, Any]

    def settings(self) -> dict[str, Any]:
        """Returns the function's arguments."""
        return dict(self.arguments)

    def find(self, case: Case) -> Found:
        """Returns the tool's transform; its seconds are those of its own calls."""
        package = _Elsewhere(self.process)
        found = self.register(
            case.scans.moving, case.scans.fixed, package=package, **self.arguments
        )
        return Found(
            found,
            package.seconds,
            cpu_seconds=package.cpu_seconds,
            version=package.version,
        )

    def stop(self) -> None:
        """Ends the process."""
        self.process.stop()


class _Elsewhere:
    """Stands for the modules ants and picsl_greedy of another process."""

    def __init__(self, process: Process):
        self._process = process
        self.seconds, self.cpu_seconds, self.version = 0.0, 0.0, ""

    def image_read(self, path: str) -> str:
        return path

    def registration(self, *, random_seed: int, **settings: Any) -> None:
        self._ask({"tool": "ants", "settings": {"random_seed": random_seed} | settings})

    def Greedy3D(self) -> "_Elsewhere":
        return self

    def execute(self, command: str, out: Any) -> None:
        self._ask({"tool": "greedy", "command": command})

    def _ask(self, job: dict[str, Any]) -> None:
        answer = self._process.ask(job)
        self.seconds += answer["seconds"]
        self.cpu_seconds += answer["cpu_seconds"]
        self.version = answer["version"]


_SYN = (baselines.register_syn, {"stages": "SyNRA"})
PEERS: Mapping[str, tuple[Callable[..., Transform], Mapping[str, Any]]] = {
    "SyN-MI": (_SYN[0], {**_SYN[1], "metric": "mattes", "radius": 32}),
    "SyN-CC": (_SYN[0], {**_SYN[1], "metric": "CC", "radius": 4}),
    "greedy-NCC": (baselines.register_greedy, {"metric": "NCC 2x2x2"}),
    "greedy-NMI": (baselines.register_greedy, {"metric": "NMI"}),
}
_PREALIGNED = {"io_iterations": None}
OWN: Mapping[str, Mapping[str, Any]] = {
    "centre": {**_PREALIGNED, "prealign": "centre"},
    "affine": {**_PREALIGNED, "prealign": "affine"},
    "ours": OURS,
}
START = "start"
NAMES = (START, "centre", "affine", *PEERS, "ours")


def methods_of(
    names: Sequence[str],
    *,
    weights: Sequence[str] = (),
    variants: Sequence[Sequence[str]] = (),
    peers_python: str | None,
    threads: int,
    limit_s: float,
) -> dict[str, Method]:
    """Returns methods by name, the start first.

    Args:
      names: of `NAMES`.
      weights: checkpoints; each is a method, and one with optimisation after it.
      variants: a name, then FIELD=VALUE of `Options` that differ from `OURS`.
      peers_python: the interpreter with antspyx and picsl_greedy.
      threads: of the peers.
      limit_s: see `Process`.

    Raises:
      UserError: a name is unknown or taken, or the peers have no interpreter.
    """
    own = functools.partial(
        Process, "real_sets_ours.py", threads=threads, limit_s=limit_s
    )
    found: dict[str, Method] = {START: Start()}
    for name in dict.fromkeys(names):
        if name in PEERS:
            if peers_python is None:
                raise UserError(
                    f"{name} needs --peers-python, the interpreter of an environment "
                    f"with antspyx and picsl_greedy; give it, or leave {name} out of "
                    "--methods"
                )
            process = Process(
                "real_sets_peers.py",
                python=peers_python,
                threads=threads,
                limit_s=limit_s,
            )
            found[name] = Peer(process, *PEERS[name])
        elif name in OWN:
            found[name] = Ours(own(), OWN[name])
        elif name != START:
            raise UserError(
                f"method {name} is unknown{near_match(name, NAMES)}, expected one of "
                f"{', '.join(NAMES)}"
            )
    further: dict[str, Method] = {}
    for path in weights:
        name = pathlib.PurePath(path).name
        further[name] = Ours(own(), {"io_iterations": None}, path)
        further[f"{name} + IO"] = Ours(own(), {"io_iterations": 50}, path)
    for name, *fields in variants:
        further[name] = Ours(own(), {**OURS, **read_fields(fields)})
    for name in further:
        if name in found or name in NAMES:
            raise UserError(f"two methods would be called {name}; rename one")
    return found | further


def read_fields(texts: Sequence[str]) -> dict[str, Any]:
    """Returns fields of `Options` from FIELD=VALUE, as the command line reads them.

    Raises:
      UserError: a field is unknown or its value is none.
    """
    known = {
        field.name: field.type
        for field in dataclasses.fields(Options)
        if not isinstance(field.type, str)
    }
    found = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in known:
            raise UserError(
                f"the option {name} of --variant is unknown{near_match(name, known)}; "
                f"expected one of {', '.join(known)}"
            )
        found[name] = settings_lib.read(value, known[name], name)
    Options(**found)
    return found
