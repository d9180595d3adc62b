"""Loads trained weights: of a run or one of its steps, a folder, a file, or by name."""

import functools
import json
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.checkpoints.manager import CHECKPOINTS, array_shapes, differences
from sret_jax.checkpoints.reading import best_step, read_weights, saved_shapes
from sret_jax.errors import UserError
from sret_jax.files import absolute, is_on_hub
from sret_jax.models.model import Model, Shapes
from sret_jax.models.variables import Variables, abstract_variables
from sret_jax.parallel.distributed import agreed
from sret_jax.parallel.mesh import state_shardings, with_shardings
from sret_jax.settings.saved_config import CLASSES_FILE, CONFIG_FILE, load_config
from sret_jax.weights.hub import WEIGHTS, Repository
from sret_jax.weights.packaged import packaged_file, packaged_names
from sret_jax.weights.stored import Stored
from sret_jax.weights.stored_files import StoredFile, StoredPublished

BEST = "best"  # stands for a step: RUN/checkpoints/best


def load(
    path: epath.PathLike, *, ema: bool = False, name: str | None = None, **settings: Any
) -> tuple[Model, dict[str, Any]]:
    """Loads a trained model and its weights onto the first device.

    Args:
      path: the workdir of a run, one of its steps (RUN/checkpoints/120, or RUN/checkpoints/best
        for the step with the highest raw top-1), a converted checkpoint, a file of weights under
        the published names, a folder with config.json and model.safetensors, or a repository with
        these two on the Hugging Face hub, hf://timm/deit_tiny_patch16_224.fb_in1k, at its newest
        commit, or hf://OWNER/NAME@REVISION at a branch, tag or commit. Files of torch and
        safetensors are recognised by their content. Where there is no such file or folder, the name
        of weights that come with this package, such as "digits_small".
      ema: loads the averaged weights of a run, or those that a training script stored in a file.
      name: name of the published variant; default: the variant stored in the run or file, or the
        one that the arrays fit.
      **settings: model settings that replace the stored ones, e.g. loops=3 (see `with_loops`),
        image_size=384 (see `with_image_size`), permutation="random". Files that were not written
        here do not contain the slicing of attention: the variant's own groups are assumed, and a
        sentence says so. groups=None means unsliced.

    Returns:
      (model, variables), for `model.apply(variables, images, train=False)` or `predict`.

    Raises:
      UserError: the path has no readable weights, they belong to no known model, or settings do not
        fit.
    """
    model, variables = find(path, ema=ema).load(name, **settings)
    return model, jax.device_put(variables, jax.local_devices()[0])


def class_names(path: epath.PathLike) -> list[str] | None:
    """The classes that weights were trained on, in the order of the logits; None if not stored."""
    return find(path).class_names


def test_crop(path: epath.PathLike) -> float:
    """The fraction of the shorter side that weights saw in evaluation, config.data.test_crop.

    If it is not stored it is 0.875, as published.

    Raises:
      UserError: there is nothing at the path, or its config is damaged.
    """
    return find(path).test_crop


def find(path: epath.PathLike, *, ema: bool = False) -> Stored:
    """Finds the weights at a path; `load` lists the kinds of paths.

    Raises:
      UserError: there is nothing at the path; see also `Repository`.
    """
    if is_on_hub(path):
        repository = Repository(path)
        place, pinned = repository.place, repository.pinned
        return StoredPublished(place, repository.file, ema=ema, pinned=pinned)
    place = absolute(path)
    if place.is_file():
        return StoredFile(place, ema=ema)
    if (place / WEIGHTS).exists() and not (place / CHECKPOINTS).exists():
        return StoredPublished(place, lambda name: place / name, ema=ema)
    workdir, step = split_step(place)
    if not workdir.exists():
        if file := packaged_file(path):
            return StoredFile(file, ema=ema)
        raise UserError(
            f"there is no file or folder {workdir}; give a run, one of its steps, a converted "
            "checkpoint, a weight file, hf://OWNER/NAME on the Hugging Face hub, or the name of "
            f"weights that come with this package: {', '.join(packaged_names())}"
        )
    return StoredFolder(workdir, step, ema=ema)


def split_step(path: epath.Path) -> tuple[epath.Path, int | None]:
    """Splits a path into workdir and step; None: the newest step.

    RUN/checkpoints/120 -> (RUN, 120). RUN/checkpoints/best -> RUN and the step with the highest raw
    top-1. Any other path is a workdir.

    Raises:
      UserError: the best step is requested, but no step was evaluated.
    """
    if path.parent.name == CHECKPOINTS and path.name.isdecimal():
        return path.parent.parent, int(path.name)
    if path.parent.name == CHECKPOINTS and path.name == BEST:
        return path.parent.parent, best_step(path.parent.parent)
    return path, None


class StoredFolder(Stored):
    """The weights of a run or of a converted checkpoint: a folder with checkpoints/.

    Attributes:
      workdir: the folder.
      step: the step of the weights; before they are read None if any will do.
    """

    def __init__(self, workdir: epath.Path, step: int | None = None, *, ema: bool = False):
        """Stores the arguments; reads nothing yet.

        Args:
          workdir: folder that contains checkpoints/.
          step: step of the weights; default: the newest readable one.
          ema: whether to read the averaged weights.
        """
        self.place = workdir if step is None else workdir / CHECKPOINTS / str(step)
        self.config_place = workdir / CONFIG_FILE
        self.ema = ema
        self.workdir = workdir
        self.step = step

    @functools.cached_property
    def config(self) -> ConfigDict | None:
        """See `Stored`."""
        return load_config(self.workdir)

    @functools.cached_property
    def class_names(self) -> list[str] | None:
        """See `Stored`."""
        file = self.workdir / CLASSES_FILE
        if not file.exists():
            return None
        try:
            names = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"{file} is damaged ({e}); fix it or move it away") from e
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise UserError(f"{file} holds no list of names; fix it or move it away")
        return names

    @functools.cached_property
    def shapes(self) -> Shapes:
        """See `Stored`; paths such as "params/head/bias"."""
        return saved_shapes(self.workdir, self.step)

    def names(self, model: Model) -> set[str]:
        """See `Stored`."""
        return {"/".join(entry.path) for entry in model.torch_entries()}

    def misfits(self, model: Model) -> list[str]:
        """See `Stored`."""
        return differences(self.shapes, array_shapes(abstract_variables(model)))

    def read(self, model: Model, mesh: Mesh | None = None) -> Variables:
        """See `Stored`."""
        _, weights = self.read_all(model, mesh)
        which = "eval_ema" if self.ema else "eval"
        with agreed():
            if which not in weights:
                raise UserError(
                    f"{self.place} holds no averaged weights; leave out ema, or set "
                    "config.init_ema=False"
                )
        return weights[which] if mesh else jax.device_get(weights[which])

    def read_all(self, model: Model, mesh: Mesh | None = None) -> tuple[int, dict[str, Variables]]:
        """Reads the step, and its raw ("eval") and, if any, averaged ("eval_ema") weights.

        Args:
          model: the model that the arrays belong to.
          mesh: devices to place the arrays on, sharded as in a run; None: the first device.

        Raises:
          UserError: there is no readable checkpoint, or the arrays are not the model's.
        """
        abstract = abstract_variables(model)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        alone = jax.tree.map(lambda _: here, abstract)
        shardings = state_shardings(abstract, mesh) if mesh else alone
        target = with_shardings(abstract, shardings)
        self.step, weights = read_weights(self.workdir, target, self.step)
        return self.step, weights
