"""Changes the number of loops of a trained model."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.checks import check
from sret_jax.models.model import Model
from sret_jax.models.variables import block_names


def with_loops(
    model: Model, variables: Mapping[str, Any], loops: int
) -> tuple[Model, dict[str, Any]]:
    """Changes a trained model's number of loops, without training.

    Each shared block is applied `loops` times; its group counts continue their cycle. With fewer
    loops only the first NLLs remain. With more loops the last of the J NLLs is repeated: NLL j of
    the new model is NLL min(j, J - 1) of the trained one, so the first loops compute what they
    did in training. (In a model trained with 2 loops on the digits, this rule lost less accuracy
    at 3, 4 and 6 loops than repeating all NLLs, j mod J.)

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
    if not model.nll_ratio:
        return new, dict(variables)
    trained, wanted = (m.loops // m.nll_every for m in (model, new))
    chosen = jnp.minimum(jnp.arange(wanted), trained - 1)
    blocks = block_names(model)
    params = {
        name: {**part, "nll": jax.tree.map(lambda p: p[chosen], part["nll"])}
        if name in blocks
        else part
        for name, part in variables["params"].items()
    }
    return new, {**variables, "params": params}
