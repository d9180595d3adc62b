"""A small sliced SReT on scikit-learn's 1,797 handwritten digits: real scans, no network.

Costs: 0.31M parameters, 5 MMACs per 32-pixel image; 60 epochs take about 2 minutes on 2 cores.
Should reach: 98% top-1 or more on the 359 held-out scans (99.2% when last tried).

    python main.py --config=configs/quickstart.py --workdir=DIR
"""

import ml_collections

from sret_jax.configs import common


def get_config() -> ml_collections.ConfigDict:
    """The quickstart."""
    config = common.get_config(recipe="none")
    config.epochs = 60.0
    config.batch_size = 64
    config.ema_images = 6400.0  # 100 steps

    config.model.update(
        name="sret_t",
        image_size=32,
        dtype="float32",
        blocks=(1, 1),
        loops=2,
        groups=((4, 2), (1, 1)),
        heads=(4, 8),
        dim=16,
        mlp_ratio=2.0,
        drop_path_rate=0.05,
    )
    config.optim.update(lr_per_512=2e-2, warmup_epochs=5.0)
    config.data.update(
        name="digits",
        eval_split="test",
        test_crop=1.0,
        workers=0,
    )
    config.augment.update(
        crop_scale=(0.6, 1.0), crop_ratio=(0.8, 1.25), flip=0.0, label_smoothing=0.1
    )
    config.log_every_steps = 22
    config.eval_every_epochs = 5.0
    config.checkpoint.every_epochs = 5.0
    config.checkpoint.keep_every_epochs = 0.0
    return config
