"""Teachers that label stored crops: models of this project, and ONNX files of others."""

import dataclasses
import functools
import hashlib
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sret_jax.distillation.soft_targets import soft_labels
from sret_jax.distillation.teacher import not_compared, open_teacher, with_classes
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.models.apply import normalise
from sret_jax.models.model import Model
from sret_jax.models.model_settings import function_settings
from sret_jax.parallel.mesh import batch_sharding, make_mesh
from sret_jax.settings.config_model import create_from_config

MOST_ROWS = 256  # images per call of a teacher
ONNX = "onnx:"
LAYOUTS = ("NCHW", "NHWC")
LEAST_PROBABILITY = 1e-12
# The settings that every fingerprint contains.
FIRST_SETTINGS = frozenset(
    {
        *("num_classes", "image_size", "blocks", "loops", "groups"),
        *("heads", "dim", "mlp_ratio", "nll_ratio"),
    }
)


class LabelTeacher(Protocol):
    """Computes class probabilities p = softmax(t / T) of images as a student sees them.

    Attributes:
      image_size: side of the images that the teacher gets, in pixels.
      fingerprint: fingerprint of its weights.
    """

    image_size: int
    fingerprint: str

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Shapes: (B, S, S, 3) uint8 -> (B, K) float32."""
        ...


class CheckpointTeacher:
    """A checkpoint of a model of this project, in evaluation mode, on all devices of this host.

    Args:
      path: path of the teacher.
      config: config of the student.
      class_names: class names of the data.

    Attributes:
      earlier_fingerprints: its forms in older stores, without the family, or all settings.

    Raises:
      UserError: there is no model, or it was trained on other classes.
    """

    def __init__(self, path: str, config: ConfigDict, class_names: list[str]):
        config = config.copy_and_resolve_references()
        config.teacher = path
        self._mesh = make_mesh(1)
        student = create_from_config(config, len(class_names))
        teacher = open_teacher(config, self._mesh, student)
        assert teacher is not None
        teacher = with_classes(teacher, path, class_names)
        if teacher.class_names is None:
            print(not_compared(path), flush=True)
        self.image_size = teacher.model.image_size
        self.fingerprint = fingerprint(teacher.model, teacher.variables)
        self.earlier_fingerprints = earlier_fingerprints(teacher.model, teacher.variables)
        self._variables = teacher.place()
        self._probabilities = jax.jit(
            lambda variables, images: teacher.probabilities(
                variables, normalise(teacher.model, images), teacher.model
            ),
            in_shardings=(teacher.shardings, batch_sharding(self._mesh)),
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `LabelTeacher`."""
        rows = len(images)
        padded = np.pad(images, [(0, -rows % self._mesh.size), (0, 0), (0, 0), (0, 0)])
        return np.asarray(self._probabilities(self._variables, padded))[:rows]


class OnnxTeacher:
    """An ONNX model with one input and one output (B, K), run by onnxruntime.

    Args:
      path: path of the file.
      classes: K.
      size: side of its images in pixels; default: the size of the model's input.
      mean, std: its input is (x / 255 - mean) / std.
      layout: NCHW or NHWC.
      probabilities: whether its output is probabilities p rather than logits; then log p are used
        as logits.
      temperature: T.

    Raises:
      UserError: onnxruntime is not installed, or the model is unreadable or has another form.
    """

    def __init__(
        self,
        path: epath.Path,
        classes: int,
        *,
        size: int | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        layout: str,
        probabilities: bool,
        temperature: float,
    ):
        try:
            data = path.read_bytes()
        except OSError as e:
            raise UserError(f"--teacher={ONNX}{path} cannot be read ({e.strerror or e})") from e
        self._path = path
        self._classes = classes
        self._layout = layout
        self._session = _open_session(path, data)
        (self._input,) = self._one(self._session.get_inputs(), "inputs")
        self._one(self._session.get_outputs(), "outputs")
        self.image_size = size or self._stated_size()
        settings = (self.image_size, mean, std, layout, probabilities)
        self.fingerprint = hashlib.sha256(data + repr(settings).encode()).hexdigest()
        self._prepare = jax.jit(
            functools.partial(
                _prepare, size=self.image_size, mean=mean, std=std, channels_first=layout == "NCHW"
            )
        )
        self._soften = jax.jit(
            lambda y: soft_labels(
                jnp.log(jnp.maximum(y, LEAST_PROBABILITY)) if probabilities else y, temperature
            )
        )

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """See `LabelTeacher`."""
        rows = len(images)
        fixed = self._input.shape[0]  # a batch size, or a name if any size is allowed
        step = fixed if isinstance(fixed, int) else rows
        outputs = []
        for first in range(0, rows, step):
            part = images[first : first + step]
            part = np.pad(part, [(0, step - len(part)), (0, 0), (0, 0), (0, 0)])
            outputs.append(self._run(np.asarray(self._prepare(part))))
        return np.asarray(self._soften(np.concatenate(outputs)[:rows]))

    def _run(self, images: np.ndarray) -> np.ndarray:
        try:
            (output,) = self._session.run(None, {self._input.name: images})
        except Exception as e:  # onnxruntime's own types, for a shape that it does not accept
            raise UserError(
                f"{self._path} does not accept images of shape {images.shape} "
                f"({str(e).splitlines()[0]}); correct --teacher_layout or --teacher_size"
            ) from e
        if output.shape != (len(images), self._classes):
            raise UserError(
                f"{self._path} returns an array {output.shape} for {len(images)} images, expected "
                f"{(len(images), self._classes)}; give a teacher trained on these classes"
            )
        return output

    def _one(self, ports: list, what: str) -> list:
        if len(ports) != 1:
            names = ", ".join(port.name for port in ports)
            raise UserError(f"{self._path} has {len(ports)} {what} ({names}), expected one")
        return ports

    def _stated_size(self) -> int:
        height = self._input.shape[self._layout.index("H")] if len(self._input.shape) == 4 else None
        if not isinstance(height, int):
            raise UserError(
                f"{self._path} takes images {self._input.shape}, which does not include a size; "
                "give --teacher_size"
            )
        return height


