"""The state that training carries from step to step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from sret_jax.models.model import Model
from sret_jax.models.variables import Variables


class TrainState(struct.PyTreeNode):
    """The whole state of a run. Given the config, `step` determines which batch comes next.

    Attributes:
      step: number of steps taken, int32, including steps that updated nothing.
      bad_streak: number of non-finite steps, which updated nothing, since the last good one; int32.
      variables: the raw weights: "params", and "batch_stats" if the model has BatchNorm.
      ema: exponential moving average of `variables`.
      opt_state: state of the optimizer.
    """

    step: jax.Array
    bad_streak: jax.Array
    variables: Variables
    ema: Variables
    opt_state: optax.OptState


def init_state(model: Model, optimizer: optax.GradientTransformation, seed: Any) -> TrainState:
    """A fresh state whose moving average equals its weights; a pure function of the seed."""
    image = jnp.zeros((1, model.image_size, model.image_size, 3))
    variables: Variables = dict(model.init(jax.random.key(seed), image))
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        bad_streak=jnp.zeros((), jnp.int32),
        variables=variables,
        # A copy, because one buffer cannot be donated twice.
        ema=jax.tree.map(jnp.copy, variables),
        opt_state=optimizer.init(variables["params"]),
    )


def to_items(state: TrainState) -> dict[str, Any]:
    """Splits a state into checkpoint items: {"model": weights, "ema": average, "train": rest}."""
    train = {"step": state.step, "bad_streak": state.bad_streak, "opt_state": state.opt_state}
    return {"model": state.variables, "ema": state.ema, "train": train}


def from_items(items: dict[str, Any]) -> TrainState:
    """The inverse of `to_items`."""
    return TrainState(variables=items["model"], ema=items["ema"], **items["train"])
