"""Checks that the sizes and choices of a model fit each other, each with a sentence."""

import math

from flax.traverse_util import flatten_dict

from sret_jax.errors import UserError, did_you_mean
from sret_jax.models.adapters import adapters_of
from sret_jax.models.halting import ExitRule
from sret_jax.models.kernels.choice import IMPLEMENTATIONS
from sret_jax.models.layers.linear import ACTIVATIONS
from sret_jax.models.layers.residual import RESIDUALS
from sret_jax.models.model import Model
from sret_jax.models.recursion import REMAT
from sret_jax.models.variables import abstract_variables, block_names

MOST_UNROLLED = 16  # the most applications that the program may contain one by one


def check(model: Model) -> None:
    """Raises ValueError, with a one-sentence message, if the sizes do not fit each other."""
    check_positive(model, ("blocks", "loops", "num_classes", "image_size"))
    check_positive(model, ("unroll", "nll_every"))
    if model.backprop_loops is not None:
        check_positive(model, ("backprop_loops",))
    for name in ("mean", "std"):
        values = getattr(model, name)
        if len(values) != 3 or (name == "std" and min(values) <= 0):
            least = ", each above 0" if name == "std" else ""
            raise ValueError(f"{name}={values} must hold three numbers{least}")
    model.check_sizes()
    _check_choices(model)
    _check_groups(model)
    _check_nlls(model)
    _check_cycles(model)
    _check_adapters(model)


def _check_choices(model: Model) -> None:
    if model.nll_activation not in ACTIVATIONS:
        raise ValueError(did_you_mean("nll_activation", model.nll_activation, ACTIVATIONS))
    if model.residual not in RESIDUALS:
        raise ValueError(did_you_mean("residual", model.residual, RESIDUALS))
    if not isinstance(model.branch_init, int | float) or not 0 <= model.branch_init <= 1:
        raise ValueError(f"branch_init={model.branch_init} must be in [0, 1]")
    if model.remat not in REMAT:
        raise ValueError(did_you_mean("remat", model.remat, REMAT))
    for field in ("attention", "mlp"):
        if getattr(model, field) not in IMPLEMENTATIONS:
            raise ValueError(did_you_mean(field, getattr(model, field), IMPLEMENTATIONS))
    if not 0 <= model.drop_path_rate < 1:
        raise ValueError(f"drop_path_rate={model.drop_path_rate} must be in [0, 1)")


def _check_groups(model: Model) -> None:
    for s, stage in enumerate(model.stages):
        tokens = stage.side**2
        for g in stage.groups:
            if g < 1 or tokens % g:
                divisors = [d for d in range(1, tokens + 1) if tokens % d == 0]
                nearest = sorted(sorted(divisors, key=lambda d: abs(d - g))[:2])
                raise ValueError(
                    f"stage {s} has {tokens} tokens at image_size={model.image_size}, which "
                    f"{g} groups do not divide; the nearest group counts that do are "
                    f"{' and '.join(map(str, nearest))}"
                )


def _check_nlls(model: Model) -> None:
    if model.nll_ratio == 0:
        return
    if int(model.nll_ratio * min(stage.width for stage in model.stages)) < 1:
        raise ValueError(f"nll_ratio={model.nll_ratio} leaves no hidden unit; raise it")
    if model.nll_every > model.loops:
        raise ValueError(
            f"nll_every={model.nll_every} is more than loops={model.loops}, which leaves blocks "
            f"without an NLL; use at most {model.loops}"
        )


def _check_adapters(model: Model) -> None:
    adapters = adapters_of(model.adapters)
    if not adapters:
        return  # tracing the blocks takes a second
    params = abstract_variables(model.clone(adapters=()))["params"]
    for block in block_names(model):
        shapes = flatten_dict(params[block]["block"])
        for own, specification in zip(adapters, model.adapters, strict=True):
            try:
                own.check(shapes)
            except ValueError as e:
                raise ValueError(f"the adapter {specification!r} {e}") from e


def _check_cycles(model: Model) -> None:
    """Limits the cycles: the program contains all their applications, and compiles slowly."""
    every = model.nll_every if model.nll_ratio else 1
    for s, stage in enumerate(model.stages):
        length = math.lcm(stage.cycle, every)
        if min(length, model.loops) > MOST_UNROLLED:
            raise ValueError(
                f"stage {s} repeats only every {length} applications, the least common "
                f"multiple of nll_every={every} and the {stage.cycle} applications after which "
                "its attention repeats, and the program would contain each of them; at most "
                f"{MOST_UNROLLED} are supported, so use a smaller nll_every, a multiple of "
                f"{stage.cycle} where it can be"
            )


def check_exit(model: Model, rule: ExitRule) -> None:
    """Raises UserError if no image of this model can leave early, or all leave at once."""
    if not model.has_exits:
        raise UserError(
            f"exit={rule}: a {type(model).__name__} has no exits, because it computes its logits "
            "in a __call__ of its own; define embed, unit and read_out instead"
        )
    if model.loops == 1:
        raise UserError(
            f"exit={rule}: the model applies each block once, so no image can leave earlier; leave "
            "exit out, or use a model with more loops"
        )
    classes = model.num_classes
    if rule.kind == "entropy" and rule.threshold >= math.log(classes):
        raise UserError(
            f"exit={rule}: the entropy of {classes} classes is at most log {classes} = "
            f"{math.log(classes):.3g} nats, so all images would leave after one loop; give a lower "
            "threshold"
        )
    if rule.kind == "confidence" and rule.threshold <= 1 / classes:
        raise UserError(
            f"exit={rule}: the likeliest of {classes} classes has a probability of at least "
            f"{1 / classes:.3g}, so all images would leave after one loop; give a higher threshold"
        )


def check_positive(model: Model, fields: tuple[str, ...]) -> None:
    """Raises ValueError unless each of these fields is a whole number >= 1, or a tuple of them."""
    for field in fields:
        value = getattr(model, field)
        if isinstance(value, tuple):
            if not value or not all(isinstance(n, int) and n > 0 for n in value):
                raise ValueError(f"{field}={value} must hold a positive whole number per stage")
        elif not isinstance(value, int) or value < 1:
            raise ValueError(f"{field}={value} must be a whole number of at least 1")


def check_length(model: Model, fields: tuple[str, ...]) -> None:
    """Raises ValueError unless each of these fields has one entry per stage."""
    stages = len(model.blocks)
    for field in fields:
        values = getattr(model, field)
        if len(values) != stages:
            raise ValueError(
                f"{field}={values} has {len(values)} entries but blocks={model.blocks} has "
                f"{stages}; give one entry per stage"
            )


def check_divisible(
    image_size: int, stride: int, what: str = "the stride of the last stage"
) -> None:
    """Raises ValueError unless the image size is a multiple of a stride, which is `what`."""
    if image_size % stride:
        below = image_size // stride * stride
        nearest = " or ".join(str(n) for n in (below, below + stride) if n)
        raise ValueError(
            f"image_size={image_size} is not divisible by {stride}, {what}; use {nearest}"
        )
