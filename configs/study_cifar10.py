"""The claims of the SReT paper, tried on CIFAR-10 with models below 0.4M parameters.

    python -m sret_jax.tools.prepare cifar10
    python main.py --config=configs/study_cifar10.py:loops2
    python -m sret_jax.tools.study               (all arms with three seeds, and their tables)

The argument is an arm of `ARMS`. All arms train on nine tenths of the training images by one
recipe, which was tuned on `loops1`, a network that is not recursive, without the test images. All
take the same number of steps, but the teacher, the deep arms and those of another batch size. With
a second argument "full" (loops2,full) an arm takes ten times as many.

Costs: 26,000 to 330,000 parameters and 2 to 24 MMACs per image (181 with 1,000 applications);
`loops1` and `loops2` took 7 minutes each on one core of a busy machine.
Should reach: 68% top-1 with `loops1` on the last tenth; docs/study.md has the accuracy of each arm
on the test images.
"""

from typing import Any

import ml_collections

from sret_jax.configs import common
from sret_jax.errors import did_you_mean
from sret_jax.study.design import Arm, Claim

RUNS = "runs/study_cifar10"  # RUNS/ARM/SEED is the workdir of a run
CLASSES = 10
TEACHER, LABELS = f"{RUNS}/teacher/0", f"{RUNS}/labels"

Settings = dict[str, Any]

# Stages of 64 and 16 tokens, three unique blocks that are applied once, and no part of SReT's.
PLAIN: Settings = dict(
    **dict(name="sret_t", stem_stride=4, groups=((1,), (1,)), permutation=None),
    **dict(blocks=(1, 2), loops=1, heads=(2, 4), dim=16, mlp_ratio=3.0, nll_ratio=0.0),
    **dict(residual="plain", drop_path_rate=0.0),
)
SRET: Settings = {**PLAIN, **dict(loops=2, nll_ratio=1.0, residual="learned")}
SLICED: Settings = {**SRET, "groups": ((4, 2), (1, 1))}
DEEP: Settings = {
    **SRET,
    **dict(stem_stride=8, groups=((1,),), blocks=(1,), heads=(4,), dim=8, nll_ratio=0.0),
}
DEIT: Settings = dict(
    **dict(name="deit_tiny", patch_size=4, blocks=(2,), heads=(3,), dim=16, mlp_ratio=3.0),
    drop_path_rate=0.0,
)
PIT: Settings = dict(
    **dict(name="pit_ti", patch_size=8, blocks=(1, 2), heads=(2, 4), dim=16, mlp_ratio=3.0),
    drop_path_rate=0.0,
)
SWIN: Settings = dict(
    **dict(name="swin_tiny", window=4, blocks=(2, 2), heads=(2, 4), dim=16, mlp_ratio=3.0),
    drop_path_rate=0.0,
)
MIXER: Settings = dict(
    **dict(name="mixer_s16", patch_size=4, blocks=(2,), width=48, token_ratio=1.0, mlp_ratio=3.0),
    drop_path_rate=0.0,
)
TAUGHT: Settings = {"teacher": TEACHER, "distill.required": True}


def _deep(loops: int) -> Arm:
    """Applications of one block, whose branches start small."""
    model = {**DEEP, "loops": loops, "branch_init": loops**-0.5}
    return Arm(model, {"epochs": 0.45, "optim.warmup_epochs": 0.05, "optim.clip_norm": 1.0})


