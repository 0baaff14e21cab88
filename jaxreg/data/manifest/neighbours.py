"""Pairs of neighbours in a manifest."""

from collections.abc import Iterator, Sequence

from jaxreg.data.manifest.records import Record


def neighbour_pairs(
    records: Sequence[Record], neighbours: int = 3, *, across_modalities: bool = False
) -> list[tuple[Record, Record]]:
    """Returns pairs (fixed, moving) in which all images take part about equally.

    Sorted by name, each subject is fixed image for the next three, cyclically, within
    its dataset, region, modality and session (its first image there, if it has
    several). Intra pairs stay within subject and region, sorted by session; as in
    `sampler.sampler`, images of one session are aligned and no pair, unless the subject
    has that session only.

    Args:
      records: of one split.
      neighbours: moving images per fixed image, fewer where there are no more.
      across_modalities: inter pairs may be of two modalities: each image is fixed, and
        the subjects that follow take turns in which of their modalities is moving.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        if record.pairing == "intra":
            same = (record.subject,)
        elif across_modalities:
            same = (record.session,)
        else:
            same = (record.modality.lower(), record.session)
        key = (record.dataset, record.region, record.pairing, *same)
        groups.setdefault(key, []).append(record)
    pairs: list[tuple[Record, Record]] = []
    for _, group in sorted(groups.items()):
        group.sort(key=lambda r: (r.subject, r.session, str(r.image)))
        if group[0].pairing == "inter":
            pairs += _inter_pairs(group, neighbours)
        else:
            pairs += _intra_pairs(group, neighbours)
    return pairs


def _inter_pairs(
    group: Sequence[Record], neighbours: int
) -> Iterator[tuple[Record, Record]]:
    """Yields each subject's first image of a modality with those of the next ones."""
    subjects: dict[str, dict[str, Record]] = {}
    for record in group:
        images = subjects.setdefault(record.subject, {})
        images.setdefault(record.modality.lower(), record)
    shown = [[image for _, image in sorted(i.items())] for i in subjects.values()]
    for i, images in enumerate(shown):
        for place, fixed in enumerate(images):
            for step in range(1, min(neighbours, len(shown) - 1) + 1):
                others = shown[(i + step) % len(shown)]
                yield fixed, others[(place + step) % len(others)]


def _intra_pairs(
    group: Sequence[Record], neighbours: int
) -> Iterator[tuple[Record, Record]]:
    """Yields each image of a subject with the next ones of its other sessions."""
    alone = len({record.session for record in group}) == 1
    for i, fixed in enumerate(group):
        others = [
            moving
            for moving in (*group[i + 1 :], *group[:i])
            if alone or moving.session != fixed.session
        ]
        yield from ((fixed, moving) for moving in others[:neighbours])
