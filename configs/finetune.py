"""Fine-tuning of trained weights: on a folder of images of your own, or on ImageNet at 384 or 512.

    python main.py --config=configs/finetune.py:sliced --config.data.name=/path/to/folder \
        --config.init_from=SReT_T.pth --workdir=DIR
    python main.py --config=configs/finetune.py:384,model=sret_s --config.init_from=RUN \
        --config.data.data_dir=DATA --workdir=DIR

The folder is laid out as SPLIT/CLASS/IMAGE.jpg, with the splits train and val
(--config.data.eval_split=test for another name), or as CLASS/IMAGE.jpg, to be sliced with
--config.data.train_split='train[:80%]' --config.data.eval_split='train[80%:]'. The classes are the
folders of the training split. The README of github.com/szq0214/SReT links SReT_T.pth. For weights
that were trained without slicing, leave out "sliced".

Costs: forward and backward, 30 epochs of 1.28M images on ImageNet,

                      GMACs per image  30 epochs
    :384,model=sret_s           18.44  4.3e18 FLOPs
    :512,model=sret_s           42.67  9.8e18 FLOPs
    :384,model=sret_t            6.41  1.5e18 FLOPs

and on a folder, with SReT-T at 224 pixels, 1.37 GMACs per image for 20 epochs of its images.
Should reach: on ImageNet, from unsliced weights that were distilled at 224 pixels, 83.8% (:384) and
84.3% (:512) with SReT-S and 79.7% (:384) with SReT-T, as published; not yet reproduced with this
code. What a folder reaches depends on its images; docs/finetuning.md has figures on digits.

SReT's paper and code do not say how it fine-tunes. :384 and :512 do it as DeiT's README does: AdamW
at a constant 5e-6 for batches of 512 after the usual warm-up, weight decay 1e-8, 30 epochs, and the
augmentation of training. For a folder the rate is higher and falls from the head down, epochs are
few, and the moving average looks back 10 steps, because a small folder has few.
"""

import ml_collections

from sret_jax.configs import common
from sret_jax.models.registry import create_model, variant

RESOLUTIONS = ("384", "512")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Arguments: model=NAME, sliced, and res=N; or 384 or 512 first, for ImageNet at that size."""
    first, _, rest = arg.partition(",")
    if first in RESOLUTIONS:
        return _imagenet(int(first), common.parse_arg(rest, model="sret_s", sliced=False))
    return _folder(common.parse_arg(arg, model="sret_t", sliced=False, res=224))


def _imagenet(resolution: int, args: ml_collections.FrozenConfigDict) -> ml_collections.ConfigDict:
    config = _model(common.get_config("deit"), args, resolution)
    config.epochs = 30.0
    config.batch_size = 512
    config.optim.update(lr_per_512=5e-6, min_lr=5e-6, weight_decay=1e-8)
    return config


def _folder(args: ml_collections.FrozenConfigDict) -> ml_collections.ConfigDict:
    config = _model(common.get_config("none"), args, args.res)
    config.epochs = 20.0
    config.batch_size = 64
    config.ema_images = 640.0  # 10 steps
    config.optim.update(lr_per_512=4e-3, warmup_epochs=1.0, min_lr=1e-6, layer_decay=0.75)
    config.data.update(name="/path/to/folder", eval_split="val")
    config.augment.update(crop_scale=(0.3, 1.0), label_smoothing=0.1)
    config.log_every_steps = 10
    config.checkpoint.keep_every_epochs = 0.0
    return config


def _model(
    config: ml_collections.ConfigDict, args: ml_collections.FrozenConfigDict, resolution: int
) -> ml_collections.ConfigDict:
    published = create_model(args.model)
    config.init_from = "PATH_OF_TRAINED_WEIGHTS"
    config.model.update(name=args.model, image_size=resolution)
    config.data.test_crop = variant(args.model, resolution).test_crop
    if (why := published.why_unsliced) and args.sliced:
        raise ValueError(f"{args.model} cannot be sliced: {why}; leave out sliced")
    if not why and not args.sliced:
        config.model.groups = ((1,),) * len(published.blocks)
    return config
