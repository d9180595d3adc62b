"""What can be read from a model: which tokens attend together, and its residual coefficients."""

from typing import Any

import flax
import jax
import numpy as np

from sret_jax.models.layers.attention import PERMUTATIONS
from sret_jax.models.layers.windows import window_cycle
from sret_jax.models.model import Model
from sret_jax.models.variables import block_names

KINDS = {  # names of residual sums in blocks: what they add
    "attn_residual": "attention",
    "token_residual": "MLP over tokens",
    "mix_residual": "mixing of tokens",
    "mlp_residual": "MLP",
}


def attention_groups(
    model: Model, stage: int, loop: int, key: jax.Array | None = None, block: int = 0
) -> np.ndarray:
    """The attention group of each token; tokens attend only within their group (SReT section 3.4).

    Loop l of a block slices its N tokens into g = groups[l mod len(groups)] runs of N / g tokens.
    Where l mod len(groups) is 0 the tokens are in raster order, otherwise they are permuted first.
    Where blocks attend inside windows, a group is a window, or a part of one that the border of the
    image cuts off; see `window_cycle`.

    Args:
      model: from `create_model` or `load`.
      stage: 0 for the stage of the highest resolution, 1 for the next, ....
      loop: 0 for the first application of a block.
      key: key of a random permutation, like the one that training draws per application. Default:
        the permutation that the model uses in evaluation.
      block: number of the block in its stage; it matters only where windows shift.

    Returns:
      The group number of each token, 0 .. g-1; shape (H, W) of the stage.

    Raises:
      IndexError: the model has no such stage or loop.
      ValueError: the model's blocks do not attend.
    """
    if not model.stages[stage].heads:
        raise ValueError(f"a {type(model).__name__} has no attention groups: {model.why_unsliced}")
    if not 0 <= loop < model.loops:
        raise IndexError(f"loop={loop} is none of 0 .. {model.loops - 1}")
    if window := model.stages[stage].window:
        windows = window_cycle(model.stages[stage].side, window, block)
        return windows[loop % len(windows)].groups()
    side, cycle = model.stages[stage].side, model.stages[stage].groups
    tokens = side * side
    groups = cycle[loop % len(cycle)]
    order = np.arange(tokens)
    if groups > 1 and loop % len(cycle) > 0:
        choice = "random" if key is not None else getattr(model, "permutation", None) or "fixed"
        draw = PERMUTATIONS[choice] if isinstance(choice, str) else choice
        order = np.asarray(draw(jax.random.key(0) if key is None else key, tokens))
    group = np.empty(tokens, int)
    group[order] = np.arange(tokens) // (tokens // groups)  # slot i holds token order[i]
    return group.reshape(side, side)


def residual_coefficients(model: Model, variables: dict[str, Any]) -> dict[str, list[float | None]]:
    """The learned scalars c and d of x <- c1 x + c2 F(x) and x <- d1 x + d2 NLL(x), over depth.

    Args:
      model: from `load` or `create_model`.
      variables: the model's weights, {"params", ...}.

    Returns:
      {"attention, skip": one value per application, from first to last; "MLP, branch"; "NLL, skip";
      ...}, for all sums that the model has. The value is None for an application that no NLL
      follows. Empty if residual sums are plain.
    """
    every = model.nll_every
    values: dict[str, list[float | None]] = {}
    for block in block_names(model):
        for path, leaf in flax.traverse_util.flatten_dict(variables["params"][block]).items():
            of_nll = path[0] == "nll"  # stacked
            if path[-1] not in ("skip", "branch") or (np.ndim(leaf) > 0 and not of_nll):
                continue
            kind = "NLL" if of_nll else KINDS.get(path[-2], "/".join(path[1:-1]))
            values.setdefault(f"{kind}, {path[-1]}", []).extend(
                float(leaf)
                if not of_nll
                else (None if (loop + 1) % every else float(leaf[loop // every]))
                for loop in range(model.loops)
            )
    return values
