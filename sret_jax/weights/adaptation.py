"""Trained weights fitted to a model of the same architecture with other image size or loops."""

from collections.abc import Sequence

import jax
import numpy as np

from sret_jax.errors import UserError, few
from sret_jax.models.apply import Variables
from sret_jax.models.families.sret import STEM_STRIDE, SReT, function_settings
from sret_jax.models.loops import with_loops
from sret_jax.models.position import with_image_size

ADAPTED = frozenset({"num_classes", "image_size", "loops"})
WEIGHTLESS = frozenset({"groups", "permutation"})  # others need no other weights


def compare(saved: SReT, model: SReT) -> list[str]:
    """What the model computes otherwise than its weights were trained for, in words.

    Args:
      saved: the model that the weights say they are of.
      model: is to have them, after `fit`.

    Raises:
      UserError: another architecture, be it of the same arrays: heads, for instance.
    """
    there, here = function_settings(saved), function_settings(model)
    differ = [name for name in there if there[name] != here[name] and name not in ADAPTED]
    if others := [name for name in differ if name not in WEIGHTLESS]:
        raise other_architecture(
            [f"{name} is {there[name]} there, {here[name]} here" for name in others]
        )
    return [f"{name} {here[name]} instead of {there[name]}" for name in differ]


def other_architecture(problems: Sequence[str]) -> UserError:
    """The sentence for weights that are not of config.model."""
    return UserError(
        f"these weights are of another architecture than config.model ({few(problems, 4)}); give "
        "the config.model that they were trained with, or other weights"
    )


def reorder_classes(variables: Variables, order: Sequence[int]) -> Variables:
    """The weights with logit i that of `order[i]` before."""
    params = dict(variables["params"])
    params["head"] = jax.tree.map(lambda x: x[..., np.asarray(order)], params["head"])
    return {**variables, "params": params}


def fit(there: SReT, variables: Variables, here: SReT) -> Variables:
    """The weights of one model with the image size and loops of another.

    They are fitted by `with_image_size` and `with_loops`.

    Args:
      there: the model of the weights.
      variables: the weights.
      here: the model that is to have them.

    Raises:
      ValueError: sizes that the model cannot have.
    """
    if here.image_size != there.image_size:
        there, variables = with_image_size(there, variables, here.image_size)
    if here.loops != there.loops:
        there, variables = with_loops(there, variables, here.loops)
    return variables


def changes(saved: SReT, model: SReT) -> list[str]:
    """What `fit` changes, in words."""
    words = []
    if saved.image_size != model.image_size:
        old, new = (m.image_size // STEM_STRIDE for m in (saved, model))
        words.append(
            f"{model.image_size} pixels instead of {saved.image_size} (positions resized from "
            f"{old}x{old} to {new}x{new})"
        )
    if saved.loops != model.loops:
        rule = "later loops repeat the last NLL"
        if model.loops < saved.loops:
            rule = "the first NLLs stay"
        loops = f"{model.loops} loop{'s' if model.loops > 1 else ''}"
        words.append(f"{loops} instead of {saved.loops} ({rule})")
    return words
