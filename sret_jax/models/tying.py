"""Untied models made recursive, and recursive models untied (Bae et al., 2024).

Layers b n, ..., b n + n - 1 of a stage become the n applications of block b, and the other way
round. Bae et al., "Relaxed Recursive Transformers", tie layer l to layer l mod n of the whole
network; here successive layers share weights, as in SReT.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from sret_jax.errors import did_you_mean
from sret_jax.models.adapters import WeightAdapter, adapters_of
from sret_jax.models.checks import check
from sret_jax.models.model import Model, block_name
from sret_jax.models.sliced_model import SlicedModel
from sret_jax.models.variables import Variables

STARTS = ("stepwise", "average", "first")
RESIDUALS = ("norms", "biases")  # adapters beside LoRA that make tied layers differ


def tied(
    model: Model, variables: Variables, loops: int, *, start: str, rank: int = 0
) -> tuple[Model, Variables]:
    """Makes an untied model recursive, without training: every `loops` layers share a block.

    The weights W of a shared block are, by `start`, of the layers that it replaces:
      "average": their mean;
      "first": those of the first;
      "stepwise": those of one, so that the chosen layers of a stage lie at equal distances from its
        first layer to its last.
    With LoRA of rank R, application l has W + D_l U_l, where D_l U_l is the best approximation of
    W_l - W by a matrix of rank R (its R largest singular values), and the adapters "norms" and
    "biases" hold all differences of other parameters. Of full rank, the function is the same.

    Args:
      model: a model with loops=1.
      variables: its weights, as NumPy arrays.
      loops: n, which divides the blocks of every stage.
      start: one of STARTS.
      rank: R; 0: no adapters.

    Returns:
      The recursive model, and its weights. NLLs are kept.

    Raises:
      ValueError: the model is recursive already or has adapters, or an argument does not fit it.
    """
    if start not in STARTS:
        raise ValueError(did_you_mean("init", start, STARTS))
    if model.loops != 1 or model.adapters:
        raise ValueError(
            f"only an untied model becomes recursive, and this one has loops={model.loops} and "
            f"adapters={model.adapters}; tools.unroll makes an untied model of it"
        )
    _check_parts(model)
    _check_loops(model, loops)
    adapters = (f"lora:{rank}", *RESIDUALS) if rank else ()
    blocks = tuple(layers // loops for layers in model.blocks)
    new = _with_first_groups(model).clone(blocks=blocks, loops=loops, adapters=adapters)
    check(new)
    params = _without_blocks(variables["params"], model)
    for s, layers in enumerate(model.blocks):
        steps = np.rint(np.linspace(0, layers - 1, blocks[s])).astype(int)
        for b in range(blocks[s]):
            group = [variables["params"][block_name(s, b * loops + n)] for n in range(loops)]
            chosen = {"first": 0, "stepwise": steps[b] - b * loops}.get(start)
            params[block_name(s, b)] = _tied_block(new, group, chosen)
    return new, {**variables, "params": params}


def untied(model: Model, variables: Variables) -> tuple[Model, Variables]:
    """Makes a recursive model untied: block b becomes layers b n, ..., b n + n - 1 of its stage.

    LoRA and the adapters "norms" and "biases" are added to the weights of the layers. The function
    stays the same.

    Args:
      model: a recursive model.
      variables: its weights, as NumPy arrays.

    Returns:
      The untied model, with loops=1 and no adapters, and its weights.

    Raises:
      ValueError: no untied model is the same function.
    """
    if model.loops == 1 and not model.adapters:
        raise ValueError("it is untied already: it applies each block once")
    _check_parts(model)
    adapters = adapters_of(model.adapters)
    for own, specification in zip(adapters, model.adapters, strict=True):
        if not isinstance(own, WeightAdapter):
            raise ValueError(
                f"the adapter {specification!r} changes the input of blocks, which no untied model "
                "does, so no untied model is the same function"
            )
    if model.nll_ratio and model.nll_every > 1:
        raise ValueError(
            f"with nll_every={model.nll_every} an NLL follows some applications only, but in an "
            "untied model one follows every layer, so no untied model is the same function"
        )
    loops, blocks = model.loops, tuple(n * model.loops for n in model.blocks)
    new = _with_first_groups(model).clone(blocks=blocks, loops=1, adapters=())
    if others := list(other_turns(model, new)):
        raise ValueError(f"no untied model is the same function: {others[0]}")
    params = _without_blocks(variables["params"], model)
    for s, count in enumerate(model.blocks):
        for b in range(count):
            part = variables["params"][block_name(s, b)]
            for n in range(loops):
                params[block_name(s, b * loops + n)] = layer = {"block": part["block"]}
                for own in adapters:
                    row = jax.tree.map(lambda leaf, i=n // own.share: leaf[i], part[own.name])
                    layer["block"] = own.weights(layer["block"], row)
                if "nll" in part:
                    layer["nll"] = jax.tree.map(lambda leaf, n=n: leaf[n : n + 1], part["nll"])
    return new, {**variables, "params": params}


def other_turns(recursive: Model, plain: Model) -> Iterator[str]:
    """Sentences on applications whose attention is cut otherwise than in the layer they stand for.

    Args:
      recursive: a model whose block b, applied n times, stands for layers b n, ... of `plain`.
      plain: a model with loops=1.
    """
    loops = recursive.loops
    for s, blocks in enumerate(recursive.blocks):
        for b in range(blocks):
            turns = recursive.unit(s, b, train=False).turns
            for n in range(loops):
                layer = plain.unit(s, b * loops + n, train=False)
                if turns[n % len(turns)] != layer.turns[0]:
                    yield (
                        f"application {n + 1} of block {b + 1} in stage {s + 1} cuts its attention "
                        f"into other groups or windows than layer {b * loops + n + 1} of an untied "
                        f"{type(plain).__name__}"
                    )


def _check_parts(model: Model) -> None:
    if not model.has_exits:
        raise ValueError(
            f"the blocks of a {type(model).__name__} are not known, because it computes its logits "
            "in a __call__ of its own; define embed, unit and read_out instead"
        )


def _check_loops(model: Model, loops: int) -> None:
    common = math.gcd(*model.blocks)
    if loops < 2 or common % loops:
        able = [n for n in range(2, common + 1) if common % n == 0]
        way = f"use one of {able}" if able else "no number does"
        raise ValueError(
            f"loops={loops} must be at least 2 and divide the {model.blocks} layers of every "
            f"stage; {way}"
        )


def _with_first_groups(model: Model) -> Model:
    """The model whose applications all attend as the first one of a block does, where it can be."""
    if not isinstance(model, SlicedModel):
        return model
    return model.clone(groups=tuple(cycle[:1] for cycle in model.groups))


def _without_blocks(params: Mapping[str, Any], model: Model) -> dict[str, Any]:
    names = {block_name(s, b) for s, n in enumerate(model.blocks) for b in range(n)}
    return {name: part for name, part in params.items() if name not in names}


def _tied_block(new: Model, group: Sequence[Mapping[str, Any]], chosen: int | None) -> Any:
    """The parameters of one recursive block from those of layers; chosen=None: of their mean."""
    layers = [flatten_dict(layer["block"]) for layer in group]
    stacked = {path: np.stack([layer[path] for layer in layers]) for path in layers[0]}
    shared = {
        path: leaf.mean(0, np.float64).astype(leaf.dtype) if chosen is None else leaf[chosen]
        for path, leaf in stacked.items()
    }
    differences = {path: leaf - shared[path] for path, leaf in stacked.items()}
    part = {"block": unflatten_dict(shared)}
    for own in adapters_of(new.adapters):
        assert isinstance(own, WeightAdapter)
        part[own.name] = own.nearest(differences)
    if "nll" in group[0]:
        nlls = [layer["nll"] for layer in group]
        part["nll"] = jax.tree.map(lambda *rows: np.concatenate(rows), *nlls)
    return part
