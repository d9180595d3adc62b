"""wip."""

import ml_collections

from configs import common, quickstart

BLOCKS = 5
LOOPS = {"100": 22, "1000": 202}
EPOCHS = {"100": 40.0, "1000": 20.0}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: 100 or 1000, how many applications there are at least."""
    depth, rest = common.parse_depth(arg, LOOPS)
    common.parse_arg(rest)
    config = quickstart.get_config()
    config.epochs = EPOCHS[depth]
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
