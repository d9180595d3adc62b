"""Writes weights in the form of the Hugging Face hub: a folder that can be uploaded."""

from typing import Any

from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import write_json, write_text
from sret_jax.models.registry import title
from sret_jax.tools.model_card import model_card
from sret_jax.weights.array_names import to_arrays
from sret_jax.weights.description import Description
from sret_jax.weights.hub import CONFIG, WEIGHTS
from sret_jax.weights.stored import Stored
from sret_jax.weights.timm_config import to_timm_config
from sret_jax.weights.weight_files import DESCRIPTION, write_weight_file

CARD = "README.md"


def write_hub_folder(
    stored: Stored, folder: epath.Path, name: str | None = None, **settings: Any
) -> str:
    """Writes model.safetensors, config.json and README.md; the folder appears when it is complete.

    `sret_jax.load` reads the folder, and its upload, as exactly this model. config.json has the
    keys of timm, and the `Description` of the model under "sret_jax".

    Args:
      stored: the weights.
      folder: the folder to write; it must not exist.
      name: name of the published variant; default: found from `stored`.
      **settings: model settings that replace the stored ones.

    Returns:
      A name for the model; see `title`.

    Raises:
      UserError: the weights cannot be read, or the folder cannot be written.
    """
    model, variables = stored.load(name, **settings)
    variant, crop = name or stored.variant(model), stored.test_crop
    description = Description.of(model, variant, stored.class_names, crop).to_json()
    config = to_timm_config(model, variant, stored.class_names, crop)
    temporary = folder.with_name(folder.name + ".tmp")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        write_weight_file(temporary / WEIGHTS, to_arrays(variables, model), description)
        write_json(temporary / CONFIG, {**config, DESCRIPTION: description})
        write_text(temporary / CARD, model_card(model, stored, variant, crop))
        temporary.rename(folder)
    except OSError as e:
        raise UserError(f"{folder} cannot be written ({e.strerror or e}); fix the storage") from e
    return title(model, variant)
