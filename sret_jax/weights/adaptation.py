"""Adapts trained weights to a model of the same architecture with other image size or loops."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from sret_jax.errors import UserError, few
from sret_jax.models.loops import with_loops
from sret_jax.models.model import Model
from sret_jax.models.model_settings import changed_settings
from sret_jax.models.position import with_image_size
from sret_jax.models.variables import Variables, abstract_variables, is_head

ADAPTED = frozenset({"num_classes", "loops"})  # and what is `resizable`


def compare(saved: Model, model: Model) -> list[str]:
    """The settings in which a model computes differently from the trained one, in words.

    Args:
      saved: the model that the weights were trained in.
      model: the model that will get them, after `fit`.

    Raises:
      UserError: the architecture differs, even if the arrays are the same (e.g. other heads).
    """
    changed = changed_settings(saved, model)
    adapted = ADAPTED | model.resizable
    if others := changed.keys() - adapted - model.weightless:
        raise other_architecture(
            f"{name} is {there} there, {here} here"
            for name, (there, here) in changed.items()
            if name in others
        )
    return [
        f"{name} {here} instead of {there}"
        for name, (there, here) in changed.items()
        if name not in adapted
    ]


def other_architecture(problems: Iterable[str]) -> UserError:
    """The error for weights that do not belong to config.model."""
    which = few([*problems], 4)
    return UserError(
        f"these weights are of another architecture than config.model ({which}); give "
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
    """Adapts the weights of one model to the sizes and loops of another.

    It applies `with_image_size` and `with_loops`.

    Args:
      there: the model of the weights.
      variables: the weights.
      here: the model that will get them.

    Raises:
      ValueError: the model cannot have those sizes.
    """
    sizes = {name: getattr(here, name) for name in here.resizable}
    if any(getattr(there, name) != value for name, value in sizes.items()):
        there, variables = with_image_size(there, variables, **sizes)
    if here.loops != there.loops:
        there, variables = with_loops(there, variables, here.loops)
    return variables


def changes(saved: Model, model: Model) -> list[str]:
    """Describes what `fit` changes.

    Raises:
      ValueError: a parameter cannot be resized.
    """
    words = []
    for name in sorted(model.resizable):
        old, new = getattr(saved, name), getattr(model, name)
        if old != new:
            of = f"{new} pixels" if name == "image_size" else f"{name} {new}"
            words.append(f"{of} instead of {old}")
    if words and (arrays := resized_arrays(saved, model)):
        words[-1] += f" ({few(arrays)})"
    if saved.loops != model.loops:
        own = [n for n, has in (("NLL", model.nll_ratio), ("adapter row", model.adapters)) if has]
        last, first = (" and ".join(name + end for name in own) for end in ("", "s"))
        fewer = model.loops < saved.loops
        rule = f" (the first {first} stay)" if fewer else f" (later loops repeat the last {last})"
        loops = f"{model.loops} loop{'s' if model.loops > 1 else ''}"
        words.append(f"{loops} instead of {saved.loops}{rule if own else ''}")
    return words


def resized_arrays(saved: Model, model: Model) -> list[str]:
    """The parameters that `fit` resizes, each name once, in words.

    Raises:
      ValueError: a parameter cannot be resized.
    """
    sized = saved.clone(**{name: getattr(model, name) for name in model.resizable})
    params = abstract_variables(saved)["params"]
    new = flatten_dict(jax.eval_shape(lambda params: sized.resized(params, saved), params))
    words = {}
    for path, before in flatten_dict(params).items():
        axes = [i for i, n in enumerate(before.shape) if n != new[path].shape[i]]
        if axes:
            sides = ("x".join(str(x.shape[i]) for i in axes) for x in (before, new[path]))
            words[path[-1]] = "{} resized from {} to {}".format(path[-1], *sides)
    return [*words.values()]