def batch_rows(crops: int) -> int:
    """Crops per call of a teacher: all crops of several images, or an equal part of one image's."""
    if crops <= MOST_ROWS:
        return MOST_ROWS // crops * crops
    return math.ceil(crops / math.ceil(crops / MOST_ROWS))


def label(teacher: LabelTeacher, images: np.ndarray, rows: int) -> np.ndarray:
    """Labels any number of images, `rows` per call; the last call is padded.

    Shapes: (B, S, S, 3) uint8 -> (B, K) float32.
    """
    parts = []
    for first in range(0, max(len(images), 1), rows):  # once for no images, to know the shape
        part = images[first : first + rows]
        padded = np.pad(part, [(0, rows - len(part)), (0, 0), (0, 0), (0, 0)])
        parts.append(teacher(padded)[: len(part)])  # always the same shape, so it compiles once
    return np.concatenate(parts)


def _open_session(path: epath.Path, data: bytes) -> Any:
    try:
        import onnxruntime
    except ImportError as e:
        raise UserError(
            f"onnxruntime is not installed, which --teacher={ONNX}{path} needs; pip install "
            "'sret_jax[onnx]', or onnxruntime alone"
        ) from e
    try:
        return onnxruntime.InferenceSession(
            absolute(path), providers=onnxruntime.get_available_providers()
        )
    except Exception as e:  # onnxruntime's own types
        reason = str(e).splitlines()[0]
        raise UserError(f"{path} is not a readable ONNX model ({reason})") from e


def _prepare(
    images: jax.Array,
    *,
    size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    channels_first: bool,
) -> jax.Array:
    """Shapes: (B, S, S, 3) uint8 -> (B, 3, size, size) or (B, size, size, 3), normalised."""
    x = images.astype(jnp.float32) / 255
    x = (x - jnp.asarray(mean).reshape(1, 1, 1, 3)) / jnp.asarray(std).reshape(1, 1, 1, 3)
    x = jax.image.resize(x, (len(x), size, size, 3), "bicubic")
    return x.transpose(0, 3, 1, 2) if channels_first else x


def fingerprint(model: Model, variables: Any) -> str:
    """A fingerprint of all that a model's output depends on: family, settings, dtype, weights."""
    return _digest((type(model).__name__, *_settings(model)), variables)


def earlier_fingerprints(model: Model, variables: Any) -> tuple[str, ...]:
    """The fingerprints of older versions: without the family, and also without heads and others.

    The oldest form does not include heads, dim, nll_every and permutation.
    """
    groups = function_settings(model).get("groups", ())
    oldest = (model.image_size, groups, model.loops, np.dtype(model.dtype).name)
    return tuple(_digest(settings, variables) for settings in (_settings(model), oldest))


def _settings(model: Model) -> tuple:
    defaults = {field.name: field.default for field in dataclasses.fields(model)}
    # Later settings are left out at their defaults, so adding one changes no existing fingerprint.
    settings = {
        name: value
        for name, value in function_settings(model).items()
        if name in FIRST_SETTINGS or value != defaults[name]
    }
    return sorted(settings.items()), np.dtype(model.dtype).name


def _digest(settings: tuple, variables: Any) -> str:
    digest = hashlib.sha256(repr(settings).encode())
    for path, array in jax.tree_util.tree_leaves_with_path(variables):
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
