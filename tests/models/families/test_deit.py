"""DeiT against timm's modules, and its recursive form against explicit applications."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import sret_jax
from sret_jax.errors import UserError
from sret_jax.models.flops import model_macs
from sret_jax.models.registry import variant
from tests import timm_models
from tests.explicit import check_recursion
from tests.timm_models import check_parity, needs_timm, timm_model

TINY = dict(num_classes=10, image_size=32, blocks=(2,), heads=(2,), dim=8, patch_size=8)
PUBLISHED = {  # parameters, as timm counts them
    ("deit_tiny", 224): 5_717_416,
    ("deit_small", 224): 22_050_664,
    ("deit_base", 224): 86_567_656,
    ("deit_base", 384): 86_859_496,
    ("deit_tiny_distilled", 224): 5_910_800,
    ("deit_small_distilled", 224): 22_436_432,
    ("deit_base_distilled", 224): 87_338_192,
    ("deit_base_distilled", 384): 87_630_032,
}


def tiny(name="deit_tiny", **overrides):
    return sret_jax.create_model(name, **{**TINY, "drop_path_rate": 0.0, **overrides})


def of_timm(name, size=224):
    return f"{name}_patch16_{size}"


def timm_tiny(name):
    sizes = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=10)
    return timm_model(of_timm(name), **sizes)


@needs_timm
@pytest.mark.parametrize("name", ["deit_tiny", "deit_tiny_distilled"])
def test_a_tiny_deit_is_that_of_timm(name):
    theirs = timm_tiny(name)
    if name.endswith("distilled"):
        theirs.set_distilled_training(True)
    check_parity(theirs, tiny(name))


@needs_timm
@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(*key, marks=[] if key[0] == "deit_tiny_distilled" else pytest.mark.slow)
        for key in PUBLISHED
    ],
)
def test_parameters_and_macs_are_those_of_timm(name, size):
    model = sret_jax.create_model(name, image_size=size)
    assert timm_models.parameters(model) == PUBLISHED[name, size]
    assert model_macs(model) == timm_models.macs(of_timm(name, size))


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_published_sizes_are_those_of_timm(name, size):
    theirs = timm_model(of_timm(name, size))
    if name.endswith("distilled"):
        theirs.set_distilled_training(True)
    check_parity(theirs, sret_jax.create_model(name, image_size=size, drop_path_rate=0.0))


def test_the_recursive_form_applies_one_block_and_its_adapters_in_values_and_gradients():
    with jax.enable_x64(True):
        check_recursion(
            tiny(
                "deit_tiny_distilled",
                blocks=(1,),
                loops=3,
                nll_ratio=1.0,
                adapters=("lora:2@2", "norms", "biases@3", "embedding@2", "inject:linear"),
                residual="learned",
                groups=((2, 4),),
                dtype=np.float64,
            )
        )


@needs_timm
def test_files_of_timm_load_and_their_positions_are_resized_as_deit_does(tmp_path):
    import torch

    theirs = timm_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=7)
    arrays = timm_models.state_dict(theirs)
    torch.save({"model": theirs.state_dict()}, tmp_path / "w.pth")
    save_file(arrays, tmp_path / "w.safetensors")
    for file in ("w.pth", "w.safetensors"):
        model, variables = sret_jax.load(tmp_path / file)
        assert model == sret_jax.create_model("deit_tiny_distilled", num_classes=7, image_size=64)
        back = sret_jax.to_torch(variables, model)
        assert all(np.array_equal(back[name], arrays[name]) for name in arrays)

    larger, resized = sret_jax.load(tmp_path / "w.safetensors", image_size=112)
    assert larger == model.clone(image_size=112)
    # DeiT's main.py: class and distillation tokens stay, the 4x4 grid becomes 7x7.
    position = theirs.pos_embed.detach()
    grid = position[:, 2:].reshape(1, 4, 4, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=(7, 7), mode="bicubic", align_corners=False)
    expected = torch.cat([position[:, :2], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)
    np.testing.assert_allclose(resized["params"]["pos_embed"], expected, atol=1e-5)


@needs_timm
def test_a_vit_that_averages_its_tokens_is_refused(tmp_path):
    theirs = timm_model("deit_tiny_patch16_224", global_pool="avg", img_size=32, num_classes=7)
    save_file(timm_models.state_dict(theirs), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="deit_tiny is the nearest: missing norm.weight.*fc_norm"):
        sret_jax.load(tmp_path / "w.safetensors")


@needs_timm
def test_the_variants_name_the_weights_of_timm_and_their_view():
    for name, size in PUBLISHED:
        published = variant(name, size)
        config = timm_models.import_timm().get_pretrained_cfg(of_timm(name, size))
        assert config.hf_hub_id == f"timm/{published.hub}"
        assert config.crop_pct == published.test_crop
        model = sret_jax.create_model(name, image_size=size)
        assert (config.mean, config.std) == (model.mean, model.std)
    assert variant("deit_base", 384).settings == variant("deit_base").settings


def test_sizes_that_do_not_fit_are_named():
    for change, sentence in [
        (dict(image_size=30), "image_size=30 is not divisible by 8"),
        (dict(blocks=(1, 1), heads=(2, 2), groups=None), "DeiT has one"),
        (dict(patch_size=0), "patch_size=0 must be a whole number"),
        (dict(groups=((3,),)), "16 tokens at image_size=32, which 3 groups do not divide"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            tiny(**change)
    with pytest.raises(ValueError, match="no published names"):
        next(tiny(nll_ratio=1.0).torch_entries())
