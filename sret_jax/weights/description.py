"""What weights store about themselves: model, classes, and the view they were evaluated in.

Weight files contain it as JSON:

    {"config": {"model": {...}, "data": {"test_crop": 0.875}}, "class_names": [...] or null,
     "mean": [...], "std": [...]}

Converted checkpoints have a config.json with those two sections, and a class_names.json.
"""

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.models.model import Model
from sret_jax.models.model_settings import model_settings
from sret_jax.settings.saved_config import CLASSES_FILE, CONFIG_FILE, CONVERTED


@dataclasses.dataclass(frozen=True)
class Description:
    """What weights store about themselves; see the module.

    Attributes:
      config: only its sections "model" and "data".
      class_names: names in the order of the logits, if they are known.
    """

    config: ConfigDict
    class_names: list[str] | None

    @classmethod
    def of(
        cls, model: Model, variant: str, class_names: list[str] | None, test_crop: float
    ) -> "Description":
        """Describes a model made from a variant, with all its settings except those of speed."""
        named = {"name": variant, **model_settings(model)}
        return cls(ConfigDict({"model": named, "data": {"test_crop": test_crop}}), class_names)

    @classmethod
    def from_json(cls, content: Any, place: epath.Path) -> "Description":
        """Reads the description in a weight file.

        Raises:
          UserError: it has another form.
        """
        try:
            config, names = content["config"], content["class_names"]
            known = names is None or all(isinstance(name, str) for name in names)
            if not isinstance(config["model"], dict) or not known:
                raise TypeError(f"expected settings and names, found {content!r:.60}")
            settings = config["model"]
            settings |= {name: tuple(content[name]) for name in ("mean", "std")}
            described = cls(ConfigDict(config), None if names is None else list(names))
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as e:
            raise UserError(f"{place} describes no model ({e}); write it again") from e
        return described

    def to_json(self) -> dict[str, Any]:
        """The description in the form that weight files contain."""
        shown = {name: self.config.model[name] for name in ("mean", "std")}
        return {"config": self.config.to_dict(), "class_names": self.class_names, **shown}

    def write(self, folder: epath.Path, origin: str) -> None:
        """Writes config.json and class_names.json beside checkpoints converted from `origin`."""
        write_json(folder / CONFIG_FILE, {CONVERTED: origin, **self.config.to_dict()})
        if self.class_names is not None:
            write_json(folder / CLASSES_FILE, self.class_names)
