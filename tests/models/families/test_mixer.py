from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.flops import model_macs
from sret_jax.models.inspection import residual_coefficients
from sret_jax.models.kernel_use import in_words, kernel_uses
from sret_jax.models.position import with_image_size
from tests import timm_models
from tests.explicit import check_recursion, distinct_weights
from tests.timm_models import check_parity, images, needs_timm

TINY = dict(num_classes=5, image_size=32, patch_size=8, width=16, blocks=(2,), drop_path_rate=0.0)


def tiny(**overrides):
    return sret_jax.create_model("mixer_s16", **{**TINY, **overrides})


@needs_timm
def test_the_untied_form_is_timms_function():
    sizes = dict(num_classes=5, img_size=32, patch_size=8, embed_dim=16, num_blocks=2)
    theirs = timm_models.with_random_weights(
        timm_models.import_timm().models.mlp_mixer.MlpMixer(**sizes)
    )
    check_parity(theirs, tiny())
    shapes = {name: array.shape for name, array in timm_models.state_dict(theirs).items()}
    assert type(tiny()).sizes(shapes) == dict(num_classes=5, image_size=32)


@needs_timm
@pytest.mark.slow  # the published sizes
@pytest.mark.parametrize("name", ["mixer_s16", "mixer_b16"])
def test_published_models_are_timms_functions(name):
    model = sret_jax.create_model(name, drop_path_rate=0.0)
    check_parity(timm_models.timm_model(f"{name}_224"), model)


@needs_timm
@pytest.mark.parametrize(
    ("name", "published"),
    [("mixer_s16", 18_528_264), pytest.param("mixer_b16", 59_880_472, marks=pytest.mark.slow)],
)
def test_parameters_and_macs_are_those_of_timm(name, published):
    model = sret_jax.create_model(name)
    assert timm_models.parameters(model) == published
    assert model_macs(model) == timm_models.macs(f"{name}_224")


def test_the_recursive_form_is_applications_of_the_same_block_in_values_and_gradients():
    settings = dict(loops=3, nll_ratio=0.5, nll_every=2, residual="learned", blocks=(1,))
    with jax.enable_x64(True):
        model = tiny(**settings, dtype=jnp.float64)
        check_recursion(model)
    variables = distinct_weights(model)
    assert len(residual_coefficients(model, variables)["MLP over tokens, skip"]) == 3
    with pytest.raises(ValueError, match=r"Mixer with nll_ratio=0.5.* no published names"):
        sret_jax.to_torch(variables, model)


def test_a_mixer_with_tied_blocks_is_a_deeper_published_one_with_equal_blocks():
    tied, untied = tiny(loops=2), tiny(blocks=(4,))
    variables = distinct_weights(tied)
    unrolled = sret_jax.from_torch(sret_jax.to_torch(variables, tied), untied)
    logits = jax.jit(lambda v, w, x: (tied.apply(v, x), untied.apply(w, x)))
    np.testing.assert_allclose(*logits(variables, unrolled, images(32)), rtol=1e-4, atol=1e-4)
    sret_jax.from_torch(sret_jax.to_torch(unrolled, untied), tied)  # the copies are equal


def test_parameters_start_as_timms():
    params = jax.jit(tiny(width=64).init)(jax.random.key(0), images(32, batch=1))["params"]
    assert not np.any(params["head"]["kernel"]) and not np.any(params["head"]["bias"])
    block = params["stage0_block0"]["block"]
    for mlp, inputs, hidden in (("mlp_tokens", 16, 32), ("mlp", 64, 256)):
        for layer in ("fc1", "fc2"):
            kernel, bias = block[mlp][layer]["kernel"], block[mlp][layer]["bias"]
            bound = np.sqrt(6 / (inputs + hidden))
            assert 0.95 * bound < np.abs(kernel).max() <= bound
            assert 0 < np.abs(bias).max() < 1e-5
    assert np.std(params["stem"]["kernel"]) == pytest.approx(1 / np.sqrt(3 * 64), rel=0.05)
    assert not np.any(params["stem"]["bias"])


def test_a_mixer_changes_neither_its_image_size_nor_attends_in_groups():
    model = tiny()
    with pytest.raises(ValueError, match="made for the 16 tokens of 32 pixels.*leave image_size"):
        with_image_size(model, distinct_weights(model), 64)
    with pytest.raises(ValueError, match="cannot be sliced into groups: its blocks mix tokens by"):
        tiny(groups=((2,),))
    with pytest.raises(ValueError, match="blocks=.* must have one entry: a Mixer has one stage"):
        tiny(blocks=(2, 2))
    with pytest.raises(ValueError, match="token_ratio=0.01 leaves no hidden unit"):
        tiny(token_ratio=0.01)


def test_the_mlps_over_tokens_are_named_among_what_no_kernel_computes():
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5e")
    model = sret_jax.create_model("mixer_s16", dtype=jnp.bfloat16)
    (line,) = in_words(kernel_uses(model, tpu))
    assert "MLP over tokens by XLA (no kernel computes it)" in line
