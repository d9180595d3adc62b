"""SReT-T on ImageNet-1k at 224 pixels.

Costs: 4.8M parameters, 1.112 GMACs per image (1.366 unsliced); 300 epochs of 1.28M images are
2.6e18 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: 76.0% top-1 as published, 76.1% unsliced; 77.6% and 77.7% with :distill, which learns
a teacher's soft labels alone, at temperature 1. Not yet reproduced with this code.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/sret_t.py --workdir=DIR
    python main.py --config=configs/sret_t.py:unsliced --workdir=DIR
    python main.py --config=configs/sret_t.py:distill --config.teacher=SRET_S_RUN --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: unsliced, distill, fkd, res=N, groups=A-B-C, recipe=deit|sret_long_warmup|none."""
    return common.get_variant("sret_t", arg)
