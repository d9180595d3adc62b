"""Trained weights fitted to a model of the same architecture with other image size or loops."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sret_jax.errors import UserError, few
from sret_jax.models.families.sret import STEM_STRIDE, SReT, function_settings
from sret_jax.models.loops import with_loops
from sret_jax.models.position import with_image_size
from sret_jax.weights.pretrained import Shapes

ADAPTED = frozenset({"num_classes", "image_size", "loops"})
WEIGHTLESS = frozenset({"groups", "permutation"})  # others need no other weights


def compare(saved: SReT, model: SReT) -> list[str]:
    """What the model computes otherwise than its weights were trained for, in words.

    Args:
      saved: the model that the weights say they are of.
      model: is to have them, after `adapt`.

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


def as_saved(model: SReT, shapes: Shapes) -> SReT:
    """The model with the classes, image size and loops that arrays on disk show.

    Its attention is plain: groups do not show, and need not divide the tokens of another size.

    Args:
      model: whose architecture it is.
      shapes: by path such as "params/head/bias"; what they do not show stays.
    """
    shown: dict[str, Any] = {}
    if len(head := shapes.get("params/head/bias", ())) == 1:
        shown["num_classes"] = head[0]
    if len(position := shapes.get("params/pos_embed", ())) == 4:
        shown["image_size"] = position[1] * STEM_STRIDE
    nlls = shapes.get("params/stage0_block0/nll/residual/skip", ())
    if len(nlls) == 1 and nlls[0] != model.loops // model.nll_every:
        shown["loops"] = nlls[0] * model.nll_every
    return model.clone(groups=((1,),) * len(model.groups), **shown)


def reorder_classes(variables: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
    """The weights with logit i that of `order[i]` before."""
    params = dict(variables["params"])
    params["head"] = jax.tree.map(lambda x: x[..., np.asarray(order)], params["head"])
    return {**variables, "params": params}


def adapt(saved: SReT, variables: Mapping[str, Any], model: SReT) -> dict[str, Any]:
    """The weights with the model's image size and loops, by `with_image_size` and `with_loops`."""
    saved, fitted = with_image_size(saved, variables, model.image_size)
    return with_loops(saved, fitted, model.loops)[1]


def changes(saved: SReT, model: SReT) -> list[str]:
    """What `adapt` changes, in words."""
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
