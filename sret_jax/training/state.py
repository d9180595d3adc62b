"""What training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sret_jax.models.apply import Variables
from sret_jax.models.families.sret import SReT


class TrainState(struct.PyTreeNode):
    """The whole state of a run: with the config, `step` alone tells which batch comes next.

    Attributes:
      step: steps taken, int32; those that updated nothing count too.
      bad_streak: how many of the last steps, in a row, were not finite and updated nothing, int32.
      variables: {"params", "batch_stats"}, the raw weights.
      ema: exponential moving average of `variables`.
      opt_state: of the optimizer.
    """

    step: jax.Array
    bad_streak: jax.Array
    variables: Variables
    ema: Variables
    opt_state: optax.OptState


def init_state(model: SReT, optimizer: optax.GradientTransformation, seed: Any) -> TrainState:
    """A fresh state, its average equal to its weights; a pure function of the seed."""
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    variables: Variables = dict(model.init(jax.random.key(seed), image))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
        variables=variables,
        # A copy, for donation may not meet one buffer twice.
        ema=jax.tree.map(jnp.copy, variables),
        opt_state=optimizer.init(variables["params"]),
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """What a checkpoint holds of a state: {"model": weights, "ema": average, "train": the rest}."""
    train = {"step": state.step, "bad_streak": state.bad_streak, "opt_state": state.opt_state}
    return {"model": state.variables, "ema": state.ema, "train": train}


def from_items(items: dict[str, Any]) -> TrainState:
    """The inverse of `to_items`."""
    return TrainState(variables=items["model"], ema=items["ema"], **items["train"])
