"""The variables of models: names, by which training knows their order, and shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.model import Model, block_name

Variables = dict[str, Any]  # {"params": ..., and "batch_stats": ... if the model has BatchNorm}


def block_names(model: Model) -> list[str]:
    """The parameter names of the unique blocks, from first to last."""
    return [block_name(s, b) for s, blocks in enumerate(model.blocks) for b in range(blocks)]


def is_head(part: str) -> bool:
    """Whether a part of a model belongs to its classification head."""
    return part.startswith("head")


def abstract_variables(model: Model) -> Any:
    """The shapes of the model's variables: "params", and "batch_stats" if it has BatchNorm."""
    return jax.tree.map(lambda leaf: leaf, _abstract_variables(model))


@functools.lru_cache(maxsize=16)  # tracing a model takes a second
def _abstract_variables(model: Model) -> Any:
    image = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image)
