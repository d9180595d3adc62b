r"""SReT-LT on ImageNet-1k at 224 pixels.

Costs: 5.0M parameters, 1.164 GMACs per image (1.418 unsliced); 300 epochs of 1.28M images are
2.7e18 FLOPs (forward and backward, two per multiply-accumulate).
Should reach: 76.7% top-1 as published, 76.8% unsliced; 77.7% and 77.9% with :distill, which learns
a teacher's soft labels alone, at temperature 1; 78.7% with :fkd, which learns stored ones of 4
crops of every image in a batch, without RandAugment and mixing. Not yet reproduced with this code.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/sret_lt.py --workdir=DIR
    python main.py --config=configs/sret_lt.py:unsliced --workdir=DIR
    python main.py --config=configs/sret_lt.py:distill --config.teacher=SRET_S_RUN --workdir=DIR
    python -m sret_jax.tools.soft_labels generate --config=configs/sret_lt.py:fkd \
      --teacher=RUN --crops=500 --keep=topk5 --out=LABELS
    python main.py --config=configs/sret_lt.py:fkd --config.data.soft_labels=LABELS --workdir=DIR
    python main.py --config=configs/sret_lt.py:groups=16-14-1 --workdir=DIR  (76.6%)
"""

import ml_collections

from sret_jax.configs import common


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: unsliced, distill, fkd, res=N, groups=A-B-C, recipe=deit|sret_long_warmup|none."""
    return common.get_variant("sret_lt", arg)
