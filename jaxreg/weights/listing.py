"""List of published models and where their weights lie."""

import dataclasses

from jaxreg.weights import download, zoo
from jaxreg.weights.download import PathLike


@dataclasses.dataclass(frozen=True)
class ModelSummary:
    """What `jaxreg models` prints of a network; `location` is a path or a sentence."""

    name: str
    title: str
    parameters: int
    grid: tuple[int, ...]
    coverage: str
    licence: str
    paper: str
    location: str


def describe(*, cache_dir: PathLike | None = None) -> tuple[ModelSummary, ...]:
    """Returns one row for every network of `ZOO`; nothing is fetched.

    Args:
      cache_dir: where fetched weights are kept; `cache_dir()` if None.
    """
    folder = download.cache_folder(cache_dir)
    rows = []
    for name, card in zoo.ZOO.items():
        location = f"not downloaded: {zoo.url_of(card, None)}"
        for place in (folder / name, download.manual_steps(folder, name)):
            if place.exists():
                location = str(place)
                break
        rows.append(
            ModelSummary(
                name=name,
                title=card.title,
                parameters=card.parameters,
                grid=tuple(card.preprocessing["shape"]),
                coverage=card.coverage,
                licence=card.licence,
                paper=card.paper,
                location=location,
            )
        )
    return tuple(rows)
