"""Adapters at their start, at other loops, their costs and messages; families' tests apply them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import sret_jax
from sret_jax.models.adapter_costs import adapter_costs, in_words
from sret_jax.models.adapters import Biases
from sret_jax.models.flops import exit_macs, model_macs
from sret_jax.models.recursion import REMAT
from sret_jax.models.variables import abstract_variables
from sret_jax.training.optimizer import decay_mask
from tests.explicit import distinct_weights
from tests.timm_models import images

ALL = ("lora:2", "norms@2", "biases", "embedding", "inject:linear")
TINY = dict(num_classes=5, image_size=16, loops=3)
FAMILIES = {
    "sret_t": dict(blocks=(1,), heads=(2,), dim=8, groups=((2, 1),)),
    "deit_tiny": dict(blocks=(1,), heads=(2,), dim=8, patch_size=8),
    "pit_ti": dict(blocks=(1,), heads=(2,), dim=8, patch_size=8),
    "swin_tiny": dict(blocks=(1,), heads=(2,), dim=8, window=2),
    "mixer_s16": dict(blocks=(1,), width=16, patch_size=8, token_ratio=1.0),
}


def tiny(name="deit_tiny", **settings):
    return sret_jax.create_model(name, **{**TINY, **FAMILIES[name], **settings})


IN_DEFAULT_SUITE = "deit_tiny"
OTHERS = [
    pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES if name != IN_DEFAULT_SUITE
]


@pytest.mark.parametrize("name", [IN_DEFAULT_SUITE, *OTHERS])
def test_new_adapters_change_neither_the_initial_weights_nor_the_function(name):
    x = images(16).astype(np.float32)
    plain, adapted = tiny(name), tiny(name, adapters=ALL)

    @jax.jit
    def both(key):
        found = []
        for model in (plain, adapted):
            variables = model.init(key, x)
            found.append((variables, model.apply(variables, x)))
        return found

    (before, expected), (after, logits) = both(jax.random.key(0))
    after = flatten_dict(after)
    for path, leaf in flatten_dict(before).items():
        np.testing.assert_array_equal(after.pop(path), leaf, err_msg="/".join(path))
    assert {path[2] for path in after} == {"lora", "norms", "biases", "embedding", "inject"}
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)
    assert np.ptp(expected) > 0 or name == "mixer_s16"  # its head starts at 0


def test_kernels_compute_the_block_with_the_weights_that_each_application_sees():
    model = tiny(adapters=("lora:2", "norms", "biases"))
    variables = jax.tree.map(np.float32, distinct_weights(model))
    fused = model.clone(attention="pallas", mlp="pallas")  # interpreted where there is no TPU
    x = images(16).astype(np.float32)
    expected, found = jax.jit(lambda v, x: [m.apply(v, x) for m in (model, fused)])(variables, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize(("loops", "chosen"), [(1, [0]), (3, [0, 0, 1]), (6, [0, 0, 1, 1, 1, 1])])
def test_other_loops_keep_the_first_rows_and_repeat_the_last(loops, chosen):
    model = tiny(adapters=("embedding@2", "norms"))
    params = abstract_variables(model)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), params)
    new, changed = sret_jax.with_loops(model, {"params": params}, loops)
    before, after = (p["stage0_block0"] for p in (params, changed["params"]))
    assert after["embedding"]["bias"].shape == (-(-loops // 2), 16)
    by_loop = jnp.repeat(after["embedding"]["bias"], 2, 0)[:loops]
    np.testing.assert_array_equal(by_loop, before["embedding"]["bias"][jnp.array(chosen)])
    norms = jnp.minimum(jnp.arange(loops), 2)
    for name in ("scale", "bias"):
        np.testing.assert_array_equal(
            after["norms"]["norm2"][name], before["norms"]["norm2"][name][norms]
        )
    assert jax.tree.map(jnp.shape, changed) == jax.tree.map(jnp.shape, abstract_variables(new))


def test_lora_adapts_the_maps_that_are_named():
    rows = abstract_variables(tiny(adapters=("lora:2:qkv+mlp/fc1@2",)))["params"]["stage0_block0"]
    shapes = {"/".join(path): leaf.shape for path, leaf in flatten_dict(rows["lora"]).items()}
    assert shapes == {
        "attn/qkv/down/kernel": (2, 16, 2),
        "attn/qkv/up/kernel": (2, 2, 48),
        "mlp/fc1/down/kernel": (2, 16, 2),
        "mlp/fc1/up/kernel": (2, 2, 64),
    }


def test_of_adapters_only_kernels_decay():
    params = abstract_variables(tiny(adapters=ALL))["params"]["stage0_block0"]
    decays = decay_mask({name: params[name] for name in params if name != "block"})
    assert all(jax.tree.leaves([decays["lora"], decays["inject"]]))
    assert not any(jax.tree.leaves([decays["norms"], decays["biases"], decays["embedding"]]))


def test_an_image_costs_what_is_done_for_each_image_and_a_batch_what_is_done_once():
    plain, adapted = tiny(), tiny(adapters=("lora:2", "inject:linear"))
    tokens, width, loops = 5, 16, 3
    assert model_macs(adapted) - model_macs(plain) == loops * tokens * width**2
    maps = [(16, 48), (16, 16), (16, 64), (64, 16)]
    assert exit_macs(adapted)[0] == model_macs(adapted.clone(loops=1))
    costs = adapter_costs(adapted)
    assert costs["gmacs_per_batch"] == pytest.approx(1e-9 * loops * sum(2 * a * b for a, b in maps))
    lora = loops * sum(2 * (a + b) for a, b in maps)
    assert costs["parameters"] == {"lora:2": lora, "inject:linear": loops * width**2}
    assert in_words(costs).startswith(f"lora:2 {lora:,}, inject:linear 768 parameters; adding LoRA")
    assert "once" not in in_words(adapter_costs(tiny(adapters=("norms",))))
    assert adapter_costs(plain) == {} and in_words({}) == ""


@pytest.mark.parametrize(
    "remat", [REMAT[0], *(pytest.param(name, marks=pytest.mark.slow) for name in REMAT[1:])]
)
def test_the_program_with_adapters_does_not_grow_with_loops(remat):
    def length(loops):
        model = tiny(loops=loops, adapters=ALL, remat=remat)
        grad = jax.grad(lambda v, x: model.apply(v, x).sum())
        return len(jax.jit(grad).lower(abstract_variables(model), images(16)).as_text())

    assert length(1000) <= 1.3 * length(8)


@pytest.mark.parametrize(
    ("adapters", "sentence"),
    [
        (("lor:8",), "unknown adapter 'lor'; did you mean 'lora'?"),
        (("lora",), "'lora' needs a rank of at least 1, as in lora:8"),
        (("lora:0",), "'lora:0' needs a rank of at least 1"),
        (("lora:17",), "has rank 17, but attn/.* has 16 inputs and .* outputs; use at most 16"),
        (("lora:2:qvk",), "'lora:2:qvk' has an unknown linear map 'qvk'; did you mean 'attn/qkv'"),
        (("norms:3",), "'norms:3' takes no argument '3'"),
        (("norms@0",), "'norms@0' needs a number of loops of at least 1 after @"),
        (("inject",), "'inject' must be inject:add or inject:linear"),
        (("lora:2", "lora:4:qkv"), "has lora twice; a block takes one"),
        ("norms", r"adapters='norms' must be a tuple of names, such as \('lora:8', 'norms'\)"),
        ((8,), r"adapters=\(8,\) must be a tuple of names"),
    ],
)
def test_an_adapter_that_cannot_be_is_one_sentence(adapters, sentence):
    with pytest.raises(ValueError, match=sentence):
        tiny(adapters=adapters)


def test_an_adapter_of_a_layer_that_the_family_lacks_is_one_sentence():
    with pytest.raises(ValueError, match="unknown linear map 'qkv'.*mlp_tokens/fc1"):
        tiny("mixer_s16", adapters=("lora:2:qkv",))
    with pytest.raises(ValueError, match="finds nothing in the block"):
        Biases().check({("fc", "kernel"): jax.ShapeDtypeStruct((2, 2), "float32")})


def test_the_adapters_are_listed():
    assert sret_jax.list_adapters()[:2] == ["lora:RANK or :RANK:MAP+MAP", "norms"]
