"""Weights in files: a weight file, or config.json and model.safetensors as on the hub."""

import functools
import json
import sys
from collections.abc import Callable

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.errors import UserError, few
from sret_jax.files import is_on_hub
from sret_jax.models.model import Model, Shapes
from sret_jax.models.variables import Variables
from sret_jax.parallel.distributed import agreed
from sret_jax.parallel.mesh import state_shardings
from sret_jax.weights.array_names import from_arrays, names_of
from sret_jax.weights.description import Description
from sret_jax.weights.hub import CONFIG, WEIGHTS
from sret_jax.weights.stored import Stored
from sret_jax.weights.timm_config import from_timm
from sret_jax.weights.torch_names import StateDictError
from sret_jax.weights.weight_files import DESCRIPTION, WeightFile, read_weight_file


class StoredFile(Stored):
    """The weights in a file; `array_names` says how its arrays are named."""

    def __init__(self, place: epath.Path, *, ema: bool = False):
        """Stores the arguments; reads nothing yet.

        Args:
          place: the file.
          ema: whether to read the averaged weights that a training script stored beside the raw
            ones.
        """
        self.place = self.config_place = place
        self.ema = ema

    @property
    def config(self) -> ConfigDict | None:
        """See `Stored`."""
        return self._description.config if self._description else None

    @property
    def class_names(self) -> list[str] | None:
        """See `Stored`."""
        return self._description.class_names if self._description else None

    @property
    def taken(self) -> str:
        """See `Stored`."""
        return self._file.taken

    @functools.cached_property
    def shapes(self) -> Shapes:
        """See `Stored`; names such as "head.bias"."""
        arrays = self._file.state_dict
        return {name: getattr(array, "shape", ()) for name, array in arrays.items()}

    def names(self, model: Model) -> set[str]:
        """See `Stored`."""
        return names_of(model, like=self._file.state_dict)

    def misfits(self, model: Model) -> list[str]:
        """See `Stored`."""
        try:
            from_arrays(self._file.state_dict, model)
        except StateDictError as e:
            return e.problems
        except ValueError as e:
            raise UserError(str(e)) from e
        return []

    def read(self, model: Model, mesh: Mesh | None = None) -> Variables:
        """See `Stored`."""
        with agreed():
            try:
                variables = from_arrays(self._file.state_dict, model)
            except StateDictError as e:
                raise UserError(f"{self.place} is not what it says it is: {few(e.problems)}") from e
        if mesh is None:
            return variables
        return jax.tree.map(
            lambda x, sharding: jax.make_array_from_callback(x.shape, sharding, x.__getitem__),
            variables,
            state_shardings(variables, mesh),
        )

    @functools.cached_property
    def _file(self) -> WeightFile:
        return read_weight_file(self._path, ema=self.ema)

    @property
    def _path(self) -> epath.Path:
        return self.place

    @functools.cached_property
    def _description(self) -> Description | None:
        content = self._file.description
        return None if content is None else Description.from_json(content, self.place)


class StoredPublished(StoredFile):
    """Weights in the form of the hub: model.safetensors and config.json, timm's or ours."""

    def __init__(
        self,
        place: epath.Path,
        file: Callable[[str], epath.Path],
        *,
        ema: bool = False,
        pinned: str = "",
    ):
        """Reads config.json; model.safetensors is read when it is needed.

        Args:
          place: the folder, or the name on the hub.
          file: from the name of a file to its path.
          ema: whether to read averaged weights, of which there are none.
          pinned: the name on the hub with the commit.
        """
        super().__init__(place, ema=ema)
        self.config_place = place / CONFIG
        self._file_named = file
        self._pinned = pinned
        self._description, self._remark = _read_config(file(CONFIG), self.config_place)

    @property
    def taken(self) -> str:
        """See `Stored`."""
        moves = self._pinned not in ("", str(self.place))  # with the next commit
        chosen = f"{self.place} is now at {self._pinned}." if moves else ""
        return " ".join(filter(None, (chosen, self._remark, super().taken)))

    @property
    def origin(self) -> str:
        """See `Stored`."""
        return self._pinned or super().origin

    @property
    def _path(self) -> epath.Path:
        return self._file_named(WEIGHTS)


def _read_config(path: epath.Path, place: epath.Path) -> tuple[Description, str]:
    """The description in config.json, and a sentence about what it says and is not done; or "".

    Args:
      path: the file.
      place: its name, for messages.

    Raises:
      UserError: it is unreadable, or describes no model that is known here.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(
            f"{place} cannot be read ({e.strerror or e}); it describes {WEIGHTS}"
        ) from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{place} is damaged ({e}); fetch or write it again") from e
    if not isinstance(content, dict) or DESCRIPTION not in content:
        return from_timm(content, place)
    description = Description.from_json(content[DESCRIPTION], place)
    module, own, _ = str(description.config.model.get("name")).rpartition(":")
    if own and is_on_hub(place) and module not in sys.modules:
        raise UserError(
            f"{place} names a model of the module {module!r}, and names from the hub import "
            f"nothing; import {module} before sret_jax.load, if you trust it"
        )
    return description, ""
