"""Mixer-S/16 on ImageNet-1k at 224 pixels.

Costs: 18.5M parameters, 3.777 GMACs per image (7.476 with :loops=2); 300 epochs of 1.28M images are
8.7e18 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: unknown. The paper trains Mixer-B/16 on ImageNet alone (76.44% top-1), but no
Mixer-S/16. Recursive forms are ours and have no published figure.

The recipe is that of Mixer-B/16 (Tolstikhin et al., appendix B): Adam at 0.001 for batches of
4,096, 10,000 steps of warm-up, weight decay 0.1, gradients clipped at norm 1, RandAugment of 2
operations at magnitude 15, mixup 0.5, stochastic depth 0.1. Here the rate falls along a cosine
rather than a line, to 1e-5, and the decay is AdamW's. :recipe=deit takes DeiT's recipe. The image
size of trained weights cannot be changed. The figures of the paper are quoted from memory; compare
them with it before you rely on them.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/mixer_s16.py --workdir=DIR
    python main.py --config=configs/mixer_s16.py:loops=2,nll --workdir=DIR  (recursive, with NLLs)
    python main.py --config=configs/mixer_s16.py:distill --config.teacher=RUN --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: loops=N, nll, distill, fkd, res=N, recipe=mixer|deit|none."""
    return common.get_variant("mixer_s16", arg, recipe="mixer")
