"""A trained model whose class probabilities a student learns, computed inside the train step."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.sources.classes import difference, order_of_classes
from sret_jax.data.sources.imagenet import assumed_ids
from sret_jax.distillation.soft_targets import soft_labels
from sret_jax.errors import UserError
from sret_jax.models.apply import Variables, evaluation_logits
from sret_jax.models.families.sret import SReT
from sret_jax.parallel.mesh import state_shardings, with_shardings
from sret_jax.weights.adaptation import reorder_classes
from sret_jax.weights.loading import find


@dataclasses.dataclass(frozen=True)
class Teacher:
    """p = softmax(t / T), t the logits of a trained model in evaluation mode; no gradient.

    Attributes:
      model: at its own image size.
      variables: its weights, NumPy arrays.
      shardings: how they lie on the mesh.
      temperature: T.
      variant: the published variant that the model is, or was made from.
      class_names: in the order of its logits; None where they are not kept.
    """

    model: SReT
    variables: Variables
    shardings: Any
    temperature: float
    variant: str
    class_names: list[str] | None

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
        logits = evaluation_logits(self.model, variables, images)
        return jax.lax.stop_gradient(soft_labels(logits, self.temperature))


def open_teacher(config: ConfigDict, mesh: Mesh, student: SReT) -> Teacher | None:
    """The teacher that config.teacher names; None if that is empty.

    Raises:
      UserError: no model there, or one with another number of classes than the student's.
    """
    path = config.teacher
    if not path:
        return None
    groups = config.distill.teacher_groups
    try:
        stored = find(path, ema=config.distill.teacher_ema)
        model, variables = stored.load(**({} if groups is None else {"groups": groups}))
    except UserError as e:
        raise UserError(f"config.teacher={path}: {e}") from e
    if model.num_classes != student.num_classes:
        raise UserError(
            f"config.teacher={path} tells {model.num_classes:,} classes apart and the student "
            f"{student.num_classes:,}; give a teacher that was trained on the student's classes"
        )
    return Teacher(
        model=model.clone(dtype=student.dtype, mesh=mesh),
        variables=variables,
        shardings=state_shardings(variables, mesh),
        temperature=config.distill.temperature,
        variant=stored.variant(model),
        class_names=stored.class_names,
    )


def not_compared(path: str) -> str:
    """A sentence on a teacher without class names."""
    return (
        f"config.teacher={path} keeps no class names, so they are not compared: its classes are "
        "taken for the data's, in their order."
    )


def with_classes(teacher: Teacher, path: str, names: list[str]) -> Teacher:
    """The teacher with its logits in the order of the data's classes.

    Args:
      teacher: from `open_teacher`.
      path: config.teacher.
      names: of the data's classes.

    Raises:
      UserError: it keeps the names of its classes, and these are others.
    """
    theirs = teacher.class_names or assumed_ids(teacher.model.num_classes, names)
    if theirs is None or theirs == names:
        return teacher
    order = order_of_classes(theirs, names, logits=teacher.model.num_classes)
    if order is None:
        raise UserError(
            f"config.teacher={path} was trained on other classes: "
            f"{difference(theirs, names, 'in the data')}; give a teacher that was trained on the "
            "student's classes"
        )
    return dataclasses.replace(teacher, variables=reorder_classes(teacher.variables, order))
