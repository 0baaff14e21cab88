"""The result of a registration."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from jaxreg.space import transform as transform_lib
from jaxreg.space.grid import Grid


@dataclasses.dataclass(frozen=True)
class RegistrationResult:
    """What registering two scans gives.

    Attributes:
      transform: fixed mm to moving mm (RAS+), what a resampler needs.
      inverse: moving mm to fixed mm, or None if not asked for.
      inverse_residual_mm: mean and maximum of ``|T(T_inverse(x)) - x|`` within the
        moving scan, of the two transforms above; see `transform.round_trip_mm`.
      fixed_grid: the fixed scan's network grid.
      moving_grid: the moving scan's network grid; with a pre-alignment, the fixed
        scan's moved by its affine part.
      history: parts of the objective per step, by name; empty without optimisation.
      similarity: the loss that `similarity_before` and `similarity_after` are values
        of; smaller is better.
      similarity_before: with the scans where their headers place them.
      similarity_prealigned: with the scans pre-aligned, or None if they were not.
      similarity_after: with the moving scan warped by the transform.
      folding_percent: share of the fixed scan's voxels whose Jacobian determinant is
        negative, 0 to 100, see `metrics.regularity`; of a scan that is larger than the
        network's box, those within it.
      domains: share of each domain of a prompt bank in this pair's prompt, by name;
        empty for other networks.
      seconds: wall time by phase.
      fixed_image: what the similarity saw of the fixed scan, D H W, [0, 1].
      warped_before: the moving scan on the fixed network grid by the headers, D H W.
      warped_after: the same through the transform.
      sdlogj: standard deviation of the determinant's logarithm at the same voxels.
      conditioning: what the network is conditioned on: region, pairing and, where it
        takes one, the weight of smoothness; empty for other networks.
      prealigned_from: what the pre-alignment came from, `Prealignment.start`; empty
        without one.
      started_from: what fitted best before a registration without a network:
        "headers", "centres of mass" or "stretched extents"; else empty.
    """

    transform: transform_lib.Transform
    inverse: transform_lib.Transform | None
    inverse_residual_mm: tuple[float, float] | None
    fixed_grid: Grid
    moving_grid: Grid
    history: Mapping[str, np.ndarray]
    similarity: str
    similarity_before: float
    similarity_prealigned: float | None
    similarity_after: float
    folding_percent: float
    domains: Mapping[str, float]
    seconds: Mapping[str, float]
    fixed_image: np.ndarray
    warped_before: np.ndarray
    warped_after: np.ndarray
    sdlogj: float
    conditioning: str = ""
    prealigned_from: str = ""
    started_from: str = ""


def summary(result: RegistrationResult) -> dict[str, str]:
    """Returns the numbers of a registration as text, name to value with its unit."""
    name = result.similarity
    rows = {
        f"{name} loss before": f"{result.similarity_before:.4f} (smaller is better)",
        f"{name} loss pre-aligned": f"{result.similarity_prealigned:.4f}"
        if result.similarity_prealigned is not None
        else "",
        "pre-aligned from": result.prealigned_from,
        f"{name} loss after": f"{result.similarity_after:.4f}",
        "folded voxels": f"{result.folding_percent:.4f} %",
        "SDlogJ": f"{result.sdlogj:.4f}",
    }
    rows = {name: text for name, text in rows.items() if text}
    if result.started_from:
        rows = {"started from": result.started_from, **rows}
    if result.conditioning:
        rows = {"told": result.conditioning, **rows}
    if result.domains:
        nearest = sorted(result.domains.items(), key=lambda item: -item[1])[:3]
        text = ", ".join(f"{name} {100 * share:.0f} %" for name, share in nearest)
        rows["closest domains"] = text
    if result.inverse_residual_mm is not None:
        mean, largest = result.inverse_residual_mm
        rows["inverse residual"] = f"{mean:.4f} mm mean, {largest:.3f} mm at most"
    for phase, taken in result.seconds.items():
        rows[f"seconds to {phase}"] = f"{taken:.1f}"
    return rows
