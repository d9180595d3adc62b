"""Trained weights on disk, and the model that they belong to."""

import abc
import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.errors import UserError, few
from sret_jax.models.adapters import adapters_of
from sret_jax.models.checks import check
from sret_jax.models.model import Model, Shapes
from sret_jax.models.model_settings import SPEED_ONLY, model_settings
from sret_jax.models.registry import (
    create_model,
    family_of,
    list_models,
    nearest_variant,
    variant,
)
from sret_jax.models.variables import Variables, block_names
from sret_jax.parallel.distributed import say
from sret_jax.settings.config_model import create_from_config
from sret_jax.weights.adaptation import ADAPTED, changes, compare, fit, other_architecture

OTHERWISE = (
    "others are given with --unsliced, with groups= from Python, or of a teacher with "
    "config.distill.teacher_groups"
)


class Stored(abc.ABC):
    """Trained weights on disk. Each part is read when it is needed, and only once.

    Attributes:
      place: path of the weights.
      config_place: path of the file that contains `config`, if there is one.
      ema: whether these are the averaged weights.
    """

    place: epath.Path
    config_place: epath.Path
    ema: bool

    @property
    @abc.abstractmethod
    def config(self) -> ConfigDict | None:
        """The stored description of the weights: at least the sections "model" and "data"."""

    @property
    @abc.abstractmethod
    def class_names(self) -> list[str] | None:
        """Class names in the order of the logits; None if they are not stored."""

    @property
    @abc.abstractmethod
    def shapes(self) -> Shapes:
        """The shapes of the arrays, by path in Flax or by name in torch."""

    @abc.abstractmethod
    def names(self, model: Model) -> set[str]:
        """The names that the published arrays of a model have in `shapes`."""

    @property
    def taken(self) -> str:
        """Sentences about a choice, such as among several sets of weights in a file; or ""."""
        return ""

    @property
    def origin(self) -> str:
        """The name of these weights, without the folders of this machine."""
        return self.place.name

    @abc.abstractmethod
    def misfits(self, model: Model) -> list[str]:
        """The differences between the arrays on disk and those of a model, one line per array."""

    @abc.abstractmethod
    def read(self, model: Model, mesh: Mesh | None = None) -> Variables:
        """Reads the weights.

        Args:
          model: the model that the arrays belong to.
          mesh: devices to place the arrays on, sharded as in a run; None: NumPy arrays.

        Raises:
          UserError: the arrays are not the model's, or there are no averaged weights.
        """

    def load(self, name: str | None = None, **settings: Any) -> tuple[Model, Variables]:
        """Like the function `load`, but returns NumPy arrays, for any devices."""
        say(self.taken)
        adapted = {"loops"} | self._family(name).resizable
        wanted = {size: settings.pop(size, None) for size in adapted}
        there = self.model(name, **settings)
        here = there.clone(**{size: value for size, value in wanted.items() if value is not None})
        variables = self.read(there)
        try:
            return here, jax.tree.map(np.asarray, fit(there, variables, here))
        except ValueError as e:
            raise UserError(f"{self.place}: {e}") from e

    def model(self, name: str | None = None, **settings: Any) -> Model:
        """The model that the weights belong to. Prints what it assumes about the model.

        Args:
          name: name of the variant; default: the variant stored with the weights, or the published
            variant that the arrays fit.
          **settings: model settings that replace the stored ones.

        Raises:
          UserError: the weights are unreadable or belong to no known model, or settings do not fit.
        """
        own = self._described_name
        if self.config is not None and name in (None, own):
            return self._described(self.config, settings)
        model = self._variant(name or self._fitting, settings)
        say(
            f"{self.place} says that it holds a {own}, and is taken for the {name} that was asked "
            f"for{f' with {model.slicing}' if model.slicing else ''}."
            if own
            else self._assumption(name, model, settings)
        )
        return model

    def beside(self, here: Model) -> tuple[Model, list[str]]:
        """The model of the weights in the form that `fit` needs to convert them to `here`.

        Returns:
          `here` with the classes, image size and loops of the weights, and plain attention, because
          its groups might not divide the tokens of that image size; and the settings in which
          `here` computes differently from the trained model, in words.

        Raises:
          UserError: the weights have another architecture, even if the arrays are the same.
        """
        otherwise = []
        if self.config:
            saved = self.model()
            otherwise = compare(saved, here)  # names settings, so before arrays are compared
            adapted = {name: getattr(saved, name) for name in ADAPTED | here.resizable}
        else:
            adapted = {**here.sizes(self.shapes), "loops": self._loops(here)}
        there = here.without_slices().clone(**adapted)
        try:
            check(there)
        except ValueError as e:
            raise other_architecture([str(e)]) from e
        if problems := self.misfits(there):
            raise other_architecture(problems)
        try:
            return there, changes(there, here) + otherwise
        except ValueError as e:
            raise UserError(str(e)) from e

    def adapters(self, here: Model) -> tuple[str, ...]:
        """Those of a model's adapters that the weights have rows of."""
        first = f"params/{block_names(here)[0]}"
        return tuple(
            specification
            for specification, own in zip(here.adapters, adapters_of(here.adapters), strict=True)
            if any(path.startswith(f"{first}/{own.name}/") for path in self.shapes)
        )

    @property
    def test_crop(self) -> float:
        """See the function `test_crop`."""
        if self.config is None:
            size = family_of(self._fitting).sizes(self.shapes).get("image_size")
            return variant(self._fitting, size).test_crop
        try:
            return float(self.config.data.test_crop)
        except (AttributeError, TypeError, ValueError) as e:
            raise UserError(
                f"{self.config_place} has no data.test_crop ({e}); fix it, or move it away"
            ) from e

    def variant(self, model: Model) -> str:
        """The published variant of these weights' model, or the one that it was derived from."""
        return self.config.model.name if self.config else nearest_variant(model)

    @property
    def _described_name(self) -> str | None:
        """The name of the variant stored with the weights."""
        described = self.config.get("model") if self.config else None
        return described.get("name") if isinstance(described, ConfigDict) else None

    def _family(self, name: str | None) -> type[Model]:
        """The family of the model that `model` returns, or Model where that will raise an error."""
        known = name or (self._described_name if self.config else self._fitting)
        with contextlib.suppress(ValueError):
            return family_of(known or "")
        return Model

    def _described(self, config: ConfigDict, settings: Mapping[str, Any]) -> Model:
        """The model in the stored description, with `settings` in place of its own."""
        try:
            classes: Any = config.model.get("num_classes")
            if classes is None:
                classes = _family(config.model.name).sizes(self.shapes).get("num_classes")
            model = create_from_config(config, classes)
        except (AttributeError, KeyError, TypeError) as e:
            raise UserError(
                f"{self.config_place} describes no model ({e}); fix it, or move it away"
            ) from e
        speed = {name: getattr(model, name) for name in SPEED_ONLY}
        return _create(config.model.name, {**speed, **model_settings(model), **settings})

    @functools.cached_property
    def _fitting(self) -> str:
        """The name of the published model that the arrays fit, or else fit best."""
        found = {}  # the models that have the same names of arrays
        for name in list_models():
            family = _family(name)
            unsliced = {} if family.why_unsliced else {"groups": None}  # arrays show no groups
            sizes = family.sizes(self.shapes)
            with contextlib.suppress(UserError):  # another family's arrays may show absurd sizes
                model = _create(name, sizes | unsliced)
                if (names := self.names(model)) & self.shapes.keys():
                    found[name] = (len(names ^ self.shapes.keys()), model)
        if not found:
            raise UserError(
                f"{self.place} holds no weights of a published model; give other weights"
            )
        least = min(different for different, _ in found.values())
        same_names = [name for name, (different, _) in found.items() if different == least]
        misfits = {}
        # `misfits` traces a model, which takes a second, so the likely ones come first.
        for name in sorted(same_names, key=lambda name: not self._has_width(found[name][1])):
            misfits[name] = self.misfits(found[name][1])
            if not misfits[name]:
                return name
        nearest = min(misfits, key=lambda name: len(misfits[name]))
        which = f", of which {nearest} is the nearest" if len(misfits) > 1 else ""
        raise UserError(
            f"{self.place} does not fit {' or '.join(misfits)}{which}: {few(misfits[nearest])}"
        )

    def _has_width(self, model: Model) -> bool:
        """Whether the last norm is as wide as the model's last stage."""
        norm = self.shapes.get("params/norm/scale", self.shapes.get("norm.weight"))
        return norm == (model.stages[-1].width,)

    def _loops(self, here: Model) -> int:
        """The loops that weights without a description were trained with.

        The NLLs show them. Without NLLs the weights are those of a published model.
        """
        nlls, left = divmod(here.nlls(self.shapes), here.blocks[0])  # per block
        if not nlls or left:
            published = type(here).variants[nearest_variant(here)].settings
            return published.get("loops", type(here).loops)
        return here.loops if nlls == here.loops // here.nll_every else nlls * here.nll_every

    def _variant(self, name: str, settings: dict[str, Any]) -> Model:
        """The published variant with these settings, which the arrays must fit."""
        family = _family(name)
        try:
            model = _create(name, {**family.sizes(self.shapes), **settings})
        except UserError as e:
            sliced = "groups" not in settings and "groups" in variant(name).settings
            raise UserError(f"{self.place}: {e}{f' ({OTHERWISE})' if sliced else ''}") from e
        if misfits := self.misfits(model):
            raise UserError(f"{self.place} does not fit {name}: {few(misfits)}")
        return model

    def _assumption(self, name: str | None, model: Model, settings: Mapping[str, Any]) -> str:
        """A sentence about what is assumed if the weights have no description."""
        if name and "groups" in settings:
            return ""
        taken_for = name or nearest_variant(model)
        assumed = (
            f"{self.place} does not say which model it holds; it is taken for {taken_for} at "
            f"{model.image_size} pixels"
        )
        if "groups" in settings:
            return f"{assumed}, whose arrays it has."
        if model.slicing:
            return f"{assumed} with {model.slicing}, as published ({OTHERWISE})."
        return f"{assumed}."


def _family(name: str) -> type[Model]:
    """`family_of`, but raises UserError."""
    try:
        return family_of(name)
    except ValueError as e:
        raise UserError(str(e)) from e


def _create(name: str, settings: Mapping[str, Any]) -> Model:
    """`create_model`, but raises UserError."""
    try:
        return create_model(name, **settings)
    except ValueError as e:
        raise UserError(str(e)) from e
