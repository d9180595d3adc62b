"""Swin-T on ImageNet-1k at 224 pixels.

Costs: 28.3M parameters, 4.491 GMACs per image (8.793 with :loops=2); 300 epochs of 1.28M images
are 1.0e19 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: 81.2% top-1 as published; not yet reproduced with this code. Recursive forms are ours
and have no published figure.

The recipe is Swin's (Liu et al., ICCV 2021, appendix A2): AdamW at 0.001 for batches of 1,024, 20
epochs of warm-up, weight decay 0.05, gradients clipped at norm 5, stochastic depth 0.2, DeiT's
augmentation without repeats. The published figure is of the raw weights. These settings are quoted
from memory; compare them with the paper before you rely on them.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/swin_tiny.py --workdir=DIR
    python main.py --config=configs/swin_tiny.py:loops=2,nll --workdir=DIR  (recursive, with NLLs)
    python main.py --config=configs/swin_tiny.py:distill --config.teacher=RUN --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: loops=N, nll, distill, fkd, res=N, recipe=swin|deit|none."""
    return common.get_variant("swin_tiny", arg, recipe="swin")
