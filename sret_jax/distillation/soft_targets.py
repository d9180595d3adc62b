"""A student's soft targets: a teacher's probabilities, complete or rebuilt from stored ones."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def soft_labels(logits: jax.Array, temperature: float = 1.0) -> jax.Array:
    """softmax(t / T) of a teacher's logits t in float32: the student's soft targets.

    Shapes: (B, K) -> (B, K).
    """
    return jax.nn.softmax(logits.astype(jnp.float32) / temperature)


def marginal_smoothing(
    probabilities: ArrayLike, classes: ArrayLike | None, num_classes: int
) -> jax.Array:
    """Rebuilds all probabilities from the k largest: other classes share the rest equally.

    p_c = q_j where c = classes_j, otherwise (1 - sum_j q_j) / (K - k). Fast Knowledge Distillation
    calls this "MS" (Shen and Xing 2022, section 3.2).

    Shapes: probabilities q (B, k), classes (B, k), or None if q contains all K classes in order
    -> (B, K) float32.
    """
    kept = jnp.asarray(probabilities, jnp.float32)
    if classes is None:
        return kept
    rows, k = kept.shape
    left = jnp.maximum(1 - kept.sum(axis=1, keepdims=True), 0)  # the sum may round above 1
    others = jnp.broadcast_to(left / max(num_classes - k, 1), (rows, num_classes))
    return jnp.put_along_axis(others, jnp.asarray(classes, jnp.int32), kept, axis=1, inplace=False)
