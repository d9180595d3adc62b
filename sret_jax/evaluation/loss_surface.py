"""The loss around trained weights, in a plane of two random directions (Li et al., 2018)."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.models.apply import evaluation_logits, normalise
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables
from sret_jax.parallel.mesh import SCANNED

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
    stacked = any(part in SCANNED for part in path)
    return tuple(range(stacked, len(shape) - 1 - depthwise))


def _norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True))


def loss_surface(
    model: Model,
    variables: Variables,
    batches: Iterable[Batch],
    coordinates: Sequence[float],
    *,
    seed: int,
    computed: Callable[[int], None],
) -> np.ndarray:
    """The mean loss of images at the weights w + a d + b e, for two directions d and e.

    d and e are independent `filter_normalised_direction`s. The loss is the cross-entropy with hard
    labels, in evaluation mode and float32. BatchNorm's statistics, if any, stay those of w.

    Args:
      model: the model, with the mesh that it runs on.
      variables: w and statistics, on the devices of the mesh.
      batches: batches as from `eval_loader`; padding and unreadable images do not count.
      coordinates: the values of a, which are those of b; (G,).
      seed: seed of d and e.
      computed: called with the number of losses, of one image each, since the last call.

    Returns:
      Losses in nats, (G, G) float64. Row i has b = coordinates[i], column j a = coordinates[j].
    """
    model = model.clone(dtype=jnp.float32)
    points = np.asarray(coordinates, np.float32)
    plane = _two_directions(variables["params"], seed)
    sums, images = np.zeros((len(points), len(points))), 0
    for batch in batches:
        for i, b in enumerate(points):
            losses, count = jax.device_get(_row(model, variables, plane, batch, points, b))
            sums[i] += losses
            computed(len(points) * int(count))
        images += int(count)
    return sums / images


@jax.jit
def _two_directions(params: Any, seed: jax.Array) -> tuple[Any, Any]:
    first, second = jax.random.split(jax.random.key(seed))
    return filter_normalised_direction(params, first), filter_normalised_direction(params, second)


@functools.partial(jax.jit, static_argnums=0)
def _row(
    model: Model,
    variables: Variables,
    plane: tuple[Any, Any],
    batch: Batch,
    points: jax.Array,
    b: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """A row of the grid: the sums of a batch's losses, (G,), and the number of its images."""
    images, counted = normalise(model, batch["image"]), batch["real"] & ~batch["bad"]

    def total(a: jax.Array) -> jax.Array:
        moved = jax.tree.map(lambda w, d, e: w + a * d + b * e, variables["params"], *plane)
        logits = evaluation_logits(model, {**variables, "params": moved}, images)
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
        return jnp.where(counted, losses, 0).sum()

    return jax.lax.map(total, points), counted.sum()


def principal_curvatures(losses: np.ndarray, step: float) -> list[float] | None:
    """The two curvatures of a surface at its centre, the smaller first; None if not finite.

    They are the eigenvalues of the Hessian in the plane, by central differences over one step of
    the grid. In a plane of random directions they are weighted means of the principal curvatures
    of the whole loss (Li et al., 2018, section 6).

    Args:
      losses: (G, G) with an odd G of at least 3.
      step: distance of two coordinates.
    """
    c = len(losses) // 2
    near = losses[c - 1 : c + 2, c - 1 : c + 2]
    if not np.isfinite(near).all():
        return None
    along_a = near[1, 0] - 2 * near[1, 1] + near[1, 2]
    along_b = near[0, 1] - 2 * near[1, 1] + near[2, 1]
    mixed = (near[0, 0] - near[0, 2] - near[2, 0] + near[2, 2]) / 4
    hessian = np.array([[along_a, mixed], [mixed, along_b]]) / step**2
    curvatures: list[float] = np.linalg.eigvalsh(hessian).tolist()
    return curvatures
