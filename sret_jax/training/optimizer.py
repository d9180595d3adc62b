"""AdamW, with weight decay on kernels only and a learning rate that may differ by layer."""

import functools
import re
import sys
from collections.abc import Iterable
from typing import Any

import jax
import optax

from sret_jax.models.variables import is_head


def make_optimizer(optim: Any) -> optax.GradientTransformationExtraArgs:
    """Computes AdamW's direction d; the train step then sets params <- params - lr(step) * d.

    The update takes the weight decay w as an argument: update(gradient, state, params,
    weight_decay=w).

    d = f * (m / (sqrt(v) + eps) + w * params), with the decay on kernels only (Loshchilov and
    Hutter, equation 12). m and v are the bias-corrected moments of the gradient. If clip_norm is
    not 0, the gradient is first clipped by its global norm. f is `layer_factor`, which is 1 except
    in fine-tuning. With freeze_backbone, d is 0 for everything but the head, and Adam stores
    moments for the head only.

    Args:
      optim: the section config.optim.
    """
    steps = [
        optax.clip_by_global_norm(optim.clip_norm) if optim.clip_norm else optax.identity(),
        optax.scale_by_adam(b1=0.9, b2=0.999, eps=1e-8),
        optax.masked(_add_decayed_weights(), decay_mask),
    ]
    if optim.layer_decay != 1 or optim.backbone_lr != 1:
        steps.append(_scale_by_layer(optim.layer_decay, optim.backbone_lr))
    optimizer = optax.chain(*steps)
    if optim.freeze_backbone:
        return optax.partition({True: optimizer, False: optax.set_to_zero()}, _is_head)
    return optimizer


def decay_mask(params: Any) -> Any:
    """True for kernels; norms, biases, positions, tokens and residual coefficients do not decay.

    Kernels are recognised by name, because the rows of NLLs and adapters are stacked over loops,
    which makes even biases 2-D. Of adapters, LoRA and linear input injection are kernels.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def _add_decayed_weights() -> optax.GradientTransformationExtraArgs:
    """`optax.add_decayed_weights`, but the update takes the rate as an argument."""

    def update(direction: Any, state: Any, params: Any, *, weight_decay: Any, **_: Any) -> Any:
        return optax.add_decayed_weights(weight_decay).update(direction, state, params)

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def layer_factor(
    part: str, parts: Iterable[str], *, layer_decay: float = 1.0, backbone_lr: float = 1.0
) -> float:
    """The factor f on the learning rate of one part of the model.

    f = layer_decay^k, where k is the number of layers between the part and the head, as in BEiT
    (Bao et al., 2022), times backbone_lr for everything but the head. A unique block, its NLLs and
    its adapters form a layer. A pooling belongs to the layer of the block after it, and the last
    norm to that of the head. All other parts, such as the stem and the positions, form the lowest
    layer.

    Args:
      part: name of the part, e.g. "stage0_block1".
      parts: names of all parts of the model.
      layer_decay: in (0, 1].
      backbone_lr: in (0, 1].
    """
    layers = sorted({_layer(name) for name in parts})
    factor = layer_decay ** (len(layers) - 1 - layers.index(_layer(part)))
    return factor if is_head(part) else factor * backbone_lr


def _layer(part: str) -> tuple[int, int]:
    """The position of a part in the order of layers: stage1_block2 -> (1, 2), pool1 -> (1, 0)."""
    if part == "norm" or is_head(part):
        return (sys.maxsize, 0)
    match = re.match(r"(?:stage|pool)(\d+)(?:_block(\d+))?", part)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _scale_by_layer(layer_decay: float, backbone_lr: float) -> optax.GradientTransformation:
    def scale(direction: Any, params: Any) -> Any:
        del params
        factor = functools.partial(layer_factor, layer_decay=layer_decay, backbone_lr=backbone_lr)
        return {
            name: optax.tree.scale(factor(name, direction), part)
            for name, part in direction.items()
        }

    return optax.stateless(scale)


def _is_head(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: is_head(path[0].key), params)
