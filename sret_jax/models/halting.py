"""Exit per image: each image leaves the last block after its own number of applications.

After every application of the last block the model reads out logits s (an exit, see `Model`), and a
rule decides which images leave. With p = softmax(s), x the state after the application and x' that
before it:

  entropy:T      -sum_k p_k log p_k <= T, in nats
  confidence:P   max_k p_k >= P
  stable         the likeliest class is that of the application before
  residual:R     ||x - x'|| / ||x'|| <= R over all tokens and channels: x is nearly a fixed point
                 of the block, as in deep equilibrium models (Bai et al., 2019)

After the last application all images leave. No rule has parameters of its own.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.errors import UserError, did_you_mean
from sret_jax.models.recursion import Recursion

KINDS = ("entropy", "confidence", "stable", "residual")
EXAMPLES = "'entropy:0.4', 'confidence:0.9', 'stable' or 'residual:0.01'"


class Signals(NamedTuple):
    """What a rule looks at after an application, for each image: (B,) each.

    Attributes:
      entropy: of the class probabilities, in nats.
      confidence: the largest probability.
      label: the likeliest class.
      residual: ||x - x'|| / ||x'||.
    """

    entropy: jax.Array
    confidence: jax.Array
    label: jax.Array
    residual: jax.Array


class Exited(NamedTuple):
    """The images of a batch, as far as they have left.

    Attributes:
      logits: those of the exit that an image left at, or else of the last one so far, (B, K).
      label: the likeliest class so far, (B,).
      loops: number of applications, (B,).
      done: whether the image has left, (B,).
    """

    logits: jax.Array
    label: jax.Array
    loops: jax.Array
    done: jax.Array


@dataclasses.dataclass(frozen=True)
class ExitRule:
    """When an image leaves.

    Attributes:
      kind: one of KINDS.
      threshold: T, P or R; 0 for "stable".
    """

    kind: str
    threshold: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "ExitRule":
        """Reads "entropy:0.4", "confidence:0.9", "stable" or "residual:0.01".

        Raises:
          UserError: the text is no such rule, or its threshold is out of range.
        """
        kind, colon, number = text.partition(":")
        if kind not in KINDS:
            raise UserError(f"{did_you_mean('exit rule', kind, KINDS)}; write {EXAMPLES}")
        if kind == "stable":
            if colon:
                raise UserError(f"exit={text!r}: the rule 'stable' takes no threshold")
            return cls(kind)
        try:
            threshold = float(number)
        except ValueError as e:
            raise UserError(
                f"exit={text!r} needs a number after the colon, as in {EXAMPLES}"
            ) from e
        if kind == "confidence" and not 0 < threshold <= 1:
            raise UserError(f"exit={text!r}: a confidence is a probability in (0, 1]")
        if not 0 < threshold < math.inf:
            raise UserError(f"exit={text!r}: the threshold must be above 0")
        return cls(kind, threshold)

    def __str__(self) -> str:
        return self.kind if self.kind == "stable" else f"{self.kind}:{self.threshold:g}"

    def leaves(self, now: Signals, label_before: Any) -> Any:
        """Which images leave: (B,) bool, or the shape of the signals.

        Args:
          now: the signals after an application.
          label_before: the likeliest class after the application before; -1 after none.
        """
        if self.kind == "entropy":
            return now.entropy <= self.threshold
        if self.kind == "confidence":
            return now.confidence >= self.threshold
        if self.kind == "stable":
            return now.label == label_before
        return now.residual <= self.threshold

    def exits(self, found: Signals) -> np.ndarray:
        """The number of loops after which each image leaves.

        Args:
          found: NumPy arrays of all exits, (loops, images) each.
        """
        before = np.concatenate([np.full_like(found.label[:1], -1), found.label[:-1]])
        leaves = np.array(self.leaves(found, before))  # (loops, images)
        leaves[-1] = True
        return leaves.argmax(0) + 1

    def run(
        self, recursion: Recursion, x: jax.Array, read: Callable[[jax.Array], jax.Array]
    ) -> Exited:
        """Applies the last block until all images of the batch have left.

        Args:
          recursion: that of the last block.
          x: its input, (B, N, C).
          read: reads out a state: (B, N, C) -> (B, K).
        """
        shape, batch = jax.eval_shape(read, x), x.shape[0]
        nothing = Exited(
            logits=jnp.zeros(shape.shape, shape.dtype),
            label=jnp.full(batch, -1),
            loops=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
        )

        def update(exited: Exited, before: jax.Array, x: jax.Array) -> Exited:
            logits = read(x)
            now = signals(logits, before, x)
            new = Exited(logits, now.label, exited.loops + 1, self.leaves(now, exited.label))
            return jax.tree.map(
                lambda old, new: jnp.where(
                    exited.done.reshape(-1, *(1,) * (new.ndim - 1)), old, new
                ),
                exited,
                new,
            )

        return recursion.until(x, nothing, update, lambda exited: exited.done.all())


def signals(logits: jax.Array, before: jax.Array, x: jax.Array) -> Signals:
    """What rules look at.

    Args:
      logits: read out after an application, (..., B, K).
      before: the state before it, (..., B, N, C).
      x: the state after it, (..., B, N, C).
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    before, x = before.astype(wide), x.astype(wide)
    logp = jax.nn.log_softmax(logits)
    return Signals(
        entropy=-jnp.sum(jnp.exp(logp) * logp, axis=-1),
        confidence=jnp.exp(logp.max(-1)),
        label=logits.argmax(-1),
        residual=_norm(x - before) / _norm(before),
    )


def _norm(x: jax.Array) -> jax.Array:
    """The norm over tokens and channels: (..., N, C) -> (...)."""
    return jnp.sqrt(jnp.sum(x**2, axis=(-2, -1)))
