"""A trained model whose class probabilities a student learns, computed inside the train step."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from ml_collections import ConfigDict

from sret_jax.errors import UserError
from sret_jax.models.sret import SReT
from sret_jax.parallel.mesh import state_shardings, with_shardings
from sret_jax.training.losses import soft_labels
from sret_jax.training.pretrained import load_on_host
from sret_jax.training.state import Variables


@dataclasses.dataclass(frozen=True)
class Teacher:
    """p = softmax(t / T), t the logits of a trained model in evaluation mode; no gradient.

    Attributes:
      model: at its own image size.
      variables: its weights, NumPy arrays.
      shardings: how they lie on the mesh.
      temperature: T.
    """

    model: SReT
    variables: Variables
    shardings: Any
    temperature: float

    @property
    def abstract_variables(self) -> Any:
        """Shapes and shardings of the weights, to compile for."""
        return with_shardings(jax.eval_shape(lambda: self.variables), self.shardings)

    def place(self) -> Variables:
        """The weights on their devices."""
        return jax.device_put(self.variables, self.shardings)

    def probabilities(self, variables: Variables, images: jax.Array) -> jax.Array:
        """The soft labels of images as the student sees them, resized bicubically if need be.

        Shapes: normalised images (B, H, W, 3) -> (B, K) float32.
        """
        size = self.model.image_size
        images = jax.image.resize(images, (len(images), size, size, 3), "bicubic")
        rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
        logits: Any = self.model.apply(variables, images, train=False, rngs=rngs)
        return jax.lax.stop_gradient(soft_labels(logits, self.temperature))


def open_teacher(config: ConfigDict, mesh: Mesh, student: SReT) -> Teacher | None:
    """The teacher that config.teacher names; None if that is empty.

    Raises:
      UserError: nothing readable there, or other classes than the student's.
    """
    if not config.teacher:
        return None
    model, variables = _load(config.teacher, config.distill, student.dtype)
    if model.num_classes != student.num_classes:
        raise UserError(
            f"config.teacher={config.teacher} tells {model.num_classes:,} classes apart, and the "
            f"student {student.num_classes:,}; give a teacher trained on the classes of "
            f"{config.data.name}"
        )
    return Teacher(
        model=model.clone(mesh=mesh),
        variables=variables,
        shardings=state_shardings(variables, mesh),
        temperature=config.distill.temperature,
    )


def _load(path: str, distill: ConfigDict, dtype: DTypeLike) -> tuple[SReT, Variables]:
    settings = {} if distill.teacher_groups is None else {"groups": distill.teacher_groups}
    try:
        model, variables = load_on_host(path, ema=distill.teacher_ema, **settings)
    except UserError as e:
        raise UserError(f"config.teacher={path} cannot teach: {e}") from e
    return model.clone(dtype=dtype), jax.tree.map(np.asarray, variables)
