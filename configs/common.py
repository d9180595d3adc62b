"""The ImageNet recipes, and the settings that every experiment has.

An experiment's config calls `get_config` and changes the few values in which it differs. Unless a
recipe says otherwise, the numbers are from SReT section 4.1, which follows DeiT.
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
RECIPES: dict[str, dict[str, Any]] = {
    "deit": dict(optim=dict(lr_per_512=5e-4, warmup_epochs=5.0), augment=DEIT_AUGMENT),
    "sret_long_warmup": dict(optim=dict(lr_per_512=1e-3, warmup_epochs=30.0), augment=DEIT_AUGMENT),
    "swin": dict(
        optim=dict(lr_per_512=5e-4, warmup_epochs=20.0, clip_norm=5.0),
        augment={**DEIT_AUGMENT, "repeats": 1},
    ),
    # 0.001 for batches of 4,096, and 10,000 steps of warm-up.
    "mixer": dict(
        batch_size=4096,
        optim=dict(lr_per_512=1.25e-4, warmup_epochs=32.0, weight_decay=0.1, clip_norm=1.0),
        augment=dict(policy="rand-m15-n2", mixup=0.5),
    ),
    # Stored labels hold for crops and flips only. FKD trains SReT-LT at 0.002 for batches of 1,024.
    "fkd": dict(optim=dict(lr_per_512=1e-3, warmup_epochs=5.0)),
    "none": dict(optim=dict(lr_per_512=5e-4, warmup_epochs=5.0)),
}
FKD_CROPS = 4  # crops per image in a batch


def parse_arg(arg: str, **defaults: Any) -> ml_collections.FrozenConfigDict:
    """Reads arguments such as "unsliced,res=384" into `defaults`; a bare word means True.

    Raises:
      ValueError: a name is not among `defaults`, or a value has another type.
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
    """Splits "1000,res=384" into a depth, one of `depths`, and the other arguments.

    Raises:
      ValueError: the first argument is missing or is none of the depths.
    """
    depth, _, rest = arg.partition(",")
    if depth not in depths:
        raise ValueError(f"the first config argument {depth!r} must be {' or '.join(depths)}")
    return depth, rest


def get_variant(name: str, arg: str, recipe: str = "deit") -> ml_collections.ConfigDict:
    """The config of a published variant on ImageNet.

    Args:
      name: name of the model.
      arg: any of "loops=N" (applications of each block), "nll" (a non-linear layer of the block's
        width after every application), "distill" (trains on soft labels only, and a model
        of two heads as DeiT does; needs config.teacher), "fkd" (trains on stored soft labels; needs
        config.data.soft_labels), "res=N" (image size), "recipe=NAME", and where blocks attend over
        all tokens "unsliced" or "groups=16-14-1" (groups per stage in the first loop; other loops
        are not sliced).
      recipe: the recipe without "recipe=".

    Raises:
      ValueError: an argument is unknown, or the model's family has no such thing.
    """
    from sret_jax.models.registry import create_model, variant  # loads JAX, for seconds

    published = create_model(name)
    args = parse_arg(
        arg,
        **dict(loops=published.loops, nll=False, unsliced=False, groups=""),
        **dict(distill=False, fkd=False, res=224, recipe=""),
    )
    if args.fkd and (args.distill or args.recipe):
        raise ValueError("fkd is a recipe of its own; leave out distill and recipe")
    config = get_config("fkd" if args.fkd else args.recipe or recipe)
    config.model.name = name
    config.model.image_size = args.res
    if args.loops != published.loops:
        config.model.loops = args.loops
    if args.nll and published.nll_ratio:
        raise ValueError(f"{name} has NLLs as published; leave out nll")
    if args.nll:
        config.model.nll_ratio = 1.0
    if args.unsliced or args.groups:
        config.model.groups = _groups(name, published, args)
    config.distill.required = args.distill or args.fkd
    if args.distill and len(published.classifiers) > 1:
        config.distill.update(kind="hard", hard_weight=0.5)  # DeiT section 4
    config.data.crops_per_image = FKD_CROPS if args.fkd else 1
    config.data.test_crop = variant(name, args.res).test_crop
    return config


def _groups(name: str, model: Any, args: ml_collections.FrozenConfigDict) -> tuple:
    """The attention groups that the argument "unsliced" or "groups=16-14-1" stands for."""
    if args.unsliced and args.groups:
        raise ValueError(f"unsliced and groups={args.groups!r} exclude each other; give one")
    if model.why_unsliced:
        word = "unsliced" if args.unsliced else "groups"
        raise ValueError(f"{name} cannot be sliced: {model.why_unsliced}; leave out {word}")
    if args.unsliced:
        return ((1,),) * len(model.blocks)
    if not re.fullmatch(r"\d{1,9}(-\d{1,9})*", args.groups):
        raise ValueError(f"groups={args.groups!r} should read like groups=16-14-1, one per stage")
    return tuple((int(g), 1) for g in args.groups.split("-"))


