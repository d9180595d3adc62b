"""The loss (cross-entropy with hard labels or with a teacher's soft labels) and the accuracy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from sret_jax.data.views.mixing import Targets
from sret_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LabelLoss:
    """The loss of a batch with hard labels y and, optionally, soft labels p.

    With soft labels L = (1 - w) soft(s, p, T) + w hard(s, y), without L = hard(s, y), where s are
    the student's logits. SReT distils with w = 0 and T = 1: soft labels only (section 4.1).

    Attributes:
      temperature: T, the temperature of student and teacher; above 0.
      hard_weight: w, the weight of the hard loss, in [0, 1].
    """

    temperature: float = 1.0
    hard_weight: float = 0.0

    def __post_init__(self):
        if not 0 < self.temperature < math.inf:
            raise UserError(f"config.distill.temperature={self.temperature} must be above 0")
        if not 0 <= self.hard_weight <= 1:
            raise UserError(f"config.distill.hard_weight={self.hard_weight} must be in [0, 1]")

    def __call__(self, logits: jax.Array, targets: Targets) -> jax.Array:
        """Shapes: logits (B, K), {"hard": (B, K), optionally "soft": (B, K)} -> (), in nats."""
        hard = hard_label_loss(logits, targets["hard"])
        if "soft" not in targets:
            return hard
        soft = soft_label_loss(logits, targets["soft"], self.temperature)
        return (1 - self.hard_weight) * soft + self.hard_weight * hard


def soft_label_loss(
    logits: jax.Array, probabilities: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """-mean_i sum_k p_ik log softmax(s_i / T)_k, where p_i = softmax(t_i / T) for teacher logits t.

    The loss has neither a one-hot term nor a factor T^2.

    Shapes: logits s (B, K), probabilities p (B, K) -> (), in nats.
    """
    return optax.losses.softmax_cross_entropy(logits / temperature, probabilities).mean()


def hard_label_loss(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-mean_i sum_k y_ik log softmax(s_i)_k for one-hot labels y, which may be smoothed and mixed.

    Shapes: logits s (B, K), targets y (B, K) -> (), in nats.
    """
    return optax.losses.softmax_cross_entropy(logits, targets).mean()


def in_top_k(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether the label is among the k largest logits, or among all if there are fewer than k.

    Shapes: logits (B, K), labels (B,) -> (B,) bool.
    """
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1)
