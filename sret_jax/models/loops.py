"""Other loops for weights that are trained already."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sret_jax.models.families.sret import SReT, check_model


def with_loops(
    model: SReT, variables: Mapping[str, Any], loops: int
) -> tuple[SReT, dict[str, Any]]:
    """The model with other loops and the weights it then has, without training.

    The shared blocks apply as often as asked, their groups running on through the cycle. Fewer
    loops keep the first NLLs; more keep all and repeat the last: NLL j is the trained
    min(j, J - 1). The trained loops thus see what they saw in training. (Trained with 2 loops on
    the digits, this rule lost less at 3, 4 and 6 loops than starting over with NLL j mod J.)

    Args:
      model: that of the weights.
      variables: {"params": ..., "batch_stats": ...}.
      loops: of the new model.

    Returns:
      (model, variables) with that many loops; unchanged arrays are shared.

    Raises:
      ValueError: loops that the model cannot have.
    """
    new = model.clone(loops=loops)
    check_model(new)
    trained, wanted = (m.loops // m.nll_every for m in (model, new))
    chosen = jnp.minimum(jnp.arange(wanted), trained - 1)
    params = {
        name: {**part, "nll": jax.tree.map(lambda p: p[chosen], part["nll"])}
        if name.startswith("stage")
        else part
        for name, part in variables["params"].items()
    }
    return new, {**variables, "params": params}
