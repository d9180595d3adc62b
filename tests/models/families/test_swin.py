"""Swin against timm's modules, and its recursive form against explicit applications."""

import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import sret_jax
from sret_jax.models.apply import evaluation_logits
from sret_jax.models.families.swin import Swin
from sret_jax.models.flops import model_macs
from sret_jax.models.kernel_use import in_words, kernel_uses
from sret_jax.models.variables import abstract_variables
from tests import timm_models
from tests.explicit import check_recursion, distinct_weights
from tests.timm_models import check_parity, needs_timm, timm_model

TINY = dict(num_classes=5, image_size=32, window=4, blocks=(2,), heads=(2,), dim=4)
PUBLISHED = {  # parameters, as timm counts them
    ("swin_tiny", 224): 28_288_354,
    ("swin_small", 224): 49_606_258,
    ("swin_base", 224): 87_768_224,
    ("swin_base", 384): 87_903_584,
}


def tiny(**overrides):
    return sret_jax.create_model("swin_tiny", **{**TINY, "drop_path_rate": 0.0, **overrides})


def of_timm(name, size):
    return f"{name}_patch4_window{size // 32}_{size}"


def timm_tiny(model):
    return timm_model(
        of_timm("swin_tiny", 224),
        img_size=model.image_size,
        window_size=model.window,
        depths=model.blocks,
        num_heads=model.heads,
        embed_dim=model.stages[0].width,
        num_classes=model.num_classes,
        drop_path_rate=0.0,
    )


@needs_timm
def test_a_tiny_swin_is_that_of_timm():
    # Grids of 9, 5, 3 and 2: one is cut, one padded and cut, one a window, one smaller than it.
    model = tiny(image_size=36, window=3, blocks=(2, 2, 1, 1), heads=(1, 2, 4, 8))
    check_parity(timm_tiny(model), model)


def published(name, size):
    return sret_jax.create_model(name, image_size=size, window=size // 32, drop_path_rate=0.0)


@needs_timm
@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(*key, marks=[] if key[0] == "swin_tiny" else pytest.mark.slow)
        for key in PUBLISHED
    ],
)
def test_parameters_and_macs_are_those_of_timm(name, size):
    model = published(name, size)
    assert timm_models.parameters(model) == PUBLISHED[name, size]
    assert model_macs(model) == timm_models.macs(of_timm(name, size))


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_published_sizes_are_those_of_timm(name, size):
    check_parity(timm_model(of_timm(name, size), drop_path_rate=0.0), published(name, size))


@pytest.mark.slow  # compiles three applications of each of two blocks one by one
def test_a_recursive_block_shifts_in_every_second_application_in_values_and_gradients():
    with jax.enable_x64(True):
        changes = dict(nll_ratio=1.0, adapters=("biases", "inject:add"), residual="learned")
        check_recursion(tiny(loops=3, **changes, dtype=np.float64))


@needs_timm
def test_three_applications_of_two_blocks_are_a_swin_of_six_blocks():
    import torch

    model = tiny(loops=3)
    theirs = timm_tiny(tiny(blocks=(6,)))
    variables = distinct_weights(model)
    state = sret_jax.to_torch(variables, model)
    theirs.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in state.items()})
    x = timm_models.images(32).astype(np.float32)
    logits = jax.jit(functools.partial(evaluation_logits, model))(variables, x)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
    timm_models.assert_close(logits, expected, "logits")

    with pytest.raises(ValueError, match="loops=2 has no published names.* the same shift"):
        sret_jax.to_torch(distinct_weights(tiny(loops=2)), tiny(loops=2))


def microsofts(state_dict):
    """timm's state dict under the names and with the buffers of Microsoft's files."""
    old = {"layers.0.blocks.1.attn_mask": np.zeros((4, 16, 16), np.float32)}
    for name, array in state_dict.items():
        stage = re.match(r"layers\.(\d)\.downsample", name)
        if stage:
            name = name.replace(stage[0], f"layers.{int(stage[1]) - 1}.downsample")
        old[name.replace("head.fc.", "head.")] = array
    return old


@needs_timm
def test_files_of_timm_and_of_microsoft_load_and_tables_are_resized_to_other_windows(tmp_path):
    theirs = timm_model(of_timm("swin_tiny", 224), num_classes=5)
    arrays = timm_models.state_dict(theirs)
    save_file(arrays, tmp_path / "timm.safetensors")
    save_file(microsofts(arrays), tmp_path / "microsoft.safetensors")
    model, variables = sret_jax.load(tmp_path / "timm.safetensors")
    assert model == sret_jax.create_model("swin_tiny", num_classes=5)
    _, same = sret_jax.load(tmp_path / "microsoft.safetensors")
    for a, b in zip(jax.tree.leaves(variables), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)

    larger, resized = sret_jax.load(tmp_path / "timm.safetensors", image_size=384, window=12)
    assert larger == sret_jax.create_model("swin_tiny", num_classes=5, image_size=384, window=12)
    theirs.set_input_size((384, 384), window_size=12)
    expected = timm_models.state_dict(theirs)
    for name, array in sret_jax.to_torch(resized, larger).items():
        np.testing.assert_allclose(array, expected[name], rtol=0, atol=1e-4, err_msg=name)


def test_arrays_show_windows_classes_and_the_smallest_image():
    for size, window in ((224, 7), (384, 12), (160, 7)):
        model = sret_jax.create_model(
            "swin_tiny", image_size=size, window=window, num_classes=3, blocks=(1,) * 4
        )
        expected = dict(num_classes=3, image_size=size, window=window)
        flat = jax.tree_util.tree_flatten_with_path(abstract_variables(model))[0]
        shapes = {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}
        assert Swin.sizes(shapes) == expected
        zeros = jax.tree.map(lambda leaf: np.zeros(leaf.shape), abstract_variables(model))
        arrays = sret_jax.to_torch(zeros, model)
        assert Swin.sizes({name: array.shape for name, array in arrays.items()}) == expected
    assert Swin.sizes({"layers.0.blocks.0.attn.qkv.bias": (3,)}) == {}


def test_sizes_that_do_not_fit_are_named():
    for change, sentence in [
        (dict(image_size=30), "image_size=30 is not divisible by 4, the side of a patch; use 28"),
        (dict(window=0), "window=0 must be a whole number"),
        (dict(heads=(1, 2)), "heads=.* has 2 entries but blocks"),
        (dict(mlp_ratio=0.01), "mlp_ratio=0.01 leaves no hidden unit"),
        (dict(groups=((2,),)), "cannot be sliced into groups: its blocks attend inside windows"),
        (dict(loops=40, nll_ratio=1.0, nll_every=9), "repeats only every 18 applications"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            tiny(**change)
    with pytest.raises(ValueError, match="no published names"):
        next(tiny(nll_ratio=1.0).torch_entries())


def test_a_swin_says_where_its_windows_run_as_a_kernel():
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5e")
    *most, last = in_words(kernel_uses(published("swin_tiny", 224).clone(dtype=jnp.bfloat16), tpu))
    kernels = "attention in windows, attention in shifted windows, MLP by a kernel"
    assert [line.split(": ")[1] for line in most] == 3 * [kernels]
    assert "768 channels): attention in windows by a kernel; MLP by XLA (too large" in last
    first, *_ = in_words(kernel_uses(published("swin_base", 384).clone(dtype=jnp.bfloat16), tpu))
    assert "attention in windows, attention in shifted windows by XLA (too large" in first
