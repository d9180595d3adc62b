"""How the state of a model changes from one application of a block to the next."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.model import Model
from sret_jax.models.variables import Variables


def dynamics(model: Model, variables: Variables, images: jax.Array) -> dict[str, list]:
    """Changes of the state x (B, N, C), as means over images.

    With x_0 the input of a block, x_l the state after its application l, u_l = x_l - x_(l-1) and
    norms over all tokens and channels of an image,

      relative_change  ||u_l|| / ||x_(l-1)||;
      cosine           <u_l, u_(l-1)> / (||u_l|| ||u_(l-1)||), None for l = 1;
      contraction      ||u_l|| / ||u_(l-1)||, None for l = 1: below 1 where the block contracts the
                       difference of successive states, as it does near a fixed point.

    Args:
      model: a model with exits (`Model.has_exits`).
      variables: the model's weights.
      images: normalised, (B, S, S, 3).

    Returns:
      Those three lists, with an entry for each application, from first to last, and
      "contraction_rate": per unique block the geometric mean of its contractions, or None if it is
      applied once.
    """
    found = jax.device_get(_changes(model, variables, images))
    figures: dict[str, list] = {"relative_change": [], "cosine": [], "contraction": []}
    for of_block in found:
        for name, values in zip(figures, of_block, strict=True):
            figures[name] += values.tolist()
    figures["contraction_rate"] = [_geometric_mean(ratios.tolist()) for *_, ratios in found]
    return {
        name: [None if value is None or math.isnan(value) else value for value in values]
        for name, values in figures.items()
    }


@functools.partial(jax.jit, static_argnums=0)
def _changes(model: Model, variables: Variables, images: jax.Array) -> list[tuple[jax.Array, ...]]:
    rngs = {"permutation": jax.random.key(0)}
    seen: Any = model.apply(variables, images, _inner_products, rngs=rngs, method="observed")
    return [_of_block(*of_block) for of_block in seen]


def _inner_products(before: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The update in at least float32, and the squared norm of the state before it."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    before, x = before.astype(wide), x.astype(wide)
    return x - before, jnp.sum(before**2, axis=(-2, -1))


def _of_block(updates: jax.Array, before: jax.Array) -> tuple[jax.Array, ...]:
    """relative_change, cosine and contraction of the applications of one block: (L,) each.

    Args:
      updates: u_l, (L, B, N, C).
      before: ||x_(l-1)||^2, (L, B).
    """
    norms = jnp.sqrt(jnp.sum(updates**2, axis=(-2, -1)))  # (L, B)
    products = jnp.sum(updates[1:] * updates[:-1], axis=(-2, -1))  # (L - 1, B)
    first = jnp.full(1, jnp.nan)
    return (
        (norms / jnp.sqrt(before)).mean(1),
        jnp.concatenate([first, (products / (norms[1:] * norms[:-1])).mean(1)]),
        jnp.concatenate([first, (norms[1:] / norms[:-1]).mean(1)]),
    )


def _geometric_mean(ratios: list[float]) -> float | None:
    known = [ratio for ratio in ratios if ratio > 0]  # nan is not
    return math.exp(sum(map(math.log, known)) / len(known)) if known else None
