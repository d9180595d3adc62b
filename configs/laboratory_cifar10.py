"""What docs/laboratory.md describes, tried on CIFAR-10: a network of one block, applied 4 times.

    python -m sret_jax.tools.prepare cifar10
    python main.py --config=configs/laboratory_cifar10.py:drawn
    python -m sret_jax.tools.study --config=laboratory_cifar10     (all arms with three seeds)

The argument is an arm of `ARMS`. All arms have the images and the recipe of study_cifar10.py, three
epochs of it. A second argument "full" (drawn,full) takes ten times as many.

Costs: 28,000 to 59,000 parameters and 4.7 to 5.8 MMACs per image.
Should reach: no run has finished yet.
"""

from typing import Any

import ml_collections

from sret_jax.configs import study_cifar10
from sret_jax.errors import did_you_mean
from sret_jax.study.design import Arm, Claim

CLASSES = study_cifar10.CLASSES

Settings = dict[str, Any]

# A stem, then one stage of 64 tokens: a single block, so that exit k is the model with k loops.
ONE_BLOCK: Settings = {
    **study_cifar10.PLAIN,
    **dict(groups=((1,),), blocks=(1,), loops=4, heads=(2,)),
}
INJECTED: Settings = {**ONE_BLOCK, "adapters": ("inject:add",)}
UNTIED: Settings = {**ONE_BLOCK, **dict(blocks=(4,), loops=1)}
TIED: Settings = {**ONE_BLOCK, **dict(blocks=(2,), loops=2)}

ARMS: dict[str, Arm] = {
    "fixed": Arm(ONE_BLOCK),
    "drawn": Arm(ONE_BLOCK, {"recursion.train_loops": "uniform:1-4"}),
    "drawn_poisson": Arm(
        ONE_BLOCK, {"recursion.train_loops": "poisson:4", "recursion.max_loops": 6}
    ),
    "exits": Arm(ONE_BLOCK, {"mixed_depth.exits": (1, 2, 3), "mixed_depth.weight": 0.3}),
    "injected": Arm(INJECTED),
    "backprop1": Arm(INJECTED, {"recursion.backprop_loops": 1}),
    "backprop2": Arm(INJECTED, {"recursion.backprop_loops": 2}),
    # Equal parameters: what has fewer of its own has a wider MLP.
    "wide": Arm({**ONE_BLOCK, "mlp_ratio": 5.2}),
    "nll": Arm({**ONE_BLOCK, "nll_ratio": 0.5}),
    "lora": Arm({**ONE_BLOCK, "adapters": ("lora:2", "biases")}),
    "depth_code": Arm({**ONE_BLOCK, "adapters": ("norms", "embedding"), "mlp_ratio": 4.9}),
    "untied": Arm(UNTIED),
    "tied_lora": Arm({**TIED, "adapters": ("lora:4", "norms", "biases")}),
}

CLAIMS: dict[str, Claim] = {
    "loops": Claim(
        "Loops drawn in training",
        "trains with the loops that it is evaluated at",
        (("fixed", "drawn", "drawn_poisson"),),
    ),
    "exits": Claim(
        "A loss at every exit",
        "has a loss at the full depth alone",
        (("fixed", "exits"),),
    ),
    "backprop": Claim(
        "Gradients through the last loops only",
        "takes the gradient through all loops",
        (("injected", "backprop2", "backprop1"),),
    ),
    "adapters": Claim(
        "What each application has of its own, at equal parameters",
        "gives each application an NLL",
        (("wide", "nll", "lora", "depth_code"),),
    ),
    "tying": Claim(
        "Half of the blocks twice, with LoRA, beside untied blocks",
        "trains recursive models from scratch",
        (("untied", "tied_lora"),),
    ),
}


def get_config(arg: str = "fixed") -> ml_collections.ConfigDict:
    """Argument: an arm, and optionally "full" after a comma.

    Raises:
      ValueError: there is no such arm.
    """
    name, comma, rest = arg.partition(",")
    if name not in ARMS:
        raise ValueError(did_you_mean("arm", name, ARMS))
    config = study_cifar10.get_config(f"loops1{comma}{rest}")
    config.epochs *= 2 / 3
    config.eval_every_epochs = config.checkpoint.every_epochs = 1.0
    config.model.update(**ARMS[name].model)
    config.update_from_flattened_dict(ARMS[name].others)
    return config
