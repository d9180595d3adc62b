"""Losses and how predictions are counted."""

import jax
import jax.numpy as jnp
import optax


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Cross entropy with label smoothing: -sum_k q_k log softmax(logits)_k, q = (1-s) onehot + s/K.

    Shapes: logits (B, K), integer labels (B,) -> (B,), in nats.
    """
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return optax.losses.softmax_cross_entropy(logits, targets)


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k largest logits (all, if there are fewer than k).

    Shapes: logits (B, K), labels (B,) -> (B,) bool.
    """
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1)
