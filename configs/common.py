"""The ImageNet recipe of SReT, and the settings every experiment has.

An experiment config calls `get_config` and changes the few values that make it what it is.
Numbers are from SReT section 4.1, which follows DeiT.
"""

import re
from collections.abc import Iterable
from typing import Any

import ml_collections
from ml_collections import config_dict

from sret_jax.errors import did_you_mean

DEIT_AUGMENT = dict(
    policy="rand-m9-mstd0.5-inc1",
    erasing=0.25,
    mixup=0.8,
    cutmix=1.0,
    repeats=3,
    label_smoothing=0.1,
)
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "deit": dict(optim=dict(lr_per_512=5e-4, warmup_epochs=5.0), augment=DEIT_AUGMENT),
    "sret_long_warmup": dict(optim=dict(lr_per_512=1e-3, warmup_epochs=30.0), augment=DEIT_AUGMENT),
    # Stored labels are true of crops and flips alone; FKD trains SReT-LT at 0.002 for 1,024 images.
    "fkd": dict(optim=dict(lr_per_512=1e-3, warmup_epochs=5.0), augment={}),
    "none": dict(optim=dict(lr_per_512=5e-4, warmup_epochs=5.0), augment={}),
}
FKD_CROPS = 4  # of an image in one batch


def parse_arg(arg: str, **defaults: Any) -> ml_collections.FrozenConfigDict:
    """Reads "unsliced,res=384" into the given settings; a bare word switches one on.

    Raises:
      ValueError: a name that is not among `defaults`, or a value of another kind.
    """
    settings = dict(defaults)
    for part in filter(None, arg.split(",")):
        name, _, text = part.partition("=")
        if name not in defaults:
            raise ValueError(did_you_mean("config argument", name, defaults))
        kind = type(defaults[name])
        if (kind is bool) == bool(text):
            form = f"{name}" if kind is bool else f"{name}=VALUE"
            raise ValueError(f"config argument {part!r} should read {form!r}")
        try:
            settings[name] = True if kind is bool else kind(text)
        except ValueError as e:
            raise ValueError(f"config argument {part!r}: {name} takes {kind.__name__}") from e
    return ml_collections.FrozenConfigDict(settings)


def parse_depth(arg: str, depths: Iterable[str]) -> tuple[str, str]:
    """Splits "1000,res=384" into one of the depths and the other arguments.

    Raises:
      ValueError: another depth, or none.
    """
    depth, _, rest = arg.partition(",")
    if depth not in depths:
        raise ValueError(f"the first config argument {depth!r} must be {' or '.join(depths)}")
    return depth, rest


def get_variant(name: str, arg: str) -> ml_collections.ConfigDict:
    """The recipe for a published variant.

    Args:
      name: of the model.
      arg: any of "unsliced", "distill" (with soft labels alone; needs config.teacher), "fkd"
        (with stored ones; needs config.data.soft_labels), "res=N" (image size), "groups=16-14-1"
        (the first loop's groups by stage, the other loops plain), "recipe=NAME".
    """
    args = parse_arg(arg, unsliced=False, distill=False, fkd=False, res=224, groups="", recipe="")
    if args.fkd and (args.distill or args.recipe):
        raise ValueError("fkd is a recipe of its own; leave out distill and recipe")
    config = get_config("fkd" if args.fkd else args.recipe or "deit")
    config.model.name = name
    config.model.image_size = args.res
    config.distill.required = args.distill or args.fkd
    config.data.crops_per_image = FKD_CROPS if args.fkd else 1
    if args.unsliced and args.groups:
        raise ValueError(f"unsliced and groups={args.groups!r} exclude each other; give one")
    if args.unsliced:
        config.model.groups = ((1,), (1,), (1,))
    elif args.groups:
        if not re.fullmatch(r"\d{1,9}(-\d{1,9})*", args.groups):
            raise ValueError(f"groups={args.groups!r} should read like groups=16-14-1")
        config.model.groups = tuple((int(g), 1) for g in args.groups.split("-"))
    return config


