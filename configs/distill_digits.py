r"""A student half as wide as the quickstart's model on a tenth of its digits, taught by it or not.

    python main.py                                               (the teacher: runs/quickstart)
    python main.py --config=configs/distill_digits.py:hard
    python main.py --config=configs/distill_digits.py:soft
    python -m sret_jax.tools.soft_labels generate --config=configs/distill_digits.py:stored \
      --teacher=runs/quickstart --crops=64 --keep=topk5 --out=runs/digit_labels
    python main.py --config=configs/distill_digits.py:stored

Costs: 0.08M parameters and 1.3 MMACs per image, and the teacher's 5 with :soft; a minute or two on
2 busy cores.
Should reach: 89.5% with the labels of the data, 96.2% with the teacher's (means of three seeds; see
docs/distillation.md).

The teacher has seen all 1,438 digits; the student sees 144 of them. These are mixed by mixup and
CutMix as in DeiT's recipe, except with :stored, whose labels belong to unmixed images. All else is
equal.
"""

import ml_collections

from sret_jax.configs import common, quickstart


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """Argument: hard trains on the data's labels; soft and stored on the teacher's alone."""
    args = common.parse_arg(arg, hard=False, soft=False, stored=False)
    if args.hard + args.soft + args.stored != 1:
        raise ValueError(f"the config argument {arg!r} must be hard, soft or stored")
    config = quickstart.get_config()
    config.epochs = 150.0
    config.model.dim = 8
    config.data.train_split = "train[:10%]"
    config.eval_every_epochs = 15.0
    config.checkpoint.every_epochs = 150.0
    if not args.stored:
        config.augment.update(mixup=0.8, cutmix=1.0)
    if args.soft:
        config.teacher = "runs/quickstart"
        config.distill.required = True
    if args.stored:
        config.data.update(soft_labels="runs/digit_labels", crops_per_image=4)
    return config
