"""Registration of several pairs at once, each on a device of its own.

The network sees its pairs in one program over all devices, which is compiled once. Each
device has a batch of one pair, whose statistics, noise and optimised weights are its
own: the results are those of one device, to float rounding. What comes before and after
is done pair by pair, in threads: on the first device where it is little, on the pair's
own where a displacement is optimised.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent import futures
from typing import Any, TypeVar

import jax
import numpy as np

from jaxreg.errors import UserError
from jaxreg.io import given
from jaxreg.models.sam import TrainedSam
from jaxreg.registration import options as options_lib
from jaxreg.registration import pair as pair_lib
from jaxreg.registration import preparation
from jaxreg.registration.optimization import loop
from jaxreg.registration.optimization import network as network_lib
from jaxreg.registration.pair import Prepared
from jaxreg.registration.prealign import select
from jaxreg.registration.result import RegistrationResult
from jaxreg.weights import zoo
from jaxreg.xla import compilation_cache, spreading

_AT_FIRST = 4  # pairs that are prepared or scored at a time on the first device
_Found = TypeVar("_Found")
Outcome = RegistrationResult | UserError
"""A registration, or why there is none."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A pair to be registered; the fields are arguments of `pair.register`."""

    moving: given.Scan
    fixed: given.Scan
    model: zoo.LoadedModel | None
    options: options_lib.Options
    regions: options_lib.Regions | None = None
    sam: TrainedSam | None = None
    start: select.Prealignment | None = None


def devices_for(count: int) -> list[spreading.Device]:
    """Returns the devices of this process that register a list of so many pairs."""
    return jax.local_devices()[: max(count, 1)]


def described(devices: Sequence[spreading.Device]) -> str:
    """Returns what happens on several devices in words; "" for one."""
    if len(devices) == 1:
        return ""
    return (
        f"{len(devices)} pairs at a time, each on one of {len(devices)} "
        f"{devices[0].platform} devices"
    )


def register_each(
    requests: Sequence[Request], devices: Sequence[spreading.Device]
) -> list[Outcome]:
    """Registers pairs, at most one on each device at a time.

    The seconds of the network are those of all pairs that it saw at once.

    Args:
      requests: the pairs, no more than there are devices.
      devices: of this process; on one it is `pair.register`.

    Returns:
      What came of each; what fails on one leaves the others alone.
    """
    if len(devices) == 1:
        return [or_error(_register, request) for request in requests]
    return _register_each(requests, devices)


def _register(request: Request) -> RegistrationResult:
    return pair_lib.register(
        request.moving, request.fixed, request.model, request.options,
        regions=request.regions, sam=request.sam, start=request.start,
    )  # fmt: skip


@compilation_cache.kept()
def _register_each(
    requests: Sequence[Request], devices: Sequence[spreading.Device]
) -> list[Outcome]:
    homes = [
        device if _optimises_displacement(request) else devices[0]
        for request, device in zip(requests, devices, strict=False)
    ]
    prepared = _in_threads(_prepare, homes, requests)
    found: list[loop.Optimized | None] = [None] * len(requests)
    for group in _alike(prepared):
        to = [homes[place] for place in group]
        by_network = _through_network(list(group.values()), devices, to)
        for place, one in zip(group, by_network, strict=True):
            found[place] = one
    return _in_threads(_finish, homes, prepared, found)


def _optimises_displacement(request: Request) -> bool:
    options = options_lib.settled(request.options, network=request.model is not None)
    return options.io_iterations is not None and options.io_target != "network"


def _prepare(request: Request) -> Prepared:
    return pair_lib.prepare(**vars(request))


def _finish(
    prepared: Prepared | UserError, by_network: loop.Optimized | None
) -> RegistrationResult:
    if isinstance(prepared, UserError):
        raise prepared
    return pair_lib.finish(prepared, by_network=by_network)


def or_error(function: Callable[..., _Found], *arguments: Any) -> _Found | UserError:
    """Returns a function's value, or the sentence that it raised."""
    try:
        return function(*arguments)
    except UserError as error:
        return error


def _in_threads(
    function: Callable[..., _Found],
    homes: Sequence[spreading.Device],
    *arguments: Iterable[Any],
) -> list[_Found | UserError]:
    """Returns a function's values, or what failed, each computed on its device."""

    def at_home(device, *of_one):
        with jax.default_device(device):
            return or_error(function, *of_one)

    count = max(_AT_FIRST, len(set(homes)))
    with futures.ThreadPoolExecutor(count, "pair") as pool:
        return list(pool.map(at_home, homes, *arguments))


def _alike(prepared: Sequence[Prepared | UserError]) -> list[dict[int, Prepared]]:
    """Returns pairs that one program of the network serves, by their places."""
    groups: list[tuple[Any, list[Any], dict[int, Prepared]]] = []
    for place, one in enumerate(prepared):
        if isinstance(one, UserError) or one.model is None:
            continue
        task = pair_lib.network_task(one.model, one.options)
        if task == "none":
            continue
        leaves, form = jax.tree.flatten(one.placed.pair)
        shapes = tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        how: tuple[Any, ...] = (task, one.options.precision, one.model.model)
        if task == "optimise":
            how += (preparation.objective_of(one.options), one.options.seed)
            how += tuple(pair_lib.optimisation_of(one.options).items())
        key = (how, form, shapes)
        weights = jax.tree.leaves(one.model.variables)
        for other, others_weights, group in groups:
            if key == other and _equal(weights, others_weights):
                group[place] = one
                break
        else:
            groups.append((key, weights, {place: one}))
    return [group for *_, group in groups]


def _equal(here: Sequence[Any], there: Sequence[Any]) -> bool:
    """Whether weights are the same arrays or, as prompts that were chosen, equal."""
    return len(here) == len(there) and all(
        a is b or np.array_equal(a, b) for a, b in zip(here, there, strict=True)
    )


def _through_network(
    group: Sequence[Prepared],
    devices: Sequence[spreading.Device],
    to: Sequence[spreading.Device],
) -> list[loop.Optimized]:
    """Returns what the network makes of pairs that are alike, where each is wanted.

    All devices take part: those without a pair repeat the last one, so that there is
    one program however many pairs are left.
    """
    first, start = group[0], time.perf_counter()
    model, options = first.model, first.options
    assert model is not None  # see `_alike`
    idle = len(devices) - len(group)
    pairs = [one.placed.pair for one in group] + [group[-1].placed.pair] * idle
    places = [*to, *[to[-1]] * idle]
    mesh = spreading.mesh_of(devices)
    network = model.model, model.variables, pairs
    with jax.default_matmul_precision(options_lib.MATMUL[options.precision]):
        if pair_lib.network_task(model, options) == "predict":
            found = network_lib.predict_each(*network, mesh, places)
        else:
            found = network_lib.optimize_each(
                *network, preparation.objective_of(options), mesh, places,
                key=jax.random.key(options.seed), **pair_lib.optimisation_of(options),
            )  # fmt: skip
    jax.block_until_ready([(one.forward, one.backward) for one in found])
    for one in group:
        one.seconds["register"] = time.perf_counter() - start
    return found[: len(group)]
