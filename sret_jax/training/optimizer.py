"""AdamW, its learning-rate schedule and which parameters decay."""

from typing import Any

import jax
import optax


def make_schedule(optim: Any, batch_size: int, steps_per_epoch: float, total_steps: int):
    """Linear warm-up, then a cosine.

    lr(t) rises from warmup_lr to lr_per_512 * B / 512 over `warmup_epochs`, then follows half a
    cosine to min_lr at the last step (SReT section 4.1).

    Args:
      optim: the section config.optim.
      batch_size: B, images per step.
      steps_per_epoch: N / B, not rounded.
      total_steps: of the whole run.

    Returns:
      An optax schedule, step -> learning rate.
    """
    peak = optim.lr_per_512 * batch_size / 512
    warmup = min(round(optim.warmup_epochs * steps_per_epoch), total_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=optim.warmup_lr if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(total_steps, warmup + 1),
        end_value=optim.min_lr,
    )


def make_optimizer(optim: Any) -> optax.GradientTransformation:
    """AdamW's direction d, of which the train step takes params <- params - lr(step) * d.

    d = m / (sqrt(v) + eps) + weight_decay * params, the decay on kernels only (Loshchilov and
    Hutter, equation 12); m and v are the bias-corrected moments of the gradient, clipped before
    by its global norm if clip_norm is not 0.

    Args:
      optim: the section config.optim.
    """
    clip = optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.add_decayed_weights(optim.weight_decay, mask=decay_mask),
    )


def decay_mask(params: Any) -> Any:
    """True for the kernels: no norm, bias, position or residual coefficient decays.

    It goes by name, for the NLLs' biases and scales are 2-D, stacked over loops.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
