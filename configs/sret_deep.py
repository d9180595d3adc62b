"""SReT with more than 100 or more than 1,000 applications of its shared blocks, on ImageNet-1k.

    python -m sret_jax.tools.prepare imagenet2012 --archives=DIR_OF_THE_TWO_TARS
    python main.py --config=configs/sret_deep.py:100 --workdir=DIR
    python main.py --config=configs/sret_deep.py:1000 --workdir=DIR

Costs: at 224 pixels, forward and backward, two FLOPs per multiply-accumulate,

                 applications  parameters  of them NLLs  GMACs per image  300 epochs
    :100                  110       14.8M          9.9M             4.87  1.1e19 FLOPs
    :1000               1,020       13.4M         12.8M             5.59  1.3e19 FLOPs

On a TPU :1000 is bound by memory: 1.7 GB an image, where :100 moves 0.12 (docs/depth.md).

Should reach: not known; the depths have been trained on digits only (docs/depth.md).

Why they are built so:
- Recomputing each application (remat="block") adds a third to the FLOPs above. It keeps two arrays
  of activations per application; "full" keeps about sqrt(loops) and costs two thirds.
- Blocks sit late. Widths double from stage to stage while tokens fall to a quarter, so weights cost
  the same in every stage, but attention grows with the square of the tokens. So 6 or 7 of 10 blocks
  are in the last stage.
- :100 is SReT-LT (widths 64, 128, 256) with other blocks and a narrower MLP, its GMACs near
  SReT-S's 4.17. :1000 has the widths 24, 48, 96: a thousand applications of SReT-LT's would cost
  more than 50 GMACs.
- Every application has its own NLL (nll_every=1). At these widths it is the NLLs that hold the
  parameters, and what differs between applications; with nll_every=2 the budget of 13 to 15M would
  need widths of 32, 64 and 128 and 9.6 GMACs at 1,000.
- Residual branches start at 1/sqrt(applications), so that the sum of all starts at the scale of
  one. Both depths also train from the published 1, if more slowly at 1,000.
- :1000 computes in float32: what a branch adds is near the rounding of a bfloat16 stream, and a
  thousand such roundings pile up. (A TPU multiplies float32 in bfloat16 passes by default, so it is
  memory that this costs.)
- The gradient of a shared weight is a sum over all its applications, so it is clipped.
"""

import ml_collections

from sret_jax.configs import common

MODELS = {
    "100": dict(
        blocks=(1, 3, 6),
        loops=11,
        mlp_ratio=3.0,
        drop_path_rate=0.1,
    ),
    "1000": dict(
        dtype="float32",
        blocks=(1, 2, 7),
        loops=102,
        groups=((16, 8), (4, 1), (1, 1)),
        heads=(1, 2, 4),
        dim=24,
        mlp_ratio=2.0,
        nll_ratio=0.875,
        drop_path_rate=0.1,
    ),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: 100 or 1000; then any of res=N, recipe=deit|sret_long_warmup|none."""
    depth, rest = common.parse_depth(arg, MODELS)
    args = common.parse_arg(rest, res=224, recipe="deit")
    config = common.get_config(args.recipe)
    config.model.update(
        name="sret_lt",
        image_size=args.res,
        remat="block",
        unroll=1,
        **MODELS[depth],
    )
    config.model.branch_init = (sum(config.model.blocks) * config.model.loops) ** -0.5
    config.optim.clip_norm = 1.0
    return config
