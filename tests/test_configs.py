import importlib

import pytest

from configs import common
from sret_jax.training.experiment import create_from_config
from sret_jax.training.flops import model_macs

VARIANTS = [
    ("sret_t", "", 224, 1.112),
    ("sret_t", "unsliced,res=384", 384, 6.408),
    ("sret_lt", "groups=16-14-1", 224, 1.225),
    ("sret_lt", "recipe=sret_long_warmup", 224, 1.164),
    ("sret_s", "", 224, 4.173),
    ("sret_s", "unsliced,res=512", 512, 42.672),
]


@pytest.mark.parametrize(("name", "arg", "size", "gmacs"), VARIANTS)
def test_a_config_and_its_arguments_make_the_published_model(name, arg, size, gmacs):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    model = create_from_config(config, num_classes=1000)
    assert model.image_size == size
    assert model_macs(model) / 1e9 == pytest.approx(gmacs, rel=0.005)
    assert model.drop_path_rate == (0.2 if name == "sret_s" else 0.1)
    assert config.optim.lr_per_512 == (1e-3 if "warmup" in arg else 5e-4)


@pytest.mark.parametrize("name", ["quickstart", "sret_t", "sret_lt", "sret_s"])
def test_a_config_opens_with_what_it_trains_costs_and_reaches_and_the_command(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    for part in ("Costs:", "Should reach:", f"python main.py --config=configs/{name}.py"):
        assert part in doc


def test_unknown_arguments_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="'unslicd'; did you mean 'unsliced'?"):
        common.get_variant("sret_t", "unslicd")
    with pytest.raises(ValueError, match="should read 'res=VALUE'"):
        common.get_variant("sret_t", "res")
    with pytest.raises(ValueError, match="should read 'unsliced'"):
        common.get_variant("sret_t", "unsliced=yes")
    with pytest.raises(ValueError, match="unknown recipe 'diet'; did you mean 'deit'?"):
        common.get_variant("sret_t", "recipe=diet")
