"""Writes weights with a description of their model: a file, or a folder of one checkpoint."""

import contextlib

import jax
import jax.numpy as jnp
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.errors import UserError
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables
from sret_jax.parallel.distributed import say
from sret_jax.weights.array_names import to_arrays, why_in_flax
from sret_jax.weights.description import Description
from sret_jax.weights.weight_files import SUFFIXES, write_weight_file


def is_weight_file(target: epath.Path) -> bool:
    """Whether `write_weights` writes a file there, and not a folder."""
    return target.suffix in SUFFIXES


def check_free(target: epath.Path) -> None:
    """Raises UserError if there is something at the place to write to."""
    if target.exists():
        raise UserError(f"{target} exists already; give another OUT or remove it")


def write_weights(
    target: epath.Path, model: Model, variables: Variables, description: Description, origin: str
) -> None:
    """Writes a weight file, if `target` ends like one, or otherwise a checkpoint folder.

    Args:
      target: the file or folder to write; it must not exist.
      model: the model of the weights.
      variables: the weights.
      description: what is stored beside them.
      origin: where the weights come from; only a folder stores it.

    Raises:
      UserError: the storage is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_weight_file(target):
        if reason := why_in_flax(model):
            say(f"{target} has the arrays under their names in Flax, because {reason}.")
        write_weight_file(target, to_arrays(variables, model), description.to_json())
        return
    with contextlib.closing(Checkpoints(target)) as checkpoints:
        checkpoints.save(0, {"model": jax.tree.map(jnp.asarray, variables)})
        if not checkpoints.settle():
            raise UserError(f"{target} takes no checkpoint; fix the storage or convert elsewhere")
    description.write(target, origin)
