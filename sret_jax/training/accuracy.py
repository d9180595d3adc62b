"""How predictions are counted."""

import jax
import jax.numpy as jnp


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k largest logits (all, if there are fewer than k).

    Shapes: logits (B, K), labels (B,) -> (B,) bool.
    """
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1)
