"""The loss (cross-entropy with hard labels or with a teacher's soft labels) and the accuracy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax

from sret_jax.data.views.mixing import Targets
from sret_jax.errors import UserError, did_you_mean
from sret_jax.models.model import Model
from sret_jax.models.read_out import mean_of_heads

KINDS = ("soft", "hard", "deit_soft")


@dataclasses.dataclass(frozen=True)
class LabelLoss:
    """The loss of a batch with hard labels y and, optionally, probabilities p of a teacher.

    With a teacher L = (1 - w) distil(s', p) + w hard(s, y), where s are the logits of the student's
    first head and s' those of its last, which are the same in most models. distil(s', p) is
    soft(s', p, T), the cross-entropy with the teacher's most probable class, or the soft loss of
    DeiT's code. Without a teacher L = hard(m, y) for the mean m of the heads.

    Shen et al. (ECCV 2022) distil with soft labels, w = 0 and T = 1, Touvron et al. (ICML 2021)
    with hard ones and w = 1/2.

    Attributes:
      temperature: T, the temperature of student and teacher; above 0.
      hard_weight: w, the weight of the data's labels, in [0, 1].
      kind: "soft": all probabilities of the teacher; "hard": its most probable class; "deit_soft":
        all of them, weakened as in DeiT's code.
    """

    temperature: float = 1.0
    hard_weight: float = 0.0
    kind: str = "soft"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(did_you_mean("config.distill.kind", self.kind, KINDS))
        if not 0 < self.temperature < math.inf:
            raise UserError(f"config.distill.temperature={self.temperature} must be above 0")
        if self.kind == "hard" and self.temperature != 1:
            raise UserError(
                f"config.distill.temperature={self.temperature} changes nothing with "
                "config.distill.kind='hard', which takes the teacher's most probable class; set it "
                "to 1"
            )
        if not 0 <= self.hard_weight <= 1:
            raise UserError(f"config.distill.hard_weight={self.hard_weight} must be in [0, 1]")

    def check(self, model: Model) -> None:
        """Raises UserError if a head of this model would learn nothing beside a teacher."""
        if len(model.classifiers) > 1 and not 0 < self.hard_weight < 1:
            untrained = model.classifiers[0 if self.hard_weight == 0 else -1]
            raise UserError(
                f"config.distill.hard_weight={self.hard_weight} leaves the model's {untrained!r} "
                "untrained, because its first head learns from labels and its second from the "
                "teacher; use 0.5, as published"
            )

    def __call__(self, heads: tuple[jax.Array, ...], targets: Targets) -> jax.Array:
        """The loss in nats.

        Shapes: logits (B, K) of each head, {"hard": (B, K), optionally "soft": (B, K)} -> ().
        """
        if "soft" not in targets:
            return hard_label_loss(mean_of_heads(heads), targets["hard"])
        hard = hard_label_loss(heads[0], targets["hard"])
        if self.kind == "hard":
            distilled = hard_label_loss(heads[-1], most_probable(targets["soft"]))
        else:
            loss = soft_label_loss if self.kind == "soft" else deit_soft_loss
            distilled = loss(heads[-1], targets["soft"], self.temperature)
        return (1 - self.hard_weight) * distilled + self.hard_weight * hard


def most_probable(probabilities: jax.Array) -> jax.Array:
    """One-hot labels of the most probable classes: (B, K) -> (B, K)."""
    best, classes = probabilities.argmax(-1), probabilities.shape[-1]
    return jax.nn.one_hot(best, classes, dtype=probabilities.dtype)


def soft_label_loss(
    logits: jax.Array, probabilities: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """-mean_i sum_k p_ik log softmax(s_i / T)_k, where p_i = softmax(t_i / T) for teacher logits t.

    The loss has neither a one-hot term nor a factor T^2.

    Shapes: logits s (B, K), probabilities p (B, K) -> (), in nats.
    """
    return optax.losses.softmax_cross_entropy(logits / temperature, probabilities).mean()


def deit_soft_loss(
    logits: jax.Array, probabilities: jax.Array, temperature: float = 1.0
) -> jax.Array:
    """T^2/K mean_i sum_k p_ik (log p_ik - log softmax(s_i / T)_k), with p as in `soft_label_loss`.

    DeiT's code divides the sum by images and classes, so that with K = 1,000 classes this hardly
    counts beside the loss of labels. SReT's footnote 3 criticises this form, in which
    both teacher and student have a logarithm. Source: github.com/facebookresearch/deit, losses.py.

    Shapes: logits s (B, K), probabilities p (B, K) -> (), in nats.
    """
    log_q = jax.nn.log_softmax(logits / temperature)
    divergence = optax.losses.kl_divergence(log_q, probabilities)
    return temperature**2 / logits.shape[-1] * divergence.mean()


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
