"""Class probabilities of images of any size, given as files, bytes or arrays."""

import functools
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image

from sret_jax.data.views.images import BadImage, EvalTransform, upright_rgb
from sret_jax.errors import UserError
from sret_jax.models.apply import evaluation_logits, exited_logits, normalise
from sret_jax.models.checks import check_exit
from sret_jax.models.halting import ExitRule
from sret_jax.models.model import Model
from sret_jax.parallel.host import available_cores

BATCH = 32

Picture = str | os.PathLike | bytes | Image.Image | np.ndarray | jax.Array


class Prediction(NamedTuple):
    """The prediction of one image.

    Attributes:
      probabilities: (classes,), float32.
      loops: applications of the last block.
    """

    probabilities: np.ndarray
    loops: int


class UnreadableImage(UserError):
    """An image cannot be read; `reason` says why."""

    def __init__(self, image: Picture, number: int, reason: str):
        name = image if isinstance(image, str | os.PathLike) else f"number {number}"
        super().__init__(
            f"image {name} cannot be read ({reason}); give a path, bytes, a PIL image or a uint8 "
            "array (H, W, 3)"
        )
        self.reason = reason


def predict(
    model: Model,
    variables: dict[str, Any],
    images: Iterable[Picture],
    *,
    test_crop: float = 0.875,
    exit: str | None = None,
) -> np.ndarray:
    """softmax(model(x)) of every image x, preprocessed as in evaluation.

    Args:
      model: from `load` or `create_model`.
      variables: the model's weights.
      images: paths, encoded bytes, PIL images, or uint8 RGB arrays (H, W, 3), of any sizes.
      test_crop: fraction of the shorter side that the model sees; `test_crop(path)` for a run.
      exit: when an image leaves the last block, such as "entropy:0.4"; see
        `sret_jax.models.halting`. None: after all loops. `predict_each` also says after how many.

    Returns:
      Probabilities (images, classes), float32.

    Raises:
      UserError: an image cannot be read, test_crop is out of range, or no image can leave so.
    """
    if isinstance(images, str | os.PathLike | bytes | Image.Image):
        raise UserError("images is one image, not several; give a list: predict(..., [image])")
    rows = [np.zeros((0, model.num_classes), np.float32)]
    for row in predict_each(model, variables, images, test_crop=test_crop, exit=exit):
        if isinstance(row, UnreadableImage):
            raise row
        rows.append(row.probabilities[None])
    return np.concatenate(rows)


def views(images: Iterable[Picture], image_size: int, test_crop: float) -> np.ndarray:
    """What a model sees of images in evaluation: (images, image_size, image_size, 3) uint8.

    Raises:
      UserError: an image cannot be read, or test_crop is out of range.
    """
    see = functools.partial(_seen, EvalTransform(image_size, test_crop))
    found: list[np.ndarray] = []
    for view in map(see, enumerate(images)):
        if isinstance(view, UnreadableImage):
            raise view
        found.append(view)
    return np.stack(found)


def predict_each(
    model: Model,
    variables: dict[str, Any],
    images: Iterable[Picture],
    *,
    test_crop: float,
    exit: str | None = None,
) -> Iterator[Prediction | UnreadableImage]:
    """Like `predict`, but yields one image after another; at most BATCH images are in memory.

    Yields:
      The prediction, or the error of an unreadable image, in the order of the images.
    """
    rule = ExitRule.parse(exit) if exit else None
    if rule:
        check_exit(model, rule)
    see = functools.partial(_seen, EvalTransform(model.image_size, test_crop))
    numbered = iter(enumerate(images))
    with ThreadPoolExecutor(available_cores()) as pool:
        while batch := list(pool.map(see, islice(numbered, BATCH))):
            views = [view for view in batch if not isinstance(view, UnreadableImage)]
            rows = iter(_predictions(model, variables, views, rule) if views else ())
            for view in batch:
                yield view if isinstance(view, UnreadableImage) else next(rows)


def _predictions(
    model: Model, variables: dict[str, Any], views: list[np.ndarray], rule: ExitRule | None
) -> Iterator[Prediction]:
    padding = [(0, BATCH - len(views)), (0, 0), (0, 0), (0, 0)]
    # Always the same shape, so it compiles once. Copies of an image leave when the image does.
    whole = np.pad(np.stack(views), padding, mode="edge")
    found = jax.device_get(_predict_batch(model, rule, variables, whole))
    for probabilities, loops in islice(zip(*found, strict=True), len(views)):
        yield Prediction(probabilities, int(loops))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _predict_batch(
    model: Model, rule: ExitRule | None, variables: dict[str, Any], images: jax.Array
) -> tuple[jax.Array, jax.Array]:
    images = normalise(model, images)
    if rule:
        logits, loops = exited_logits(model, variables, images, rule)
    else:
        logits = evaluation_logits(model, variables, images)
        loops = jnp.full(len(images), model.loops)
    return jax.nn.softmax(logits), loops


def read_view(view: EvalTransform, image: Picture, number: int = 0) -> np.ndarray:
    """An image as the model sees it, before it is normalised: (S, S, 3) uint8.

    Raises:
      UnreadableImage: the image cannot be read; `number` names it if it has no path.
    """
    try:
        return view(_encoded(image))
    except (BadImage, OSError, TypeError, ValueError) as e:
        raise UnreadableImage(image, number, str(e) or type(e).__name__) from e


def _seen(view: EvalTransform, numbered: tuple[int, Picture]) -> np.ndarray | UnreadableImage:
    number, image = numbered
    try:
        return read_view(view, image, number)
    except UnreadableImage as e:
        return e


def _encoded(image: Picture) -> bytes:
    """The bytes of an image file; an image in memory is encoded as PNG, which is lossless."""
    if isinstance(image, bytes):
        return image
    if isinstance(image, np.ndarray | jax.Array):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
            raise TypeError(f"it is a {image.dtype} array {image.shape}")
        image = Image.fromarray(np.asarray(image))
    if isinstance(image, Image.Image):
        file = io.BytesIO()
        upright_rgb(image).save(file, format="PNG")
        return file.getvalue()
    return epath.Path(image).read_bytes()
