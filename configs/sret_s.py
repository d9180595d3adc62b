"""SReT-S on ImageNet-1k at 224 pixels.

Costs: 20.9M parameters, 4.173 GMACs per image (4.671 unsliced); 300 epochs of 1.28M images are
9.6e18 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: 81.9% top-1 as published, 82.0% unsliced; not yet reproduced with this code.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/sret_s.py --workdir=DIR
    python main.py --config=configs/sret_s.py:unsliced --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: unsliced, distill, fkd, res=N, groups=A-B-C, recipe=deit|sret_long_warmup|none."""
    return common.get_variant("sret_s", arg)
