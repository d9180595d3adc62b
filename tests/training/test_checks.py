"""Settings that no run can have end in one sentence, before anything is compiled."""

import re

import pytest
from etils import epath

from configs import quickstart
from sret_jax.errors import UserError
from sret_jax.run.loop import train

SETTINGS = [
    ({"model.name": "sret_x"}, "unknown model 'sret_x'; did you mean 'sret_"),
    ({"data.name": "imagnet2012"}, "'imagnet2012'; did you mean 'imagenet2012'?"),
    ({"model.groups": ((3, 1), (1, 1))}, "3 groups do not divide"),
    ({"model.image_size": 40}, "image_size=40 is not divisible by 16"),
    ({"model.heads": (4, 6)}, "not a multiple of the 64 of stage 0"),
    ({"model.dim": 3, "model.heads": (3, 6)}, "stem width heads[0]*dim = 3*3 = 9"),
    ({"batch_size": 60}, "config.batch_size=60 is not divisible by the 8 devices"),
    ({"grad_accum": 3}, "the 8 devices times config.grad_accum=3; use 72"),
    ({"model.groups": (8, 4)}, "groups=(8, 4) must hold a tuple of whole numbers"),
    ({"augment.crop_scale": (0.9, 0.1)}, "augment.crop_scale=(0.9, 0.1) must be two"),
    ({"profile": (5, 3)}, "config.profile=(5, 3) must be () or (first, last)"),
    ({"eval_batch_size": 9}, "config.eval_batch_size=9 is not divisible by the 8 devices"),
    ({"model.loops": 40, "model.nll_every": 17}, "config.model: stage 0 repeats only every 34"),
    ({"fsdp": 3}, "config.fsdp=3 does not divide the 8 devices; use one of [1, 2, 4, 8]"),
    ({"data.name": "/no/such"}, "the data folder /no/such does not exist"),
    ({"model.num_classes": 5}, "labels up to 9, beyond config.model.num_classes=5"),
    ({"ema_images": 0.0}, "config.ema_images=0.0 must be above 0"),
    ({"ema_decay": 1.5}, "config.ema_decay=1.5 must be in [0, 1)"),
    ({"model.dtype": "float16"}, "config.model.dtype 'float16'; did you mean 'bfloat16'?"),
    ({"augment.policy": "rand-m12-inc1"}, "RandAugment's m=12 must be in [0, 10]"),
    ({"augment.policy": "rand-mst1"}, "unknown RandAugment setting 'mst'; did you mean"),
    ({"augment.policy": "autoaugment"}, "unknown policy 'autoaugment'; did you mean"),
    ({"augment.erasing": -0.25}, "augment.erasing=-0.25 must be a probability in [0, 1]"),
    ({"augment.mixup": -1.0}, "config.augment.mixup=-1.0 must be 0 (off) or above"),
    ({"augment.mix_prob": 2.0}, "augment.mix_prob=2.0 must be a probability in [0, 1]"),
    ({"augment.label_smoothing": 1.0}, "label_smoothing=1.0 must be in [0, 1)"),
    ({"augment.repeats": -3}, "config.augment.repeats=-3 must be 0 or more"),
    ({"augment.color_jitter": 1.5}, "augment.color_jitter=1.5 must be a number in [0, 1]"),
    (
        {"augment.mixup": 0.8, "batch_size": 24},
        "each of which mixes pairs of images (config.augment.mixup, cutmix); use 32",
    ),
    ({"data.max_bad_fraction": 1.5}, "config.data.max_bad_fraction=1.5 must be in [0, 1)"),
]


@pytest.mark.parametrize(("settings", "sentence"), SETTINGS)
def test_a_setting_out_of_range_is_refused_before_any_compilation(
    settings, sentence, tmp_path, digits_dir, capsys
):
    config = quickstart.get_config()
    config.data.data_dir = str(digits_dir)
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        train(config, epath.Path(tmp_path) / "run")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
    assert "Compiling" not in capsys.readouterr().out
