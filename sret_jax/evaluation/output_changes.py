"""How far a change of a model moves the output of each of its layers, on real images."""

import jax
import numpy as np

from sret_jax.evaluation.predict import Picture
from sret_jax.models.apply import application_outputs, normalise
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables


def photographs() -> list[Picture]:
    """Ten images: the two photographs that come with scikit-learn, and their quarters."""
    from sklearn.datasets import load_sample_images

    pictures: list[Picture] = []
    for whole in load_sample_images().images:
        halves = np.array_split(whole, 2)
        quarters = [part for half in halves for part in np.array_split(half, 2, axis=1)]
        pictures += [np.ascontiguousarray(picture) for picture in (whole, *quarters)]
    return pictures


def outputs(
    model: Model, variables: Variables, images: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """The tokens after each application of a block, from first to last, and the logits.

    Shapes: uint8 images (B, S, S, 3) -> per application (B, N, C), (B, classes).
    """

    @jax.jit
    def compute(variables: Variables, images: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        return application_outputs(model, variables, normalise(model, images))

    states, logits = jax.device_get(compute(variables, images))
    return states, logits


def relative_change(before: np.ndarray, after: np.ndarray) -> float:
    """|after - before| / |before|, as the mean over images: (B, ...) -> ()."""
    axes = tuple(range(1, before.ndim))
    moved, length = (np.sqrt(np.square(x).sum(axes)) for x in (after - before, before))
    return float(np.mean(moved / length))


def output_changes(
    old: tuple[Model, Variables], new: tuple[Model, Variables], images: np.ndarray
) -> tuple[dict[str, float], np.ndarray, np.ndarray]:
    """The relative change after every layer and of the logits, and the logits of both models.

    Args:
      old: an untied model and its weights.
      new: the recursive model made of it, and its weights.
      images: (B, S, S, 3) uint8.

    Returns:
      {"stage 1, layer 1": ..., "logits": ...}, and twice (B, classes).
    """
    (states, before), (changed, after) = (outputs(*one, images) for one in (old, new))
    layers = [(s, n) for s, count in enumerate(old[0].blocks) for n in range(count)]
    changes = {
        f"stage {s + 1}, layer {n + 1}": relative_change(x, y)
        for (s, n), x, y in zip(layers, states, changed, strict=True)
    }
    return {**changes, "logits": relative_change(before, after)}, before, after
