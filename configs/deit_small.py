"""DeiT-S on ImageNet-1k at 224 pixels.

Costs: 22.1M parameters, 4.599 GMACs per image (9.140 with :loops=2); 300 epochs of 1.28M images
are 1.1e19 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: 79.9% top-1 as published; not yet reproduced with this code. Recursive and sliced
forms are ours and have no published figure.

The recipe is DeiT's (Touvron et al., table 9), but its moving average is 0.99996 with a warm-up and
its augmentation repeats every image 3 times in a pass, as for SReT.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/deit_small.py --workdir=DIR
    python main.py --config=configs/deit_small.py:loops=2,nll --workdir=DIR  (recursive, with NLLs)
    python main.py --config=configs/deit_small.py:loops=2,groups=4 --workdir=DIR  (sliced at first)
    python main.py --config=configs/deit_small.py:distill --config.teacher=RUN --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: loops=N, nll, groups=A, distill, fkd, res=N, recipe=deit|none."""
    return common.get_variant("deit_small", arg)
