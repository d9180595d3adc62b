"""Trained weights on disk, and the model that they belong to."""

import abc
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.errors import UserError, few
from sret_jax.models.apply import Variables
from sret_jax.models.families.sret import SPEED_ONLY, SReT, create_model, model_settings
from sret_jax.models.families.variants import list_models, nearest_variant
from sret_jax.parallel.distributed import say
from sret_jax.settings.config_model import create_from_config
from sret_jax.weights.adaptation import changes, compare, fit, other_architecture

PUBLISHED_TEST_CROP = 0.875
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
    def sizes(self) -> dict[str, Any]:
        """The num_classes and image_size of the model, as far as the arrays show them."""

    @property
    @abc.abstractmethod
    def nlls(self) -> int:
        """The number of NLLs in the first stage, over all its blocks and loops."""

    @property
    def taken(self) -> str:
        """A sentence about the choice among several sets of weights in a file; "" for one set."""
        return ""

    @abc.abstractmethod
    def misfits(self, model: SReT) -> list[str]:
        """The differences between the arrays on disk and those of a model, one line per array."""

    @abc.abstractmethod
    def read(self, model: SReT, mesh: Mesh | None = None) -> Variables:
        """Reads the weights.

        Args:
          model: the model that the arrays belong to.
          mesh: devices to place the arrays on, sharded as in a run; None: NumPy arrays.

        Raises:
          UserError: the arrays are not the model's, or there are no averaged weights.
        """

    def load(self, name: str | None = None, **settings: Any) -> tuple[SReT, Variables]:
        """Like the function `load`, but returns NumPy arrays, for any devices."""
        say(self.taken)
        wanted = {size: settings.pop(size, None) for size in ("loops", "image_size")}
        there = self.model(name, **settings)
        here = there.clone(**{size: value for size, value in wanted.items() if value is not None})
        variables = self.read(there)
        try:
            return here, jax.tree.map(np.asarray, fit(there, variables, here))
        except ValueError as e:
            raise UserError(f"{self.place}: {e}") from e

    def model(self, name: str | None = None, **settings: Any) -> SReT:
        """The model that the weights belong to. Prints what it assumes about the model.

        Args:
          name: name of the variant; default: the variant stored with the weights, or the published
            variant that the arrays fit.
          **settings: model settings that replace the stored ones.

        Raises:
          UserError: the weights are unreadable or belong to no known model, or settings do not fit.
        """
        described = self.config.get("model") if self.config else None
        own = described.get("name") if isinstance(described, ConfigDict) else None
        if self.config is not None and name in (None, own):
            return self._described(self.config, settings)
        model = self._variant([name] if name else list_models(), settings)
        say(
            f"{self.place} says that it holds a {own}, and is taken for the {name} that was asked "
            f"for, with attention groups {model.groups}."
            if own
            else self._assumption(name, model, settings)
        )
        return model

    def beside(self, here: SReT) -> tuple[SReT, list[str]]:
        """The model of the weights in the form that `fit` needs to convert them to `here`.

        Returns:
          `here` with the classes, image size and loops of the weights, and plain attention, because
          its groups might not divide the tokens of that image size; and the settings in which
          `here` computes differently from the trained model, in words.

        Raises:
          UserError: the weights have another architecture, even if the arrays are the same.
        """
        there = here.clone(groups=((1,),) * len(here.groups), **self.sizes)
        nlls, left = divmod(self.nlls, here.blocks[0])  # per block
        if nlls and not left and nlls != here.loops // here.nll_every:
            there = there.clone(loops=nlls * here.nll_every)
        otherwise = compare(self.model(), here) if self.config else []  # names settings, so first
        if problems := self.misfits(there):
            raise other_architecture(problems)
        return there, changes(there, here) + otherwise

    @property
    def test_crop(self) -> float:
        """See the function `test_crop`."""
        if self.config is None:
            return PUBLISHED_TEST_CROP
        try:
            return float(self.config.data.test_crop)
        except (AttributeError, TypeError, ValueError) as e:
            raise UserError(
                f"{self.config_place} has no data.test_crop ({e}); fix it, or move it away"
            ) from e

    def variant(self, model: SReT) -> str:
        """The published variant of these weights' model, or the one that it was derived from."""
        return self.config.model.name if self.config else nearest_variant(model_settings(model))

    def _described(self, config: ConfigDict, settings: Mapping[str, Any]) -> SReT:
        """The model in the stored description, with `settings` in place of its own."""
        try:
            classes: Any = config.model.get("num_classes") or self.sizes.get("num_classes")
            model = create_from_config(config, classes)
        except (AttributeError, KeyError, TypeError) as e:
            raise UserError(
                f"{self.config_place} describes no model ({e}); fix it, or move it away"
            ) from e
        speed = {name: getattr(model, name) for name in SPEED_ONLY}
        return _create(config.model.name, {**speed, **model_settings(model), **settings})

    def _variant(self, names: list[str], settings: dict[str, Any]) -> SReT:
        """The first of these published variants that the arrays fit."""
        misfits: dict[str, list[str]] = {}
        for name in names:
            try:
                model = _create(name, {**self.sizes, **settings})
            except UserError as e:
                otherwise = "" if "groups" in settings else f" ({OTHERWISE})"
                raise UserError(f"{self.place}: {e}{otherwise}") from e
            misfits[name] = self.misfits(model)
            if not misfits[name]:
                return model
        nearest = min(misfits, key=lambda name: len(misfits[name]))
        which = f", of which {nearest} is the nearest" if len(misfits) > 1 else ""
        raise UserError(
            f"{self.place} does not fit {' or '.join(misfits)}{which}: {few(misfits[nearest])}"
        )

    def _assumption(self, name: str | None, model: SReT, settings: Mapping[str, Any]) -> str:
        """A sentence about what is assumed if the weights have no description."""
        if name and "groups" in settings:
            return ""
        variant = name or nearest_variant(model_settings(model))
        assumed = f"{self.place} does not say which model it holds; it is taken for {variant}"
        if "groups" in settings:
            return f"{assumed}, whose arrays it has."
        return f"{assumed} with attention groups {model.groups}, as published ({OTHERWISE})."


def _create(name: str, settings: Mapping[str, Any]) -> SReT:
    """`create_model`, but raises UserError."""
    try:
        return create_model(name, **settings)
    except ValueError as e:
        raise UserError(str(e)) from e
