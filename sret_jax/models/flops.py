"""Counts multiply-accumulates in a traced program; loop bodies count once per iteration."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from sret_jax.models.apply import evaluation_logits
from sret_jax.models.model import Model
from sret_jax.models.recursion import Recursion
from sret_jax.models.variables import abstract_variables


def count_macs(fn: Callable, *args: Any) -> int:
    """Counts the multiply-accumulates of matrix products and convolutions in one call of `fn`.

    Unlike XLA's cost analysis, it counts the body of a scan, of a Pallas kernel's grid and of a
    `shard_map` as often as it runs. For a `cond` it counts the most expensive branch.

    Args:
      fn: a traceable function.
      *args: arrays or `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: a `while` loop, whose trip count is unknown, contains matrix products.
    """
    return jaxpr_macs(jax.make_jaxpr(fn)(*args).jaxpr)


@functools.lru_cache(maxsize=64)  # tracing a model takes a second
def model_macs(model: Model) -> int:
    """Multiply-accumulates of one image's forward pass, including Q K^T and A V.

    Adding LoRA to the weights takes more, but once for a whole batch: see `merging_macs`.
    """
    return _forward_macs(model, 1) - merging_macs(model)


def merging_macs(model: Model) -> int:
    """Multiply-accumulates that a forward pass takes once, whatever the number of images."""
    if not model.adapters:
        return 0
    return 2 * _forward_macs(model, 1) - _forward_macs(model, 2)


def _forward_macs(model: Model, images: int) -> int:
    image = jax.ShapeDtypeStruct((images, model.image_size, model.image_size, 3), "float32")
    plain = model.clone(attention="xla", mlp="xla")  # kernels also multiply padding
    return count_macs(functools.partial(evaluation_logits, plain), abstract_variables(model), image)


def exit_macs(model: Model) -> list[int]:
    """Multiply-accumulates of an image that leaves at exit 1, 2, ..., loops; see `ExitRule`.

    Exit k costs everything before the last block, k applications of that block, and k read-outs.
    """
    plain = model.clone(attention="xla", mlp="xla")
    last = (len(model.blocks) - 1, model.blocks[-1] - 1)
    recursion = plain.recursion(plain.unit(*last, train=False), at=last)
    stage = plain.stages[-1]
    tokens = stage.side**2 + stage.prefix
    x = jax.ShapeDtypeStruct((1, tokens, stage.width), plain.dtype)
    cycle = [_applications_macs(recursion.clone(loops=n + 1), x) for n in range(recursion.period)]
    applications = [
        n // len(cycle) * cycle[-1] + (0, *cycle)[n % len(cycle)] for n in range(model.loops + 1)
    ]
    params = abstract_variables(model)["params"]
    read = count_macs(lambda params, x: plain.read_out().apply({"params": params}, x), params, x)
    before = model_macs(model) - applications[-1] - read
    return [before + applications[k] + k * read for k in range(1, model.loops + 1)]


def _applications_macs(recursion: Recursion, x: jax.ShapeDtypeStruct) -> int:
    """Multiply-accumulates of an image in a recursion, without what a batch takes once."""
    rngs = {"permutation": jax.random.key(0)}  # for permutation="random"
    apply = functools.partial(recursion.apply, train=False, rngs=rngs)
    variables = jax.eval_shape(functools.partial(recursion.init, train=False), jax.random.key(0), x)
    two = jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
    return count_macs(apply, variables, two) - count_macs(apply, variables, x)


def jaxpr_macs(jaxpr: core.Jaxpr) -> int:
    """Multiply-accumulates of a traced program, counted as in `count_macs`."""
    return sum(_equation_macs(equation) for equation in jaxpr.eqns)


def _equation_macs(equation: core.JaxprEqn) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = _shape(equation.invars[0])
        depth = math.prod(left[axis] for axis in contracted)
        return math.prod(_shape(equation.outvars[0])) * depth
    if name == "conv_general_dilated":
        kernel = _shape(equation.invars[1])
        per_output = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided convolution inserts zeros into its input; they cost nothing.
        spread = math.prod(params["lhs_dilation"])
        return math.prod(_shape(equation.outvars[0])) * per_output // spread
    inner = [jaxpr_macs(jaxpr) for jaxpr in inner_jaxprs(params)]
    if name == "while" and any(inner):
        raise ValueError("a while loop's trip count is unknown; use scan to count its MACs")
    if name == "cond":
        return max(inner)
    return sum(inner) * repetitions(name, params)


def repetitions(name: str, params: dict[str, Any]) -> int:
    """How often an equation's body runs, by the primitive's name; a `while` loop counts once."""
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
    return 1


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def inner_jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
    """The programs among an equation's parameters: loop bodies, branches and kernels."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr)
    return [
        leaf.jaxpr if isinstance(leaf, core.ClosedJaxpr) else leaf
        for leaf in leaves
        if _is_jaxpr(leaf)
    ]


def _is_jaxpr(x: Any) -> bool:
    return isinstance(x, core.Jaxpr | core.ClosedJaxpr)
