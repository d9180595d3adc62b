"""The command line: every mistake ends in one clear sentence and exit status 2."""

import pytest

from tests.conftest import run_python

BAD = [
    (["--config.model.lops=3"], "unknown config field 'model.lops'; did you mean 'model.loops'?"),
    (["--config.model.name=sret_x"], "unknown model 'sret_x'; did you mean 'sret_"),
    (["--config.data.name=imagnet2012"], "'imagnet2012'; did you mean 'imagenet2012'?"),
    (["--config.model.groups=((3,1),(1,1))"], "3 groups do not divide"),
    (["--config.model.image_size=40"], "image_size=40 is not divisible by 16"),
    (["--config.model.heads=(4,6)"], "not a multiple of the 64 of stage 0"),
    (["--config.model.dim=3", "--config.model.heads=(3,6)"], "stem width heads[0]*dim = 3*3 = 9"),
    (["--config.batch_size=60"], "config.batch_size=60 is not divisible by the 8 devices"),
    (["--config.grad_accum=3"], "the 8 devices (1 hosts) times config.grad_accum=3; use 72"),
    (["--config.lr=3"], "unknown config field 'lr'; did you mean '"),
    (["--config.model.groups=(8,4)"], "groups=(8, 4) must hold a tuple of whole numbers"),
    (["--config.augment.crop_scale=(0.9,0.1)"], "augment.crop_scale=(0.9, 0.1) is no range"),
    (["--config.seed=-1"], "config.seed=-1 must be 0 or more"),
    (["--config.profile=(5,3)"], "config.profile=(5, 3) must be () or (first, last)"),
    (["--config=configs/quickstart.py:foo"], "this config takes no arguments after a colon"),
    (["--config=configs/sret_lt.py:groups=16-x-1"], "should read like groups=16-14-1"),
    (["--config.eval_batch_size=9"], "config.eval_batch_size=9 is not divisible by the 8 devices"),
    (["--config.fsdp=3"], "config.fsdp=3 does not divide the 8 devices; use one of [1, 2, 4, 8]"),
    (["--config.data.name=/no/such"], "the data folder /no/such does not exist"),
    (["--config=configs/sret_s.py", "--config.data.data_dir=/none"], "tools.prepare imagenet2012"),
    (["--config.model.num_classes=5"], "labels up to 9, beyond config.model.num_classes=5"),
    (["--workdir=/dev/null/x"], "the workdir /dev/null/x is not writable"),
    (["--config=configs/sret.py"], "there is no config file 'configs/sret.py'"),
    (["--config", "configs/sret.py"], "there is no config file 'configs/sret.py'"),
    (["--config=sret_jax/errors.py"], "has no attribute 'get_config'"),
    (["--config=configs/sret_t.py:unslicd"], "argument 'unslicd'; did you mean 'unsliced'?"),
    (["--config=configs/sret_t.py:res=big"], "res takes int"),
    (["--confg=x"], "Unknown command line flag 'confg'. Did you mean: config"),
    (["--config.batch_size=many"], "--config.batch_size=many"),
    (["--mode=evaluate"], "--mode=evaluate"),
    (["configs/sret_t.py"], "unexpected argument 'configs/sret_t.py'"),
    (["--processes=2"], "go together; give all three or none"),
    (["--config.ema_decay=1.5"], "config.ema_decay=1.5 must be in [0, 1)"),
    (["--config.model.dtype=float16"], "config.model.dtype 'float16'; did you mean 'bfloat16'?"),
    (["--mode=eval"], "holds no checkpoints/"),
    (["--config.augment.policy=rand-m12-inc1"], "RandAugment's m=12 must be in [0, 10]"),
    (["--config.augment.policy=rand-mst1"], "unknown RandAugment setting 'mst'; did you mean"),
    (["--config.augment.policy=autoaugment"], "unknown policy 'autoaugment'; did you mean"),
    (["--config.augment.erasing=-0.25"], "augment.erasing=-0.25 must be a probability in [0, 1]"),
    (["--config.augment.mixup=-1.0"], "config.augment.mixup=-1.0 must be 0 (off) or above"),
    (["--config.augment.mix_prob=2.0"], "augment.mix_prob=2.0 must be a probability in [0, 1]"),
    (["--config.augment.label_smoothing=1.0"], "label_smoothing=1.0 must be in [0, 1)"),
    (["--config.augment.repeats=-3"], "config.augment.repeats=-3 must be 0 or more"),
    (["--config.augment.color_jitter=1.5"], "augment.color_jitter=1.5 must be a number in [0, 1]"),
    (["--config.augment.mixupp=1.0"], "'augment.mixupp'; did you mean 'augment.mixup'?"),
    (
        ["--config.augment.mixup=0.8", "--config.batch_size=24"],
        "each of which mixes pairs of images (config.augment.mixup, cutmix); use 32",
    ),
    (["--config.data.max_bad_fraction=1.5"], "config.data.max_bad_fraction=1.5 must be in [0, 1)"),
]


@pytest.mark.parametrize(("flags", "sentence"), BAD)
def test_a_mistake_is_one_sentence_and_status_2_before_any_compilation(
    flags, sentence, tmp_path, digits_dir
):
    if not any(flag.startswith("--workdir") for flag in flags):
        flags = [*flags, f"--workdir={tmp_path}"]
    if not any("config=" in flag or "data_dir" in flag for flag in flags):
        flags = [*flags, f"--config.data.data_dir={digits_dir}"]
    done = run_python("main.py", *flags, devices=8)
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("Error: "), done.stderr
    assert sentence in lines[0]
    assert "Compiling" not in done.stdout
