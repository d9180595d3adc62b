"""Builds the model that a config describes."""

import jax.numpy as jnp
from ml_collections import ConfigDict

from sret_jax.errors import UserError, did_you_mean
from sret_jax.models.model import Model
from sret_jax.models.registry import create_model

DTYPES = ("float32", "bfloat16")


def build_model(config: ConfigDict, classes: int) -> Model:
    """Builds the model of config.model; the number of classes is the config's, or else the data's.

    Raises:
      UserError: sizes do not fit each other, or labels exceed num_classes.
    """
    given = config.model.num_classes
    if given is not None and given < classes:
        raise UserError(
            f"{config.data.name} has labels up to {classes - 1}, beyond "
            f"config.model.num_classes={given}; set it to {classes}"
        )
    return create_from_config(config, classes if given is None else given)


def create_from_config(config: ConfigDict, num_classes: int) -> Model:
    """Builds the model of config.model with that many classes.

    Raises:
      UserError: the name is unknown, or sizes do not fit each other.
    """
    settings = {k: v for k, v in config.model.to_dict().items() if v is not None}
    name, dtype = settings.pop("name"), settings.pop("dtype", "float32")
    settings["num_classes"] = num_classes
    if dtype not in DTYPES:
        raise UserError(did_you_mean("config.model.dtype", dtype, DTYPES))
    try:
        return create_model(name, dtype=jnp.dtype(dtype).type, **settings)
    except ValueError as e:
        raise UserError(f"config.model: {e}") from e
