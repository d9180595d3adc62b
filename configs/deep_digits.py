"""More than 100 or more than 1,000 applications of shared blocks, on scikit-learn's digits.

    python main.py --config=configs/deep_digits.py:100 --workdir=DIR
    python main.py --config=configs/deep_digits.py:1000 --workdir=DIR

Costs: 0.3M parameters and 5 MMACs per 16-pixel image at 110 applications (:100), 2.3M and 42 at
1,010 (:1000). 20 epochs took 20 minutes at 1,010 on 2 cores that did much else.
Should reach: 98% top-1 or more on the 359 held-out scans (98.6% and 98.3% when last tried).

It shows that the architecture of configs/sret_deep.py trains at this depth, on few tokens (4) and
in narrow blocks (32 channels). As there, every application has its own NLL, residual branches start
at 1/sqrt(applications), and the gradient is clipped.
"""

import ml_collections

from sret_jax.configs import common, quickstart

BLOCKS = 5
LOOPS = {"100": 22, "1000": 202}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Argument: 100 or 1000."""
    depth, rest = common.parse_depth(arg, LOOPS)
    common.parse_arg(rest)
    config = quickstart.get_config()
    config.epochs = 20.0
    config.model.update(
        image_size=16,
        blocks=(BLOCKS,),
        loops=LOOPS[depth],
        groups=((2, 1),),
        heads=(4,),
        dim=8,
        drop_path_rate=0.0,
        branch_init=(BLOCKS * LOOPS[depth]) ** -0.5,
    )
    config.optim.clip_norm = 1.0
    return config
