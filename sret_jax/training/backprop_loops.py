"""Gradients through the last loops of each block only: config.recursion.backprop_loops.

With k, the gradient of a step stops at the input of the last k applications of each block; see
`Recursion`. The loss is unchanged. What comes before the last block then has no gradient, unless
input injection carries it past the others into the last applications.
"""

from collections.abc import Iterable
from typing import Any

import jax
from ml_collections import ConfigDict

from sret_jax.errors import UserError, few
from sret_jax.models.adapters import Injection, adapters_of
from sret_jax.models.model import Model
from sret_jax.models.variables import block_names, is_head
from sret_jax.training.train_loops import TrainLoops


def check_backprop_loops(config: ConfigDict, train_loops: TrainLoops, exits: Iterable[int]) -> None:
    """Checks config.recursion.backprop_loops.

    Args:
      config: the config of the run.
      train_loops: the loops of its steps.
      exits: numbers of the exits that have a loss.

    Raises:
      UserError: gradients cannot pass through so many loops, or not from an exit to the block.
    """
    k, most = config.recursion.backprop_loops, train_loops.counts[-1]
    if k is None:
        return
    if not 1 <= k <= most:
        raise UserError(
            f"config.recursion.backprop_loops={k} must be from 1 to {most}, the most loops of a "
            "training step, or be left out"
        )
    if config.optim.freeze_backbone:
        raise UserError(
            f"config.recursion.backprop_loops={k} has no effect with "
            "config.optim.freeze_backbone=True, which lets gradients reach the head alone; leave "
            "one of them out"
        )
    if early := [exit for exit in exits if exit <= most - k]:
        raise UserError(
            f"config.mixed_depth gives exit {early[0]} a loss, but only the last {k} of {most} "
            f"loops have a gradient; give --config.recursion.backprop_loops={most - early[0] + 1}, "
            "or exits after later loops"
        )


def parts_without_gradient(model: Model, parts: Iterable[str]) -> list[str]:
    """The parts of a model that have no gradient in steps of more than k loops.

    Input injection passes the gradient from the last applications to the input of the first.
    """
    if any(isinstance(own, Injection) for own in adapters_of(model.adapters)):
        return []
    return [
        part for part in parts if part not in (block_names(model)[-1], "norm") and not is_head(part)
    ]


def lost_gradients(model: Model, params: Any, k: int | None, most: int) -> str:
    """Says which parts of the model have no gradient; "" if all have one.

    Args:
      model: the model.
      params: its parameters, or their shapes.
      k: config.recursion.backprop_loops.
      most: the most loops of a training step.
    """
    parts = parts_without_gradient(model, params)
    if k is None or k >= most or not parts:
        return ""
    size = sum(x.size for x in jax.tree.leaves([params[part] for part in parts]))
    total = sum(x.size for x in jax.tree.leaves(params))
    return (
        f"With config.recursion.backprop_loops={k}, the gradient of steps of more loops stops in "
        f"{block_names(model)[-1]}: in them, the parts before it have no gradient, {size:,} of "
        f"{total:,} parameters ({few(parts)}), nor have NLLs and adapters of earlier loops."
    )
