"""Adapts trained weights to a model of the same architecture with other image size or loops."""

from collections.abc import Sequence

import jax
import numpy as np

from sret_jax.errors import UserError, few
from sret_jax.models.loops import with_loops
from sret_jax.models.model import Model, Variables, function_settings, is_head
from sret_jax.models.position import with_image_size

ADAPTED = frozenset({"num_classes", "image_size", "loops"})
WEIGHTLESS = frozenset({"groups", "permutation"})  # these may differ without changing the weights


def compare(saved: Model, model: Model) -> list[str]:
    """The settings in which a model computes differently from the trained one, in words.

    Args:
      saved: the model that the weights were trained in.
      model: the model that will get them, after `fit`.

    Raises:
      UserError: the architecture differs, even if the arrays are the same (e.g. other heads).
    """
    if type(saved) is not type(model):
        families = (type(m).__name__ for m in (saved, model))
        raise other_architecture(["{} there, {} here".format(*families)])
    there, here = function_settings(saved), function_settings(model)
    differ = [name for name in there if there[name] != here[name] and name not in ADAPTED]
    if others := [name for name in differ if name not in WEIGHTLESS]:
        raise other_architecture(
            [f"{name} is {there[name]} there, {here[name]} here" for name in others]
        )
    return [f"{name} {here[name]} instead of {there[name]}" for name in differ]


def other_architecture(problems: Sequence[str]) -> UserError:
    """The error for weights that do not belong to config.model."""
    return UserError(
        f"these weights are of another architecture than config.model ({few(problems, 4)}); give "
        "the config.model that they were trained with, or other weights"
    )


def reorder_classes(variables: Variables, order: Sequence[int]) -> Variables:
    """Reorders the logits: logit i becomes the former logit order[i]."""
    reordered = {
        name: jax.tree.map(lambda x: x[..., np.asarray(order)], part)
        for name, part in variables["params"].items()
        if is_head(name)
    }
    return {**variables, "params": {**variables["params"], **reordered}}


def fit(there: Model, variables: Variables, here: Model) -> Variables:
    """Adapts the weights of one model to the image size and loops of another.

    It applies `with_image_size` and `with_loops`.

    Args:
      there: the model of the weights.
      variables: the weights.
      here: the model that will get them.

    Raises:
      ValueError: the model cannot have those sizes.
    """
    if here.image_size != there.image_size:
        there, variables = with_image_size(there, variables, here.image_size)
    if here.loops != there.loops:
        there, variables = with_loops(there, variables, here.loops)
    return variables


def changes(saved: Model, model: Model) -> list[str]:
    """Describes what `fit` changes."""
    words = []
    if saved.image_size != model.image_size:
        old, new = (m.stages[0].side for m in (saved, model))
        words.append(
            f"{model.image_size} pixels instead of {saved.image_size} (positions resized from "
            f"{old}x{old} to {new}x{new})"
        )
    if saved.loops != model.loops:
        rule = " (later loops repeat the last NLL)"
        if model.loops < saved.loops:
            rule = " (the first NLLs stay)"
        loops = f"{model.loops} loop{'s' if model.loops > 1 else ''}"
        words.append(f"{loops} instead of {saved.loops}{rule if model.nll_ratio else ''}")
    return words