ARMS: dict[str, Arm] = {
    "loops1": Arm(PLAIN),
    **{f"loops{n}": Arm({**PLAIN, "loops": n}) for n in (2, 3, 4, 6, 10)},
    "untied_equal_flops": Arm({**PLAIN, "blocks": (2, 4)}),
    "untied_equal_parameters": Arm({**PLAIN, "blocks": (2, 4), "dim": 12, "mlp_ratio": 2.6}),
    "nll": Arm({**SRET, "residual": "plain"}),
    "coefficients": Arm({**SRET, "nll_ratio": 0.0}),
    "nll_coefficients": Arm(SRET),
    "linear_layer": Arm({**SRET, "nll_activation": "none"}),
    "sliced": Arm(SLICED),
    "sliced_unpermuted": Arm({**SLICED, "permutation": "identity"}),
    "teacher": Arm({**SRET, "dim": 24}, {"epochs": 9.0}, most_seeds=1),
    "soft": Arm(SRET, TAUGHT, teacher="teacher"),
    "hard_distillation": Arm(
        SRET, {**TAUGHT, "distill.kind": "hard", "distill.hard_weight": 0.5}, teacher="teacher"
    ),
    "deit_soft": Arm(
        SRET, {**TAUGHT, "distill.kind": "deit_soft", "distill.hard_weight": 0.5}, teacher="teacher"
    ),
    "stored": Arm(
        SRET,
        {"data.soft_labels": LABELS, "data.crops_per_image": 4, "distill.required": True},
        teacher="teacher",
        stored_crops=5,  # an image is shown 4.5 times
    ),
    **{f"depth{loops}": _deep(loops) for loops in (10, 100, 1000)},
    "deit": Arm(DEIT),
    "deit_loops2": Arm({**DEIT, "loops": 2}),
    "deit_untied": Arm({**DEIT, "blocks": (4,)}),
    "pit": Arm(PIT),
    "pit_loops2": Arm({**PIT, "loops": 2}),
    "pit_untied": Arm({**PIT, "blocks": (2, 4)}),
    "swin": Arm(SWIN),
    "swin_loops2": Arm({**SWIN, "loops": 2}),
    "swin_untied": Arm({**SWIN, "blocks": (4, 4)}),
    "mixer": Arm(MIXER),
    "mixer_loops2": Arm({**MIXER, "loops": 2}),
    "mixer_untied": Arm({**MIXER, "blocks": (4,)}),
    **{f"batch{images}": Arm(PLAIN, {"batch_size": images}) for images in (32, 128, 512)},
}

CLAIMS: dict[str, Claim] = {
    "recursion": Claim(
        "Naive recursion gains accuracy at no parameters",
        "a gain of about 2% simply by naive recursion (abstract)",
        (("loops1", "loops2", "untied_equal_flops", "untied_equal_parameters"),),
    ),
    "nll": Claim(
        "NLLs and residual coefficients help recursive blocks",
        "both are parts of the model; no figure is quoted here",
        (("loops2", "nll", "coefficients", "nll_coefficients", "linear_layer"),),
    ),
    "slicing": Claim(
        "Slicing saves computation at hardly any loss",
        "10 to 30% less computation, with minimal loss (abstract)",
        (("nll_coefficients", "sliced", "sliced_unpermuted"),),
    ),
    "loops": Claim(
        "How often a block should be applied",
        "the published models apply each block twice",
        (("loops1", "loops2", "loops3", "loops4", "loops6", "loops10"),),
    ),
    "distillation": Claim(
        "A teacher's soft labels alone beat hard labels and hard distillation",
        "soft labels alone raise SReT-T on ImageNet from 76.0 to 77.6%",
        (("nll_coefficients", "soft", "deit_soft", "hard_distillation", "stored"),),
    ),
    "depth": Claim(
        "Depth without difficulty",
        "more than 100 or even 1,000 shared layers train with ease (abstract)",
        (("depth10", "depth100", "depth1000"),),
    ),
    "families": Claim(
        "Recursion in other designs",
        "compatible with other designs of efficient vision transformers (abstract)",
        tuple(
            (name, f"{name}_loops2", f"{name}_untied") for name in ("deit", "pit", "swin", "mixer")
        ),
    ),
    "batch": Claim(
        "The rules for another batch size keep the accuracy (the baseline has 64 images)",
        "trained with one batch size, 1,024; its learning rate follows the linear rule",
        (("loops1", "batch32", "batch128", "batch512"),),
    ),
}


def get_config(arg: str = "loops2") -> ml_collections.ConfigDict:
    """Argument: an arm, and optionally "full" after a comma.

    Raises:
      ValueError: there is no such arm.
    """
    name, _, rest = arg.partition(",")
    if name not in ARMS:
        raise ValueError(did_you_mean("arm", name, ARMS))
    full = common.parse_arg(rest, full=False).full
    arm, config = ARMS[name], common.get_config("none")
    config.epochs = 45.0 if full else 4.5
    config.batch_size = 64
    config.eval_batch_size = 500
    config.ema_images = 6.4e3  # 100 steps
    config.model.update(image_size=32, dtype="float32", **arm.model)
    config.optim.update(lr_per_512=32e-3, warmup_epochs=0.5)
    config.data.update(
        name="cifar10",
        train_split="train[:90%]",
        eval_split="test",
        test_crop=1.0,
        workers=0,
    )
    config.augment.update(crop_scale=(0.8, 1.0), label_smoothing=0.1)
    config.log_every_steps = 100
    config.eval_every_epochs = 1.5
    config.checkpoint.every_epochs = 1.5
    config.checkpoint.keep_every_epochs = 0.0
    config.update_from_flattened_dict(arm.others)
    return config