def get_config(recipe: str = "deit") -> ml_collections.ConfigDict:
    """The settings of a 300-epoch ImageNet run.

    Args:
      recipe: "deit"; "sret_long_warmup", which SReT's authors recommend later; "swin" and "mixer",
        those of their papers; "fkd", for stored soft labels; or "none". With the last two, random
        crops and flips are the only augmentation.
    """
    if recipe not in RECIPES:
        raise ValueError(did_you_mean("recipe", recipe, RECIPES))
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.epochs = 300.0
    config.batch_size = 1024
    config.eval_batch_size = config_dict.placeholder(int)  # default: batch_size / grad_accum
    config.grad_accum = 1  # micro-batches per step; BatchNorm normalises each by itself
    config.stop_at_step = config_dict.placeholder(int)  # ends early; the schedule stays the same
    config.fsdp = 1  # number of devices that share one copy of the parameters
    # The moving average looks back over so many images: its decay per step is
    # exp(-batch_size / ema_images), here 0.99996.
    config.ema_images = 25.6e6
    config.ema_decay = config_dict.placeholder(float)  # the decay per step, whatever the batch size
    config.ema_warmup = True  # decay min(decay, (1 + t) / (10 + t)) at step t; timm: False
    # Trained weights to start from: a run, one of its steps, a converted checkpoint, a file,
    # hf://OWNER/NAME on the Hugging Face hub, or a name such as "digits_small" (docs/weights.md).
    config.init_from = ""
    config.init_ema = False  # starts from the moving average of those weights

    config.model = ml_collections.ConfigDict()
    config.model.name = "sret_s"
    config.model.image_size = 224
    config.model.dtype = "bfloat16"  # dtype of matrix products; parameters are float32
    config.model.num_classes = config_dict.placeholder(int)  # default: the classes of the data
    # The defaults of the others are the published model's own values. A setting that the model's
    # family does not have is refused.
    config.model.blocks = config_dict.placeholder(tuple)
    config.model.loops = config_dict.placeholder(int)
    config.model.groups = config_dict.placeholder(tuple)  # (): attention is not sliced
    config.model.stem_stride = config_dict.placeholder(int)
    config.model.patch_size = config_dict.placeholder(int)
    config.model.distilled = config_dict.placeholder(bool)
    config.model.heads = config_dict.placeholder(tuple)
    config.model.dim = config_dict.placeholder(int)
    config.model.width = config_dict.placeholder(int)
    config.model.window = config_dict.placeholder(int)
    config.model.mlp_ratio = config_dict.placeholder(float)
    config.model.token_ratio = config_dict.placeholder(float)
    config.model.nll_ratio = config_dict.placeholder(float)
    config.model.nll_every = config_dict.placeholder(int)
    config.model.nll_activation = config_dict.placeholder(str)
    config.model.adapters = config_dict.placeholder(tuple)
    config.model.residual = config_dict.placeholder(str)
    config.model.branch_init = config_dict.placeholder(float)
    config.model.drop_path_rate = config_dict.placeholder(float)
    config.model.permutation = config_dict.placeholder(str)
    config.model.mean = config_dict.placeholder(tuple)  # pixel statistics, red, green, blue
    config.model.std = config_dict.placeholder(tuple)
    config.model.unroll = config_dict.placeholder(int)
    config.model.remat = config_dict.placeholder(str)
    config.model.attention = config_dict.placeholder(str)
    config.model.mlp = config_dict.placeholder(str)

    config.optim = ml_collections.ConfigDict()
    config.optim.lr_per_512 = 5e-4  # peak for batches of 512; the peak of others is in proportion
    config.optim.warmup_epochs = 5.0
    config.optim.warmup_lr = 1e-6
    config.optim.min_lr = 1e-5
    config.optim.weight_decay = 0.05
    config.optim.clip_norm = 0.0  # 0: no clipping
    # For fine-tuning:
    config.optim.layer_decay = 1.0  # factor on the learning rate per block, from the head down
    config.optim.backbone_lr = 1.0  # factor on the learning rate of everything but the head
    config.optim.freeze_backbone = False  # trains the classification head alone

    config.recursion = ml_collections.ConfigDict()
    # Loops of each training step: "fixed" is model.loops; drawn: "uniform:1-4" or "poisson:3"; a
    # curriculum: "1@0.7,2" is 1 loop for 70% of the steps, then 2 (docs/laboratory.md).
    config.recursion.train_loops = "fixed"
    config.recursion.max_loops = config_dict.placeholder(int)  # of a step; default: model.loops
    # Gradients pass through so many last loops of each block only; default: all.
    config.recursion.backprop_loops = config_dict.placeholder(int)

    config.mixed_depth = ml_collections.ConfigDict()
    config.mixed_depth.loops = 0  # loops of a shallow path that is trained as well; 0: none
    config.mixed_depth.weight = 1.0  # loss = deep + weight * shallow
    config.mixed_depth.exits = ()  # loops after which the last block is read out and has a loss too
    config.mixed_depth.exit_weights = ()  # of their losses; (): the weight above for each
    config.mixed_depth.labels = "data"  # or "deepest": the other paths learn from the full depth

    config.data = ml_collections.ConfigDict()
    # A TFDS data set, or the path of a folder SPLIT/CLASS/IMAGE.jpg or CLASS/IMAGE.jpg.
    config.data.name = "imagenet2012"
    config.data.data_dir = ""  # folder of TFDS data; "": TFDS_DATA_DIR, else TFDS's default
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    # How a slice of a folder is taken. "stratified": the same fraction of every class; "listed": a
    # part of the sorted list, which cuts off whole classes.
    config.data.folder_slices = "stratified"
    config.data.test_crop = 0.875
    config.data.workers = -1  # most worker processes; -1: one per core, 0: threads only
    # Number of global batches kept in flight by each loader (training has one, evaluation another),
    # including those being built. A small value also limits how many workers can be used.
    config.data.prefetch = 2
    config.data.max_bad_fraction = 0.001  # more unreadable images than this fraction end the run
    config.data.soft_labels = ""  # folder of stored soft labels (sret_jax.tools.soft_labels)
    config.data.crops_per_image = 1  # crops of an image per batch, with stored soft labels
    config.data.synthetic = False  # noise that is already on the devices: measures speed

    config.augment = ml_collections.ConfigDict()  # 0 or "" means off
    config.augment.crop_scale = (0.08, 1.0)  # fraction of the image's area
    config.augment.crop_ratio = (3 / 4, 4 / 3)  # width / height
    config.augment.flip = 0.5
    config.augment.policy = ""  # RandAugment in timm's notation, or "three" for Three-Augment
    config.augment.color_jitter = 0.0
    config.augment.erasing = 0.0  # probability
    config.augment.mixup = 0.0  # alpha
    config.augment.cutmix = 0.0  # alpha
    config.augment.mix_switch = 0.5  # probability of cutmix, rather than mixup, if both are on
    config.augment.mix_prob = 1.0  # probability that a pair of images is mixed at all
    config.augment.repeats = 1  # how often each image is shown per pass, nearby but not adjacent
    config.augment.label_smoothing = 0.0

    config.teacher = ""  # path for sret_jax.load; its class probabilities are the labels
    config.distill = ml_collections.ConfigDict()
    config.distill.required = False  # refuses to run without a teacher or stored labels
    config.distill.kind = "soft"  # or "hard": the teacher's most probable class; or "deit_soft"
    config.distill.temperature = 1.0  # temperature of teacher and student
    config.distill.hard_weight = 0.0  # w: loss = (1 - w) of teacher + w of labels
    config.distill.teacher_ema = False  # uses the moving average of the teacher's weights
    config.distill.teacher_groups = config_dict.placeholder(tuple)  # for files that lack them

    config.log_every_steps = 50
    config.eval_every_epochs = 1.0
    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_epochs = 1.0
    config.checkpoint.keep_latest = 2
    config.checkpoint.keep_best = 1
    config.checkpoint.keep_every_epochs = 50.0  # these are never deleted; 0: none
    config.rollback = ml_collections.ConfigDict()
    config.rollback.bad_steps = 10  # after so many non-finite steps in a row: back to a checkpoint
    config.rollback.most = 3  # rollbacks; then the run ends
    config.watchdog = ml_collections.ConfigDict()
    config.watchdog.factor = 20.0  # no step for so many median steps: prints the threads' stacks
    config.watchdog.least_seconds = 120.0  # never earlier than this
    config.watchdog.stop_seconds = 1800.0  # ends the process, upon which its peers end too
    config.profile = ()  # (first, last): steps to write a profiler trace of
    config.update(RECIPES[recipe])
    return config
