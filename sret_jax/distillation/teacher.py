"""A trained model that labels each batch for a student, computed inside the train step."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.sources.classes import difference, order_of_classes
from sret_jax.data.sources.imagenet import assumed_ids
from sret_jax.distillation.soft_targets import soft_labels
from sret_jax.errors import UserError
from sret_jax.models.apply import evaluation_logits, normalised_again
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables
from sret_jax.parallel.mesh import state_shardings, with_shardings
from sret_jax.weights.adaptation import reorder_classes
from sret_jax.weights.loading import find


@dataclasses.dataclass(frozen=True)
class Teacher:
    """p = softmax(t / T) for the logits t of a trained model in evaluation mode; no gradient.

    Attributes:
      model: the teacher at its own image size.
      variables: its weights as NumPy arrays.
      shardings: shardings of the weights over the mesh.
      temperature: T.
      variant: the published variant of the model, or the one that it was derived from.
      class_names: class names in the order of its logits; None if they are not stored.
    """

    model: Model
    variables: Variables
    shardings: Any
    temperature: float
    variant: str
    class_names: list[str] | None

    @property
    def abstract_variables(self) -> Any:
        """The shapes and shardings of the weights, to compile for."""
        return with_shardings(jax.eval_shape(lambda: self.variables), self.shardings)

    def place(self) -> Variables:
        """Places the weights on their devices."""
        return jax.device_put(self.variables, self.shardings)

    def probabilities(self, variables: Variables, images: jax.Array, student: Model) -> jax.Array:
        """The soft labels of images that the student sees; they are resized bicubically if needed.

        Shapes: images (B, H, W, 3), normalised for the student -> (B, K) float32.
        """
        images = normalised_again(images, student, self.model)
        size = self.model.image_size
        images = jax.image.resize(images, (len(images), size, size, 3), "bicubic")
        logits = evaluation_logits(self.model, variables, images)
        return jax.lax.stop_gradient(soft_labels(logits, self.temperature))


def open_teacher(config: ConfigDict, mesh: Mesh, student: Model) -> Teacher | None:
    """Opens the teacher in config.teacher; None if that is empty.

    Raises:
      UserError: there is no model, or its number of classes differs from the student's.
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
            f"config.teacher={path} has {model.num_classes:,} classes and the student "
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
    """A sentence about a teacher without class names."""
    return (
        f"config.teacher={path} keeps no class names, so they are not compared: its classes are "
        "taken for the data's, in their order."
    )


def with_classes(teacher: Teacher, path: str, names: list[str]) -> Teacher:
    """Reorders the teacher's logits to the order of the data's classes.

    Args:
      teacher: from `open_teacher`.
      path: config.teacher.
      names: class names of the data.

    Raises:
      UserError: the teacher has class names, and they differ from the data's.
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
