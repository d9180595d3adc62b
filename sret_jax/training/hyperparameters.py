"""The numbers of a run that its compiled step takes as arguments.

Runs that differ only in these numbers share one compiled program.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from ml_collections import ConfigDict

Scalar = Any  # a NumPy scalar; on the devices, a jax.Array


class Schedule(struct.PyTreeNode):
    """Linear warm-up of the learning rate, then half a cosine (Loshchilov, Hutter: SGDR, 2017).

    With W = warmup_steps and D = decay_steps,

        lr(t) = peak - rise (1 - t / W)                                     for t < W,
        lr(t) = peak ((1 - f) (1 + cos(pi (t - W) / D)) / 2 + f)            up to W + D,

    and lr(t) = f peak afterwards.

    Attributes:
      peak: learning rate at the end of the warm-up.
      rise: peak minus the learning rate of step 0.
      final_share: f, the last learning rate divided by the peak.
      warmup_steps: W; 0 for no warm-up.
      decay_steps: D, at least 1.
    """

    peak: Scalar
    rise: Scalar
    final_share: Scalar
    warmup_steps: Scalar
    decay_steps: Scalar

    def __call__(self, step: Scalar) -> jax.Array:
        """The learning rate at a step, float32."""
        # Multiplying by 1 / W and 1 / D rounds as in optax.warmup_cosine_decay_schedule, whose
        # divisions by constants XLA compiles to such products.
        left = 1 - jnp.minimum(step, self.warmup_steps) * (1 / jnp.maximum(self.warmup_steps, 1))
        warmup = self.peak - self.rise * left
        decayed = jnp.minimum(jnp.asarray(step - self.warmup_steps, jnp.float32), self.decay_steps)
        cosine = 0.5 * (1 + jnp.cos(decayed * (jnp.pi * (1 / self.decay_steps))))
        decay = self.peak * ((1 - self.final_share) * cosine + self.final_share)
        return jnp.where(step < self.warmup_steps, warmup, decay)


class Hyperparameters(struct.PyTreeNode):
    """Scalars that the step takes as arguments.

    Attributes:
      seed: seed of augmentation, drop path and permutations.
      schedule: schedule of the learning rate.
      weight_decay: weight decay of the kernels.
      ema_rate: 1 - d, where d is the decay of the moving average. Near d = 1, float32 represents
        1 - d far more precisely than d.
      ema_warmup: whether d rises to its value during the first steps.
    """

    seed: Scalar
    schedule: Schedule
    weight_decay: Scalar
    ema_rate: Scalar
    ema_warmup: Scalar

    def ema_rate_at(self, step: Scalar) -> jax.Array:
        """1 - d(t) of the moving average after step t: ema <- d(t) ema + (1 - d(t)) variables.

        With warm-up d(t) = min(d, (1 + t) / (10 + t)), so that the average soon forgets the initial
        weights; otherwise d(t) = d.
        """
        return jnp.where(
            self.ema_warmup, jnp.maximum(self.ema_rate, 9 / (10 + step)), self.ema_rate
        )


def make_schedule(
    optim: Any, batch_size: int, steps_per_epoch: float, total_steps: int
) -> Schedule:
    """The schedule of a run: its peak is lr_per_512 * B / 512, its last learning rate min_lr.

    Args:
      optim: the section config.optim.
      batch_size: B, images per step.
      steps_per_epoch: N / B, not rounded.
      total_steps: number of steps of the whole run.
    """
    peak = optim.lr_per_512 * batch_size / 512
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), total_steps)
    return Schedule(
        peak=np.float32(peak),
        rise=np.float32(peak - optim.warmup_lr),
        final_share=np.float32(optim.min_lr / peak if peak else 0.0),
        warmup_steps=np.int32(warmup),
        decay_steps=np.float32(max(total_steps - warmup, 1)),
    )


def ema_rate(config: ConfigDict) -> float:
    """1 - d for the decay d of the moving average per step, after its warm-up.

    d = exp(-B / H) for batches of B images and H = config.ema_images, so that the average looks
    back over H images whatever B is (Busbridge et al., "How to Scale Your EMA", 2023). If
    config.ema_decay is given, it is d.
    """
    if config.ema_decay is None:
        return -math.expm1(-config.batch_size / config.ema_images)
    return 1 - config.ema_decay


def make_hyperparameters(
    config: ConfigDict, steps_per_epoch: float, total_steps: int
) -> Hyperparameters:
    """The hyperparameters of a config, as NumPy scalars."""
    return Hyperparameters(
        seed=np.uint32(config.seed),
        schedule=make_schedule(config.optim, config.batch_size, steps_per_epoch, total_steps),
        weight_decay=np.float32(config.optim.weight_decay),
        ema_rate=np.float32(ema_rate(config)),
        ema_warmup=np.bool_(config.ema_warmup),
    )
