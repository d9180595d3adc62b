import importlib

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs import (
    common,
    deep_digits,
    distill_digits,
    finetune,
    laboratory_cifar10,
    sret_deep,
    study_cifar10,
)
from sret_jax.distillation.stored_labels import UNCHANGED
from sret_jax.errors import UserError
from sret_jax.models.flops import model_macs
from sret_jax.models.model_settings import model_settings
from sret_jax.models.registry import create_model, variant
from sret_jax.models.variables import abstract_variables
from sret_jax.settings.config_model import create_from_config

VARIANTS = [
    ("sret_t", "", {}),
    ("sret_t", "unsliced,res=384", dict(groups=None, image_size=384)),
    ("sret_lt", "groups=16-14-1", dict(groups=((16, 1), (14, 1), (1, 1)))),
    ("sret_lt", "recipe=sret_long_warmup", {}),
    ("sret_s", "", {}),
    ("sret_s", "unsliced,res=512", dict(groups=None, image_size=512)),
]


@pytest.mark.parametrize(("name", "arg", "overrides"), VARIANTS)
def test_a_config_and_its_arguments_make_the_published_model(name, arg, overrides):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    model = create_from_config(config, num_classes=1000)
    drop_path_rate = 0.2 if name == "sret_s" else 0.1
    published = create_model(name, **overrides, drop_path_rate=drop_path_rate)
    assert model_settings(model) == model_settings(published)
    assert config.optim.lr_per_512 == (1e-3 if "warmup" in arg else 5e-4)


