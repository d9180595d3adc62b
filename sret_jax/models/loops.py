"""Changes the number of loops of a trained model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.adapters import adapters_of
from sret_jax.models.checks import check
from sret_jax.models.model import Model
from sret_jax.models.variables import block_names


def with_loops(
    model: Model, variables: Mapping[str, Any], loops: int
) -> tuple[Model, dict[str, Any]]:
    """Changes a trained model's number of loops, without training.

    Each shared block is applied `loops` times; its group counts continue their cycle. With fewer
    loops only the first NLLs and rows of adapters remain. With more loops the last of J rows is
    repeated: row j of the new model is row min(j, J - 1) of the trained one, so the first loops
    compute what they did in training. (In a model trained with 2 loops on the digits, this rule
    lost less accuracy at 3, 4 and 6 loops than repeating all NLLs, j mod J.)

    Args:
      model: the trained model.
      variables: {"params": ..., "batch_stats": ...} of that model.
      loops: number of loops of the new model.

    Returns:
      (model, variables) with that many loops. Arrays that did not change are shared.

    Raises:
      ValueError: the model cannot have that many loops.
    """
    new = model.clone(loops=loops)
    check(new)
    trained, wanted = row_counts(model), row_counts(new)
    params = dict(variables["params"])
    for block in block_names(model) if trained else ():
        params[block] = dict(params[block])
        for name in trained:
            chosen = jnp.minimum(jnp.arange(wanted[name]), trained[name] - 1)
            rows = params[block][name]
            params[block][name] = jax.tree.map(lambda row, chosen=chosen: row[chosen], rows)
    return new, {**variables, "params": params}


def row_counts(model: Model) -> dict[str, int]:
    """How many rows each part has that applications own: {"nll": 2, "lora": 2}."""
    counts = {own.name: own.count(model.loops) for own in adapters_of(model.adapters)}
    return counts | ({"nll": model.loops // model.nll_every} if model.nll_ratio else {})
