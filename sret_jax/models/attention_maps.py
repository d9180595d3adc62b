"""Where each application of a model's blocks attends to."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from sret_jax.models.apply import evaluation_logits
from sret_jax.models.layers.attention import SlicedAttention, split
from sret_jax.models.layers.windows import WindowAttention, Windows
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables


def attention_maps(model: Model, variables: Variables, images: jax.Array) -> list[np.ndarray]:
    """The attention that each token of the image receives, in every application of a block.

    In a model with a class token it is that of the class token's query, in other models the mean of
    the queries that see the token: those of its slice or window. It is the mean over the heads, and
    relative to attention that is the same for all tokens, which is 1.

    Args:
      model: from `load` or `create_model`.
      variables: the model's weights.
      images: a few normalised images, (B, S, S, 3).

    Returns:
      For each application, from first to last, (B, H, W) of the grid of its stage.

    Raises:
      ValueError: the model's blocks do not attend.
    """
    if not model.stages[0].heads:
        raise ValueError(f"a {type(model).__name__} has no attention maps: {model.why_unsliced}")
    plain = model.clone(attention="xla", mlp="xla", mesh=None, remat="none")
    found: list[jax.Array] = []

    def collect(next_method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        received = RECEIVED.get((type(context.module), context.method_name))
        if received and not isinstance(args[0], jax.core.Tracer):
            found.append(received(context.module, *args))
        return next_method(*args, **kwargs)

    # Without compilation a scan is a loop in Python, so that every application is seen.
    with jax.disable_jit(), nn.intercept_methods(collect):
        evaluation_logits(plain, variables, images)
    sides = [
        stage.side
        for stage, blocks in zip(model.stages, model.blocks, strict=True)
        for _ in range(blocks * model.loops)
    ]
    return [
        np.asarray(tokens).reshape(-1, side, side)
        for tokens, side in zip(found, sides, strict=True)
    ]


def _of_slices(
    module: SlicedAttention, qkv: jax.Array, permutation: jax.Array | None, groups: int
) -> jax.Array:
    """Attention that tokens receive inside their slice; of the first token's query, if any."""
    if module.prefix:
        return _of_class_token(module, qkv, permutation, groups)
    order = np.arange(qkv.shape[1]) if permutation is None else np.asarray(permutation)
    q, k, _ = split(qkv[:, order], module.heads, groups)  # (B, G, heads, n, d)
    received = _softmax(q, k).sum(3)  # over queries: 1 if attention is the same for all tokens
    return received.mean(2).reshape(len(qkv), -1)[:, np.argsort(order)]  # (B, N)


def _of_class_token(
    module: SlicedAttention, qkv: jax.Array, permutation: jax.Array | None, groups: int
) -> jax.Array:
    """Attention of the class token, which sees all tokens whatever the slices."""
    del permutation, groups
    q, k, _ = split(qkv, module.heads, 1)  # (B, 1, heads, p + N, d)
    weights = _softmax(q[..., :1, :], k)  # (B, 1, heads, 1, p + N)
    return weights.mean((1, 2, 3))[:, module.prefix :] * qkv.shape[1]


def _of_windows(
    module: WindowAttention, qkv: jax.Array, bias: jax.Array, windows: Windows
) -> jax.Array:
    """Attention that tokens receive inside their window."""
    bias = bias[None, None]
    if windows.shift:
        bias = bias + windows.mask()[None, :, None]
    q, k, _ = split(qkv, module.heads, windows.count)
    received = _softmax(q, k, bias).sum(3).mean(2)  # (B, count, size^2)
    return windows.join(received.reshape(len(qkv), -1)[..., None])[..., 0]


def _softmax(q: jax.Array, k: jax.Array, bias: jax.Array | float = 0.0) -> jax.Array:
    scores = jnp.einsum("bghnd,bghmd->bghnm", q, k) * q.shape[-1] ** -0.5
    return jax.nn.softmax(scores.astype(jnp.float32) + bias, axis=-1)


RECEIVED: dict[tuple[type, str], Callable[..., jax.Array]] = {
    (SlicedAttention, "_attend"): _of_slices,
    (SlicedAttention, "_attend_with_prefix"): _of_class_token,
    (WindowAttention, "_attend"): _of_windows,
}
