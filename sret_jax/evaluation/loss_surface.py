"""The loss around trained weights, in a plane of two random directions (Li et al., 2018)."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.models.apply import evaluation_logits, normalise
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables
from sret_jax.parallel.mesh import is_stacked

POSITIONS = 16  # of the plane in one call of the compiled program

Path = tuple[str, ...]
Batch = dict[str, jax.Array]


def filter_normalised_direction(params: Any, key: jax.Array) -> Any:
    """A random direction d whose filters are as long as those of the weights w.

    d_f <- d_f |w_f| / |d_f| for each filter f, the weights of one output channel (Li et al., 2018,
    section 4). Weights that the loops of a block share are one filter; each NLL has its own. Only
    kernels have filters: norms, biases, positions, tokens and residual coefficients do not move.

    Args:
      params: the weights w.
      key: random key; it determines the direction of each d_f.

    Returns:
      A tree like `params`.
    """
    weights = flatten_dict(params)
    drawn = flatten_dict(optax.tree.random_like(key, params, jax.random.normal))
    scaled = {}
    for path, weight in weights.items():
        axes = filter_axes(path, weights)
        length = _norm(weight, axes) / _norm(drawn[path], axes) if axes else 0
        scaled[path] = drawn[path] * length
    return unflatten_dict(scaled)


def filter_axes(path: Path, weights: Mapping[Path, Any]) -> tuple[int, ...]:
    """The axes of a weight that lie within a filter; () if the weight is no kernel.

    The last axis counts the output channels; of a depthwise convolution, which has a bias for each
    pair of them, the last two (input channel, multiplier). Of NLLs, the first counts the loops.

    Args:
      path: path of the weight.
      weights: all weights, or their shapes, by path.
    """
    if path[-1] != "kernel":
        return ()
    shape = weights[path].shape
    bias = weights.get((*path[:-1], "bias"))
    depthwise = bias is not None and bias.shape[-1] != shape[-1]
    stacked = is_stacked(path)
    return tuple(range(stacked, len(shape) - 1 - depthwise))


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))


def losses_in_plane(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    positions: np.ndarray,
    *,
    seed: int,
    computed: Callable[[int], None],
) -> np.ndarray:
    """The mean losses of images at weights w + a d + b e, for two directions d and e.

    d and e are independent `filter_normalised_direction`s. The loss is the cross-entropy with hard
    labels, in evaluation mode and float32. BatchNorm's statistics, if any, stay those of w.

    Args:
      model: the model, with the mesh that it runs on.
      variables: w and statistics, on the devices of the mesh.
      batches: batches as from `eval_loader`; padding and unreadable images do not count.
      positions: pairs (a, b); (P, 2).
      seed: seed of d and e.
      computed: called with the number of losses, of one image each, since the last call.

    Returns:
      The losses in nats, (P,) float64.
    """
    model = model.clone(dtype=jnp.float32)
    calls = -(-len(positions) // POSITIONS)
    padded = np.zeros((calls, POSITIONS, 2), np.float32)
    padded.reshape(-1, 2)[: len(positions)] = positions
    plane = _two_directions(variables["params"], seed)
    sums, images = np.zeros((calls, POSITIONS)), 0
    for batch in batches:
        for i in range(calls):
            with jax.default_matmul_precision("highest"):
                losses, count = _summed_losses(model, variables, plane, batch, padded[i])
            sums[i] += jax.device_get(losses)
            computed(min(POSITIONS, len(positions) - i * POSITIONS) * int(count))
        images += int(count)
    return sums.ravel()[: len(positions)] / images


@jax.jit
def _two_directions(params: Any, seed: jax.Array) -> tuple[Any, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    return filter_normalised_direction(params, first), filter_normalised_direction(params, second)


@functools.partial(jax.jit, static_argnums=0)
def _summed_losses(
    model: Model, variables: Variables, plane: tuple[Any, Any], batch: Batch, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sums of a batch's losses at each position, and the number of its images.

    Shapes: positions (P, 2) -> (P,), ().
    """
    images, counted = normalise(model, batch["image"]), batch["real"] & ~batch["bad"]

    def total(position: jax.Array) -> jax.Array:
        a, b = position
        moved = jax.tree.map(lambda w, d, e: w + a * d + b * e, variables["params"], *plane)
        logits = evaluation_logits(model, {**variables, "params": moved}, images)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.where(counted, losses, 0).sum()

    return jax.lax.map(total, positions), counted.sum()


def grid(coordinates: np.ndarray) -> np.ndarray:
    """All pairs (a, b) of coordinates, a changing fastest: (G,) -> (G^2, 2)."""
    return np.stack(np.meshgrid(coordinates, coordinates), axis=-1).reshape(-1, 2)


def principal_curvatures(losses: np.ndarray, step: float) -> list[float] | None:
    """The two curvatures of the loss in the plane, the smaller first; None if not finite.

    They are the eigenvalues of the Hessian in the plane, by central differences. In a plane of
    random directions they are weighted means of the principal curvatures of the whole loss (Li et
    al., 2018, section 6).

    Args:
      losses: those at `grid([-step, 0, step])`, (3, 3).
      step: a small step along the directions.
    """
    if not np.isfinite(losses).all():
        return None
    along_a = losses[1, 0] - 2 * losses[1, 1] + losses[1, 2]
    along_b = losses[0, 1] - 2 * losses[1, 1] + losses[2, 1]
    mixed = (losses[0, 0] - losses[0, 2] - losses[2, 0] + losses[2, 2]) / 4
    hessian = np.array([[along_a, mixed], [mixed, along_b]]) / step**2
    curvatures: list[float] = np.linalg.eigvalsh(hessian).tolist()
    return curvatures
