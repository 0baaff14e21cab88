"""Prompt bank, one prompt per training task, and the prompt generator.

From a pair's features a dynamic prompt is made, and compared with each static prompt of
the bank; their softmax-weighted sum, joined with the dynamic prompt, is the prompt that
the decoder sees. No task needs to be named, and an unknown one finds its relatives.

References:
  Xie et al., PromptReg: Universal medical image registration via task prompt learning
  and domain knowledge transfer, MICCAI 2025, section 2.2, and its released code, which
  differs.
"""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxreg.errors import UserError
from jaxreg.nn.conv import api
from jaxreg.nn.layers import ConvBlock, normal, uniform
from jaxreg.typing import Image

Bank = Float[Array, "Z D H W C"]
Readout = Literal["pooled_attention", "spatial"]
Orthogonality = Literal["cosine", "raw"]

_COSINE_FLOOR = 1e-8
_NORM_FLOOR = 1e-12


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The generator's form; the default is that of the released code.

    Attributes:
      tasks: Z, static prompts in the bank.
      temperature: of the softmax over the bank; 0.5 released, 0.1 in the paper. It is
        not among the weights.
      readout: what of the joined prompt reaches the decoder. "pooled_attention": its
        spatial mean through two linear layers, the same vector at all voxels (an
        attention with one key is no more), which the next normalisation almost removes;
        "spatial": itself, as the paper has it.
      static_block: whether the weighted sum passes a convolution block before it is
        joined; not in the paper.
      task_loss_on: what the task similarity compares with the task's static prompt: the
        weighted sum "processed" by that block, or as it is ("weighted", the paper).
      orthogonality: "cosine" of the normalised rows, or "raw" products (the paper).
    """

    tasks: int = 5
    temperature: float = 0.5
    readout: Readout = "pooled_attention"
    static_block: bool = True
    task_loss_on: Literal["processed", "weighted"] = "processed"
    orthogonality: Orthogonality = "cosine"

    def __post_init__(self):
        """Checks the choices.

        Raises:
          UserError: a bank without prompts, or a temperature of 0 or less.
        """
        if self.tasks < 1:
            raise UserError(f"tasks is {self.tasks}, a prompt bank needs 1 or more")
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}, it must be above 0")


def similarities(dynamic: Image, bank: Bank) -> Float[Array, "N Z"]:
    """Returns the cosine of each pair's dynamic prompt with each static one.

    Args:
      dynamic: N D H W C.
      bank: Z D H W C.
    """
    a, b = dynamic.reshape(len(dynamic), -1), bank.reshape(len(bank), -1)  # rows DHWC
    dot = jnp.einsum("nv,zv->nz", a, b, precision=jax.lax.Precision.HIGHEST)
    lengths = [jnp.maximum(_length(x), _COSINE_FLOOR) for x in (a, b)]
    return dot / (lengths[0][:, None] * lengths[1][None])


def _length(rows: jax.Array) -> jax.Array:
    """Euclidean norms of rows, with gradient 0 at 0."""
    squares = jnp.sum(rows**2, -1)
    positive = squares > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, squares, 1.0)), 0.0)


def orthogonality(bank: Bank, kind: Orthogonality = "cosine") -> Float[Array, ""]:
    """Returns how far the static prompts are from orthogonal: a Frobenius norm.

    Args:
      bank: Z D H W C.
      kind: "cosine": ``|B B' - I|`` of the normalised rows. "raw": ``|B B' - diag|`` of
        the rows as they are, which smaller prompts lower too.
    """
    rows = bank.reshape(len(bank), -1)  # Z DHWC
    if kind == "cosine":
        rows = rows / jnp.maximum(_length(rows), _NORM_FLOOR)[:, None]
    products = jnp.einsum("av,bv->ab", rows, rows, precision=jax.lax.Precision.HIGHEST)
    diagonal = jnp.eye(len(rows)) if kind == "cosine" else jnp.diag(jnp.diag(products))
    return _length((products - diagonal).reshape(1, -1))[0]


def task_distance(prompt: Image, bank: Bank, task: Int[Array, " N"]) -> jax.Array:
    """Returns ``(1 - cos(prompt, static prompt of the task))^2`` per pair, N in 0..4.

    Args:
      prompt: N D H W C.
      bank: Z D H W C.
      task: the row of each pair's task.
    """
    a, b = prompt.reshape(len(prompt), -1), bank.reshape(len(bank), -1)[task]  # N DHWC
    a, b = (x / jnp.maximum(_length(x), _NORM_FLOOR)[:, None] for x in (a, b))
    return (1.0 - jnp.sum(a * b, -1)) ** 2


class PromptGenerator(nn.Module):
    """The bank and what is made of it.

    Attributes:
      config: see `PromptConfig`.
      grid: of the bank and of the features, D H W.
      form: convolution form, see `jaxreg.nn.conv.api`.
    """

    config: PromptConfig
    grid: tuple[int, int, int]
    form: api.Form = "auto"

    @nn.compact
    def __call__(
        self, features: Image, task: Int[Array, " N"] | None = None
    ) -> tuple[Image, dict[str, Any]]:
        """Returns the prompt for features N D H W C, N D H W C, and its auxiliaries.

        Prompts are compared and weighed in float32, whatever the features' type is.

        Args:
          features: N D H W C, on the bank's grid.
          task: each pair's row in the bank, for the task similarity alone.

        Returns:
          (prompt, aux): "task_weights" N Z; "orthogonality"; and, where tasks are
          given, "task_similarity" N (a distance: 0 is alike).
        """
        config, c = self.config, features.shape[-1]

        def block(function, inputs, name):
            return ConvBlock(inputs, c, form=self.form, function=function, name=name)

        deviation = math.sqrt(2.0 / (1.0 + 0.01**2)) / math.sqrt(
            c * math.prod(self.grid)
        )
        shape = (*self.grid, c)
        bank = self.param("bank", normal(deviation), (config.tasks, *shape))
        template = self.param("template", normal(deviation), (1, *shape))
        template = jnp.broadcast_to(template, features.shape)  # N D H W C
        dynamic = block(api.conv3, 2 * c, "dynamic_0")((features, template))
        dynamic = block(api.conv3, c, "dynamic_1")(dynamic)
        alike = similarities(dynamic.astype(jnp.float32), bank)
        weights = jax.nn.softmax(alike / config.temperature, -1)
        weighted = jnp.einsum(
            "nz,zdhwc->ndhwc", weights, bank, precision=jax.lax.Precision.HIGHEST
        )
        static = weighted
        if config.static_block:
            static = block(api.conv3, c, "static")(weighted.astype(features.dtype))
        joined = block(api.conv3, 2 * c, "join_0")((dynamic, static))
        joined = block(api.conv1, c, "join_1")(joined)
        prompt = joined
        if config.readout == "pooled_attention":
            linear = functools.partial(
                nn.Dense,
                c,
                kernel_init=uniform(c),
                bias_init=uniform(c),
                precision=jax.lax.Precision.HIGHEST,
            )
            pooled = joined.astype(jnp.float32).mean((1, 2, 3))  # N C
            token = linear(name="value")(pooled)
            token = linear(name="out")(token)
            # N D H W C
            prompt = jnp.broadcast_to(token[:, None, None, None], features.shape)
        aux = {
            "task_weights": weights,
            "orthogonality": orthogonality(bank, config.orthogonality),
        }
        if task is not None:
            compared = static if config.task_loss_on == "processed" else weighted
            compared = compared.astype(jnp.float32)
            aux["task_similarity"] = task_distance(compared, bank, task)
        return prompt.astype(features.dtype), aux