# The learning rate, warm-up in epochs, weight decay and largest gradient norm of each recipe.
FAMILIES = {
    "deit_small": ("deit", (1e-3, 5.0, 0.05, 0.0)),
    "pit_s": ("deit", (1e-3, 5.0, 0.05, 0.0)),
    "swin_tiny": ("swin", (1e-3, 20.0, 0.05, 5.0)),
    "mixer_s16": ("mixer", (1e-3, 32.0, 0.1, 1.0)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_s_config_is_its_published_recipe_and_its_arguments_are_ours(name):
    get_config = importlib.import_module(f"configs.{name}").get_config
    config, (recipe, figures) = get_config(), FAMILIES[name]
    assert create_from_config(config, 1000) == create_model(name, dtype=jnp.bfloat16)
    optim = config.optim
    peak = optim.lr_per_512 * config.batch_size / 512
    assert (peak, optim.warmup_epochs, optim.weight_decay, optim.clip_norm) == figures
    assert config == get_config(f"recipe={recipe}")
    assert config.data.test_crop == variant(name).test_crop

    recursive = create_from_config(get_config("loops=2,nll"), 1000)
    assert (recursive.loops, recursive.nll_ratio, recursive.nll_every) == (2, 1.0, 1)
    sliced = "groups=9-4-1" if name == "pit_s" else "groups=4"
    if not recursive.why_unsliced:
        model = create_from_config(get_config(f"loops=2,{sliced}"), 1000)
        assert model.groups[0] == ((9, 1) if name == "pit_s" else (4, 1))
        assert create_from_config(get_config("unsliced"), 1000) == create_from_config(config, 1000)
    else:
        for arg in (sliced, "unsliced"):
            sentence = f"{name} cannot be sliced: .*; leave out {arg.partition('=')[0]}"
            with pytest.raises(ValueError, match=sentence):
                get_config(arg)
        with pytest.raises(ValueError, match=f"{name} cannot be sliced: .*; leave out sliced"):
            finetune.get_config(f"model={name},sliced")
    tuned = finetune.get_config(f"model={name}")
    assert create_from_config(tuned, 1000) == create_from_config(config, 1000)
    assert tuned.data.test_crop == config.data.test_crop


def test_nlls_that_are_published_are_no_argument_and_no_loops_are_refused():
    with pytest.raises(ValueError, match="sret_t has NLLs as published; leave out nll"):
        common.get_variant("sret_t", "nll")
    with pytest.raises(UserError, match="loops=0 must be a whole number of at least 1"):
        create_from_config(common.get_variant("sret_t", "loops=0"), 1000)


@pytest.mark.parametrize(("depth", "gmacs"), [("100", 4.865), ("1000", 5.589)])
def test_deep_models_have_their_applications_and_13_to_15_million_parameters(depth, gmacs):
    for module in (sret_deep, deep_digits):
        model = create_from_config(module.get_config(depth), num_classes=1000)
        assert sum(model.blocks) * model.loops > int(depth)
    model = create_from_config(sret_deep.get_config(f"{depth},recipe=none"), num_classes=1000)
    parameters = sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"]))
    assert 13e6 <= parameters <= 15e6
    assert model_macs(model) / 1e9 == pytest.approx(gmacs, rel=0.005)


@pytest.mark.parametrize("name", ["sret_t", "sret_lt"])
def test_distilling_is_the_published_recipe_and_wants_a_teacher(name):
    config = importlib.import_module(f"configs.{name}").get_config("distill,unsliced")
    assert config.distill.required and not config.teacher
    assert (config.distill.temperature, config.distill.hard_weight) == (1.0, 0.0)
    assert config.augment.mixup == common.DEIT_AUGMENT["mixup"]
    assert not common.get_variant(name, "").distill.required


def test_two_heads_are_distilled_as_deit_s_are():
    distill = common.get_variant("deit_tiny_distilled", "distill").distill
    assert (distill.kind, distill.hard_weight, distill.temperature) == ("hard", 0.5, 1.0)
    assert common.get_variant("deit_tiny_distilled", "").distill.kind == "soft"


@pytest.mark.parametrize("name", ["sret_t", "sret_lt", "sret_s"])
def test_stored_labels_are_learnt_of_several_crops_and_nothing_that_makes_them_untrue(name):
    config = importlib.import_module(f"configs.{name}").get_config("fkd,unsliced")
    assert config.distill.required and config.data.crops_per_image == 4
    assert config.optim.lr_per_512 == 1e-3
    assert {key: config.augment[key] for key in UNCHANGED} == UNCHANGED
    assert config.augment.repeats == 1
    for arg in ("fkd,distill", "fkd,recipe=deit"):
        with pytest.raises(ValueError, match="fkd is a recipe of its own; leave out"):
            common.get_variant(name, arg)


def test_the_digits_students_differ_in_their_labels_alone():
    names = ("hard", "soft", "stored")
    hard, soft, stored = (distill_digits.get_config(labels) for labels in names)
    assert soft.teacher and stored.data.soft_labels and not hard.teacher
    soft.update(teacher="", distill={"required": False})
    assert hard == soft
    stored.data.update(soft_labels="", crops_per_image=1)
    stored.augment.update(mixup=hard.augment.mixup, cutmix=hard.augment.cutmix)  # cannot be stored
    assert hard == stored
    for arg in ("", "hard,soft"):
        with pytest.raises(ValueError, match=f"argument '{arg}' must be hard, soft or stored"):
            distill_digits.get_config(arg)


def study_size(arm):
    """Parameters and MACs of an arm of the study of CIFAR-10."""
    model = create_from_config(study_cifar10.get_config(arm), num_classes=10)
    parameters = jax.tree.leaves(abstract_variables(model)["params"])
    return sum(p.size for p in parameters), model_macs(model)


def test_the_untied_twins_of_the_study_are_fair():
    parameters, macs = study_size("loops2")
    once, half = study_size("loops1")
    assert once == parameters and half < 0.6 * macs
    twin, same = study_size("untied_equal_flops")
    assert twin > 1.5 * parameters and same == pytest.approx(macs, rel=0.02)
    assert study_size("untied_equal_parameters")[0] == pytest.approx(parameters, rel=0.05)
    tied, macs = study_size("mixer_loops2")
    assert tied == study_size("mixer")[0]
    assert study_size("mixer_untied")[1] == pytest.approx(macs, rel=0.02)


def test_arms_of_the_study_differ_in_their_own_settings_alone():
    """The claims name arms, teachers have arms, and the argument "full" trains longer."""
    arms = study_cifar10.ARMS
    assert {arm for claim in study_cifar10.CLAIMS.values() for arm in claim.arms} == {
        *arms.keys() - {"teacher"}
    }
    usual = study_cifar10.get_config("loops1")
    for name, arm in arms.items():
        config = study_cifar10.get_config(name)
        assert arm.teacher in ("", *arms)
        assert bool(config.teacher or config.data.soft_labels) == bool(arm.teacher)
        config.update_from_flattened_dict({k: usual_value(usual, k) for k in arm.others})
        config.model = usual.model
        assert config == usual
    full = study_cifar10.get_config("loops1,full")
    assert full.epochs > 5 * usual.epochs and full.model == usual.model
    with pytest.raises(ValueError, match="unknown arm 'loops7'; did you mean"):
        study_cifar10.get_config("loops7")


def test_arms_of_the_laboratory_that_are_compared_are_of_equal_size():
    claims, arms = laboratory_cifar10.CLAIMS, laboratory_cifar10.ARMS
    assert {arm for claim in claims.values() for arm in claim.arms} == {*arms}
    models = {
        arm: create_from_config(laboratory_cifar10.get_config(arm), num_classes=10) for arm in arms
    }
    sizes = {
        arm: sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"]))
        for arm, model in models.items()
    }
    for arm in claims["adapters"].arms:
        assert sizes[arm] == pytest.approx(sizes["nll"], rel=0.005)
    for claim in ("loops", "exits", "backprop"):
        assert len({sizes[arm] for arm in claims[claim].arms}) == 1
    assert sizes["tied_lora"] < 0.8 * sizes["untied"]
    assert model_macs(models["tied_lora"]) == model_macs(models["untied"])
    with pytest.raises(ValueError, match="unknown arm 'fixd'; did you mean"):
        laboratory_cifar10.get_config("fixd")


def usual_value(config, name):
    for part in name.split("."):
        config = config[part]
    return config


@pytest.mark.parametrize("arg", ["", "10", "res=384", "1000 "])
def test_another_depth_is_refused_with_those_there_are(arg):
    for module in (sret_deep, deep_digits):
        with pytest.raises(ValueError, match=f"argument '{arg}' must be 100 or 1000"):
            module.get_config(arg)


@pytest.mark.parametrize(
    "name",
    [
        *("quickstart", "sret_t", "sret_lt", "sret_s", "sret_deep", "deep_digits"),
        *FAMILIES,
        *("distill_digits", "finetune", "finetune_digits", "study_cifar10", "laboratory_cifar10"),
    ],
)
def test_a_config_opens_with_what_it_trains_costs_and_reaches_and_the_command(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    for part in ("Costs:", "Should reach:", f"python main.py --config=configs/{name}.py"):
        assert part in doc


@pytest.mark.parametrize(
    ("arg", "name", "size"),
    [("384", "sret_s", 384), ("512", "sret_s", 512), ("384,model=sret_t", "sret_t", 384)],
)
def test_imagenet_is_fine_tuned_as_published(arg, name, size):
    config = finetune.get_config(arg)
    published = common.get_variant(name, f"unsliced,res={size}")
    assert create_from_config(config, 1000) == create_from_config(published, 1000)
    optim = config.optim
    assert optim.lr_per_512 * config.batch_size / 512 == optim.min_lr == 5e-6


def test_a_folder_is_fine_tuned_at_any_size_sliced_or_not():
    config = finetune.get_config("model=sret_lt,sliced,res=256")
    assert (config.model.name, config.model.image_size) == ("sret_lt", 256)
    assert config.model.groups is None
    assert config.data.name.startswith("/") and config.model.num_classes is None


def test_unknown_arguments_are_named_with_the_nearest():
    with pytest.raises(ValueError, match="'unslicd'; did you mean 'unsliced'?"):
        common.get_variant("sret_t", "unslicd")
    with pytest.raises(ValueError, match="should read 'res=VALUE'"):
        common.get_variant("sret_t", "res")
    with pytest.raises(ValueError, match="should read 'unsliced'"):
        common.get_variant("sret_t", "unsliced=yes")
    with pytest.raises(ValueError, match="unknown recipe 'diet'; did you mean 'deit'?"):
        common.get_variant("sret_t", "recipe=diet")


WORDS = st.sampled_from(
    ["unsliced", "res", "groups", "recipe", "=", ",", "-", "224", "none", "deit"]
)
ARGUMENTS = st.text(max_size=20) | st.lists(WORDS | st.text(max_size=3), max_size=8).map("".join)


@given(ARGUMENTS)
def test_whatever_the_arguments_there_are_settings_or_one_sentence(arg):
    try:
        config = common.get_variant("sret_t", arg)
    except ValueError as e:
        assert str(e) and "\n" not in str(e)
    else:
        assert isinstance(config.model.image_size, int)


@given(
    unsliced=st.booleans(),
    res=st.integers(),
    groups=st.text("0123456789-", max_size=9),
    recipe=st.text(st.characters(exclude_characters=",", codec="utf-8"), max_size=9),
)
def test_arguments_written_out_are_read_back(unsliced, **values):
    words = [f"{name}={value}" for name, value in values.items() if value != ""]
    arg = ",".join([*words, *(["unsliced"] if unsliced else [])])
    read = common.parse_arg(arg, unsliced=False, res=224, groups="", recipe="")
    assert read.to_dict() == {"unsliced": unsliced, **values}


@pytest.mark.parametrize("arg", ["groups=1\nx", "groups=1\nx,unsliced", "groups=" + "9" * 5000])
def test_a_value_is_quoted_in_the_sentence_on_it(arg):
    with pytest.raises(ValueError, match=r"^.*groups='.*(should read like|exclude each other)"):
        common.get_variant("sret_t", arg)
