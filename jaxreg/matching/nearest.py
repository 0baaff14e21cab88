"""Nearest neighbours between two scans' SAM embeddings.

Places are voxels of the images, P 3 integers along D, H and W. The embeddings live on
the fine grid, whose voxel q stands for the image's voxel 2 q: no half voxel is added.

References:
  Yan et al., SAM, IEEE TMI 2022; Liu et al., SAME, MICCAI 2021; Tian et al., SAME++,
  2023 (stable sampling).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxreg.models.sam import FINE_STRIDE, Embeddings, normalise
from jaxreg.space import sampling
from jaxreg.space.grid import Shape
from jaxreg.typing import Image

ROUNDS = 5
_SIMILARITIES = 2**26  # computed at a time: 256 MiB


@dataclasses.dataclass(frozen=True)
class Matches:
    """Pairs of places, on the host.

    Attributes:
      query: P 3, voxels of the first image, int64.
      key: P 3, the voxels of the second image that match them, int64.
      score: P, mean of fine and coarse cosine, at most 1, float32.
    """

    query: np.ndarray
    key: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        """The number of pairs."""
        return len(self.score)

    def where(self, chosen: np.ndarray) -> "Matches":
        """Returns the pairs that a mask or index names."""
        return Matches(self.query[chosen], self.key[chosen], self.score[chosen])


def descriptors(embeddings: Embeddings, *, aligned: bool = True) -> Image:
    """Returns coarse and fine embeddings on the fine grid, N D H W 2C.

    Half the inner product of two descriptors is the mean of their two cosines.

    Args:
      embeddings: of one network.
      aligned: whether the coarse ones are resized with aligned corner centres, as SAME
        does, or with half-pixel ones, as SAM's own tools and its training do.
    """
    shape = embeddings.fine.shape[1:4]
    resize = sampling.resize_aligned if aligned else sampling.resize_half_pixel
    coarse = normalise(resize(embeddings.coarse, shape))
    return jnp.concatenate([coarse, embeddings.fine], -1)


def start_points(
    shape: Shape, *, stride: int = 8, mask: np.ndarray | None = None
) -> np.ndarray:
    """Returns a regular grid of places to find in another image, P 3.

    The middles of cubes of `stride` voxels, a half rounded down, or the last voxel of
    an axis that is too short for that; H slowest, then W, then D.

    Args:
      shape: of the image, D H W.
      stride: voxels between places, at least 2.
      mask: D H W; places with zero are left out.
    """
    d, h, w = (
        min(stride // 2 - 1, n - 1)
        + stride * np.arange(int((n - -(-stride // 2)) / stride) + 1)
        for n in shape
    )
    # H W D, as the original has it; the order decides nothing but equal scores.
    grid = np.stack(np.meshgrid(h, w, d, indexing="ij"), -1).reshape(-1, 3)
    points = grid[:, [2, 0, 1]]
    return points if mask is None else points[mask[tuple(points.T)] != 0]


@jax.jit
def best(queries: jax.Array, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The key of the largest inner product with each query.

    Args:
      queries: P C.
      keys: V C.

    Returns:
      (index, product), each P; the first of equal ones.
    """
    count, voxels = queries.shape[0], keys.shape[0]
    size = int(np.clip(_SIMILARITIES // voxels, 1, count))
    chunks = -(-count // size)
    padded = jnp.pad(queries, ((0, chunks * size - count), (0, 0)))

    def of_chunk(chunk):  # size V
        products = jnp.matmul(chunk, keys.T, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmax(products, 1), jnp.max(products, 1)

    index, product = jax.lax.map(of_chunk, padded.reshape(chunks, size, -1))
    return index.reshape(-1)[:count], product.reshape(-1)[:count]


@functools.partial(jax.jit, static_argnames="rounds")
def _cycle(start, query, key, *, rounds):
    """Goes to the best match and back, `rounds` times, from flat indices P.

    Returns:
      The start of the last round, its match, where that leads back, and its score.
    """

    def go(carry, _):
        there, _ = best(query[carry], key)
        back, product = best(key[there], query)
        return back, (carry, there, back, product / 2)

    _, rows = jax.lax.scan(go, start, length=rounds)
    return jax.tree.map(lambda row: row[-1], rows)


def _flat(points: np.ndarray, shape: Shape) -> jax.Array:
    """Image voxels P 3 to flat indices of the fine grid that holds them."""
    fine = np.minimum(np.asarray(points) // FINE_STRIDE, np.asarray(shape) - 1)
    return jnp.asarray(np.ravel_multi_index(tuple(fine.T), shape))


def _places(index: jax.Array | np.ndarray, shape: Shape) -> np.ndarray:
    """Flat indices of the fine grid to image voxels P 3."""
    return FINE_STRIDE * np.stack(np.unravel_index(np.asarray(index), shape), -1)


def _rows(descriptors: Image) -> jax.Array:
    """1 D H W C to V C."""
    if descriptors.ndim != 5 or descriptors.shape[0] != 1:
        raise ValueError(
            f"descriptors have shape {descriptors.shape}, expected 1 D H W C"
        )
    return jnp.reshape(descriptors, (-1, descriptors.shape[-1]))


def match(points: np.ndarray, query: Image, key: Image) -> Matches:
    """Returns for each place the most similar voxel of the other image.

    Memory is bounded: the similarities to a whole volume exist for a few places at a
    time.

    Args:
      points: P 3, voxels of the query's image.
      query: descriptors, 1 D H W C.
      key: descriptors of the other image, 1 D' H' W' C.

    Raises:
      ValueError: the descriptors are not those of one image each.
    """
    points = np.asarray(points, np.int64).reshape(-1, 3)
    rows, others = _rows(query), _rows(key)
    if not len(points):
        return Matches(points, points, np.zeros(0, np.float32))
    index, product = best(rows[_flat(points, query.shape[1:4])], others)
    found = _places(index, key.shape[1:4])
    return Matches(points, found, np.asarray(product) / 2)


def stable_match(
    points: np.ndarray, query: Image, key: Image, *, rounds: int = ROUNDS
) -> Matches:
    """Returns pairs of voxels that are each other's most similar ones.

    Every place walks to its match and back; after some rounds most have come to such
    a pair, and the others are dropped. Several places may end in one pair, which is
    listed once. Queries are therefore voxels near the start points.

    Args:
      points: P 3, voxels of the query's image to start from.
      query: descriptors, 1 D H W C.
      key: descriptors of the other image, 1 D' H' W' C.
      rounds: there and back, at least 1.

    Returns:
      Pairs in the order of key, then query, along D, H and W.

    Raises:
      ValueError: the descriptors are not those of one image each.
    """
    points = np.asarray(points, np.int64).reshape(-1, 3)
    rows, others = _rows(query), _rows(key)
    if not len(points):
        return Matches(points, points, np.zeros(0, np.float32))
    start = _flat(points, query.shape[1:4])
    found = _cycle(start, rows, others, rounds=rounds)
    before, there, back, score = map(np.asarray, found)
    stays = before == back
    pairs, first = np.unique(
        np.stack([there[stays], before[stays]], -1), axis=0, return_index=True
    )
    return Matches(
        _places(pairs[:, 1], query.shape[1:4]),
        _places(pairs[:, 0], key.shape[1:4]),
        score[stays][first],
    )


def keep(
    matches: Matches,
    threshold: float = 0.7,
    *,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
) -> Matches:
    """Returns the pairs that are alike enough and lie in the masks.

    Args:
      matches: any.
      threshold: scores must be above it.
      query_mask: D H W of the first image; only where it is not zero.
      key_mask: the same for the second image.
    """
    chosen = matches.score > threshold
    for mask, points in ((query_mask, matches.query), (key_mask, matches.key)):
        if mask is not None:
            chosen &= mask[tuple(points.T)] != 0
    return matches.where(chosen)


def correspond(
    query: Embeddings,
    key: Embeddings,
    shape: Shape,
    *,
    stride: int = 8,
    threshold: float = 0.7,
    query_mask: np.ndarray | None = None,
    key_mask: np.ndarray | None = None,
    aligned: bool = True,
) -> Matches:
    """Returns the places of two images that are the same, as SAME finds them.

    From a grid of places to stable pairs, of which those that are alike enough and lie
    in the masks are kept.

    Args:
      query: of the first image (of the moving one, where a transform is wanted).
      key: of the second image.
      shape: of the first image.
      stride: see `start_points`.
      threshold: see `keep`.
      query_mask: D H W of the first image; also of the places to start from.
      key_mask: D' H' W' of the second image.
      aligned: see `descriptors`.

    Raises:
      ValueError: the embeddings are not those of one image each.
    """
    points = start_points(shape, stride=stride, mask=query_mask)
    matches = stable_match(
        points,
        descriptors(query, aligned=aligned),
        descriptors(key, aligned=aligned),
    )
    return keep(matches, threshold, query_mask=query_mask, key_mask=key_mask)