def get_config(recipe: str = "deit") -> ml_collections.ConfigDict:
    """The settings of a 300-epoch ImageNet run.

    Args:
      recipe: "deit"; "sret_long_warmup", which SReT's authors recommend later; "fkd", of stored
        soft labels; or "none". The last two leave only random crops and flips of the augmentation.
    """
    if recipe not in RECIPES:
        raise ValueError(did_you_mean("recipe", recipe, RECIPES))
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.epochs = 300.0
    config.batch_size = 1024
    config.eval_batch_size = config_dict.placeholder(int)  # default: batch_size / grad_accum
    config.grad_accum = 1  # BatchNorm then sees micro-batches
    config.stop_at_step = config_dict.placeholder(int)  # ends early, on the full run's schedule
    config.fsdp = 1  # devices that share one copy of the parameters
    config.ema_decay = 0.99996
    config.ema_warmup = True  # decay min(ema_decay, (1 + t) / (10 + t)) at step t; timm: False
    # Trained weights to start from: a run, one of its steps, a converted checkpoint, or a file.
    config.init_from = ""
    config.init_ema = False  # takes that run's averaged weights

    config.model = ml_collections.ConfigDict()
    config.model.name = "sret_s"
    config.model.image_size = 224
    config.model.dtype = "bfloat16"  # of matrix products; parameters are float32
    config.model.num_classes = config_dict.placeholder(int)  # default: those of the data
    # The rest default to the variant's own values.
    config.model.blocks = config_dict.placeholder(tuple)
    config.model.loops = config_dict.placeholder(int)
    config.model.groups = config_dict.placeholder(tuple)
    config.model.heads = config_dict.placeholder(tuple)
    config.model.dim = config_dict.placeholder(int)
    config.model.mlp_ratio = config_dict.placeholder(float)
    config.model.nll_ratio = config_dict.placeholder(float)
    config.model.nll_every = config_dict.placeholder(int)
    config.model.branch_init = config_dict.placeholder(float)
    config.model.drop_path_rate = config_dict.placeholder(float)
    config.model.permutation = config_dict.placeholder(str)
    config.model.unroll = config_dict.placeholder(int)
    config.model.remat = config_dict.placeholder(str)
    config.model.attention = config_dict.placeholder(str)
    config.model.mlp = config_dict.placeholder(str)

    config.optim = ml_collections.ConfigDict(RECIPES[recipe]["optim"])
    config.optim.warmup_lr = 1e-6
    config.optim.min_lr = 1e-5
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 0.0  # 0: no clipping
    # For fine-tuning:
    config.optim.layer_decay = 1.0  # factor on the learning rate per block, from the head down
    config.optim.backbone_lr = 1.0  # factor on the learning rate of all but the head
    config.optim.freeze_backbone = False  # trains the head alone

    config.mixed_depth = ml_collections.ConfigDict()
    config.mixed_depth.loops = 0  # of a shallow path trained along; 0: none
    config.mixed_depth.weight = 1.0  # loss = deep + weight * shallow

    config.data = ml_collections.ConfigDict()
    # Of TFDS, or the path of a folder SPLIT/CLASS/IMAGE.jpg or CLASS/IMAGE.jpg.
    config.data.name = "imagenet2012"
    config.data.data_dir = ""  # of TFDS; "": TFDS_DATA_DIR, else TFDS's own default
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    # What a slice takes of a folder: "stratified": its share of every class; "listed": a part of
    # the sorted list, which cuts off whole classes.
    config.data.folder_slices = "stratified"
    config.data.test_crop = 0.875
    config.data.workers = -1  # processes at most; -1: one per core, 0: threads only
    # Global batches read ahead, those in the making included; bounds the workers too. Training
    # and evaluation have as many each.
    config.data.prefetch = 2
    config.data.max_bad_fraction = 0.001  # of the images; more that are unreadable end the run
    config.data.soft_labels = ""  # folder of stored soft labels (sret_jax.tools.soft_labels)
    config.data.crops_per_image = 1  # of stored soft labels, in one batch
    config.data.synthetic = False  # noise that is already on the devices: the speed without data

    config.augment = ml_collections.ConfigDict()  # what is 0 or "" is off
    config.augment.crop_scale = (0.08, 1.0)  # share of the image's area
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # width / height
    config.augment.flip = 0.5
    config.augment.policy = ""  # RandAugment as timm writes it, or "three" for Three-Augment
    config.augment.color_jitter = 0.0
    config.augment.erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha
    config.augment.cutmix = 0.0  # alpha
    config.augment.mix_switch = 0.5  # probability of cutmix where both are on
    config.augment.mix_prob = 1.0  # that a pair of images is mixed at all
    config.augment.repeats = 1  # times each image is shown in a row of shuffled images
    config.augment.label_smoothing = 0.0
    config.augment.update(RECIPES[recipe]["augment"])

    config.teacher = ""  # what sret_jax.load reads: its class probabilities are the labels
    config.distill = ml_collections.ConfigDict()
    config.distill.required = False  # whether a run without a teacher is a mistake
    config.distill.temperature = 1.0  # of teacher and student
    config.distill.hard_weight = 0.0  # w: loss = (1 - w) soft + w hard
    config.distill.teacher_ema = False  # the averaged weights of a run
    config.distill.teacher_groups = config_dict.placeholder(tuple)  # many files do not say them

    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1.0
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_best = 1
    config.checkpoint.keep_every_epochs = 50.0  # 0: keep none for good
    config.rollback = ml_collections.ConfigDict()
    config.rollback.bad_steps = 10  # in a row not finite: back to the last good checkpoint
    config.rollback.most = 3  # times, then the run ends
    config.watchdog = ml_collections.ConfigDict()
    config.watchdog.factor = 20.0  # no step for so many median steps: all stacks are printed
    config.watchdog.least_seconds = 120.0  # but not before
    config.watchdog.stop_seconds = 1800.0  # the process ends; its peers then do, too
    config.profile = ()  # (first, last): steps to write a profiler trace of
    return config
