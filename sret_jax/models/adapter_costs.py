"""What the adapters of a model cost: parameters, and multiply-accumulates."""

from typing import Any

import jax

from sret_jax.models.adapters import adapters_of
from sret_jax.models.flops import merging_macs
from sret_jax.models.model import Model
from sret_jax.models.variables import abstract_variables, block_names

Costs = dict[str, Any]  # {"parameters": {"lora:8": 12,288}, "gmacs_per_batch": 0.003}; or {}


def adapter_costs(model: Model) -> Costs:
    """The parameters of each adapter, and the GMACs of a batch that add LoRA to the weights.

    The GMACs of an image are contained in `model_macs`.
    """
    if not model.adapters:
        return {}
    params = abstract_variables(model)["params"]
    parameters = {
        specification: sum(
            leaf.size
            for block in block_names(model)
            for leaf in jax.tree.leaves(params[block][own.name])
        )
        for specification, own in zip(model.adapters, adapters_of(model.adapters), strict=True)
    }
    return {"parameters": parameters, "gmacs_per_batch": merging_macs(model) / 1e9}


def in_words(costs: Costs) -> str:
    """A sentence without its full stop; "" if there are no adapters."""
    if not costs:
        return ""
    parts = ", ".join(f"{name} {count:,}" for name, count in costs["parameters"].items())
    merging = costs["gmacs_per_batch"]
    once = f"; adding LoRA to the weights takes another {merging:.3g} GMACs once a batch"
    return f"{parts} parameters{once if merging else ''}"
