"""PiT-S on ImageNet-1k at 224 pixels.

Costs: 23.5M parameters, 2.871 GMACs per image (5.659 with :loops=2); 300 epochs of 1.28M images are
6.6e18 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: 80.9% top-1 as published; not yet reproduced with this code. Recursive and sliced
forms are ours and have no published figure.

The recipe is DeiT's, as in the paper (Heo et al., ICCV 2021, section 4.1).

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/pit_s.py --workdir=DIR
    python main.py --config=configs/pit_s.py:loops=2,nll --workdir=DIR  (recursive, with NLLs)
    python main.py --config=configs/pit_s.py:distill --config.teacher=RUN --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: loops=N, nll, groups=A-B-C, distill, fkd, res=N, recipe=deit|none."""
    return common.get_variant("pit_s", arg)
