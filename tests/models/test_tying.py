"""Untied models made recursive and back, without training."""

import functools

import jax
import numpy as np
import pytest

import sret_jax
from sret_jax.models.apply import evaluation_logits
from sret_jax.models.tying import other_turns, tied, untied
from sret_jax.models.variables import abstract_variables
from tests import timm_models
from tests.explicit import distinct_weights
from tests.timm_models import images, needs_timm, timm_model

DEIT = dict(num_classes=5, image_size=16, blocks=(4,), heads=(2,), dim=4, patch_size=8)
ADAPTED = ("lora:2", "norms", "biases@2")


def deit(**settings):
    return sret_jax.create_model("deit_tiny", **{**DEIT, **settings})


def weights(model):
    return jax.tree.map(np.float32, distinct_weights(model))


def logits(*models_and_weights):
    """The logits of each model, compiled as one program."""

    @jax.jit
    def compute(trees, x):
        models = [model for model, _ in models_and_weights]
        return [evaluation_logits(m, v, x) for m, v in zip(models, trees, strict=True)]

    x = images(models_and_weights[0][0].image_size).astype(np.float32)
    return compute([tree for _, tree in models_and_weights], x)


def shapes(tree):
    return jax.tree.map(np.shape, tree)


def test_with_lora_of_full_rank_the_function_is_the_same_and_with_less_it_is_not():
    model = deit()
    variables = weights(model)
    found = [(model, variables)]
    for start, rank in (("average", 8), ("first", 8), ("stepwise", 1)):
        found.append(tied(model, variables, 2, start=start, rank=rank))
        assert shapes(found[-1][1]) == shapes(abstract_variables(found[-1][0]))
    expected, average, first, low = logits(*found)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(average, expected, rtol=0, atol=1e-5 * largest)
    np.testing.assert_allclose(first, expected, rtol=0, atol=1e-5 * largest)
    assert np.abs(low - expected).max() > 1e-2 * largest


@pytest.mark.parametrize(
    ("start", "blocks"), [("first", [[0], [3]]), ("average", [[0, 1, 2], [3, 4, 5]])]
)
def test_a_shared_block_starts_as_the_first_of_its_layers_or_as_their_mean(start, blocks):
    model = deit(blocks=(6,))
    variables = weights(model)
    new, changed = tied(model, variables, 3, start=start)
    assert (new.blocks, new.loops, new.adapters) == ((2,), 3, ())
    params = variables["params"]
    for b, layers in enumerate(blocks):
        trees = [params[f"stage0_block{layer}"] for layer in layers]
        mean = jax.tree.map(lambda *x: np.mean(x, 0), *trees)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6),
            changed["params"][f"stage0_block{b}"],
            mean,
        )
    np.testing.assert_array_equal(changed["params"]["pos_embed"], params["pos_embed"])


def test_stepwise_takes_layers_at_equal_distances_from_the_first_to_the_last():
    model = deit(blocks=(12,))
    variables = weights(model)
    for layer in range(12):
        variables["params"][f"stage0_block{layer}"]["block"]["norm1"]["bias"][:] = layer
    for loops, chosen in ((2, [0, 2, 4, 7, 9, 11]), (4, [0, 6, 11]), (12, [0])):
        _, changed = tied(model, variables, loops, start="stepwise")
        found = [
            changed["params"][f"stage0_block{b}"]["block"]["norm1"]["bias"][0]
            for b in range(12 // loops)
        ]
        assert found == chosen


def test_lora_is_the_best_approximation_of_its_rank():
    model = deit(blocks=(2,))
    variables = weights(model)
    _, changed = tied(model, variables, 2, start="average", rank=3)
    params, part = variables["params"], changed["params"]["stage0_block0"]
    rows = part["lora"]["mlp"]["fc1"]
    for n in range(2):
        kernel = params[f"stage0_block{n}"]["block"]["mlp"]["fc1"]["kernel"]
        difference = kernel - part["block"]["mlp"]["fc1"]["kernel"]
        error = difference - rows["down"]["kernel"][n] @ rows["up"]["kernel"][n]
        left = np.linalg.svd(difference, compute_uv=False)[3:]
        assert np.linalg.norm(error) == pytest.approx(np.linalg.norm(left), rel=1e-4)


MODELS = {
    "sret_t": dict(
        image_size=16, blocks=(1,), heads=(2,), dim=4, groups=None, loops=2, adapters=ADAPTED
    ),
    "swin_tiny": dict(
        image_size=32, blocks=(2,), heads=(2,), dim=4, window=4, loops=3, adapters=ADAPTED
    ),
    "mixer_s16": dict(image_size=16, blocks=(2,), width=8, patch_size=8, loops=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_untied_model_has_the_same_logits_and_becomes_the_recursive_one_again(name):
    model = sret_jax.create_model(name, num_classes=5, **MODELS[name])
    variables = weights(model)
    plain, layers = untied(model, variables)
    assert plain.loops == 1 and plain.adapters == ()
    assert plain.blocks == tuple(model.loops * n for n in model.blocks)
    assert shapes(layers) == shapes(abstract_variables(plain))
    expected, found = logits((model, variables), (plain, layers))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    back, again = tied(plain, layers, model.loops, start="first")
    assert back == model.clone(adapters=())
    if not model.adapters:
        jax.tree.map(np.testing.assert_array_equal, again, variables)


@needs_timm
def test_timm_reads_an_unrolled_deit_and_computes_the_same(tmp_path):
    import torch

    model = deit(blocks=(2,), loops=2, adapters=ADAPTED)
    variables = weights(model)
    plain, layers = untied(model, variables)
    sizes = dict(img_size=16, patch_size=8, embed_dim=8, depth=4, num_heads=2, num_classes=5)
    theirs = timm_model("deit_tiny_patch16_224", **sizes)
    arrays = sret_jax.to_torch(layers, plain)
    theirs.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in arrays.items()})
    (ours,) = logits((model, variables))
    x = torch.from_numpy(images(16).astype(np.float32).transpose(0, 3, 1, 2))
    with torch.no_grad():
        timm_models.assert_close(ours, theirs(x).numpy(), "logits")


def test_swin_blocks_that_would_shift_otherwise_are_named():
    untied_swin = sret_jax.create_model(
        "swin_tiny", image_size=32, window=4, blocks=(4,), heads=(2,)
    )
    recursive = untied_swin.clone(blocks=(2,), loops=2)
    (first, _) = other_turns(recursive, untied_swin)
    assert first.startswith("application 1 of block 2 in stage 1 cuts its attention into other")
    with pytest.raises(ValueError, match="no untied model is the same function: application 1"):
        untied(recursive, {"params": abstract_variables(recursive)["params"]})


@pytest.mark.parametrize(
    ("change", "settings", "sentence"),
    [
        (functools.partial(tied, loops=3, start="first"), {}, r"use one of \[2, 4\]"),
        (functools.partial(tied, loops=1, start="first"), {}, "loops=1 must be at least 2"),
        (functools.partial(tied, loops=2, start="last"), {}, "unknown init 'last'"),
        (functools.partial(tied, loops=2, start="first"), dict(loops=2), "has loops=2 and"),
        (functools.partial(tied, loops=2, start="first", rank=9), {}, "use at most 8"),
        (untied, dict(loops=2, adapters=("embedding",)), "'embedding' changes the input of blocks"),
        (untied, dict(loops=2, nll_ratio=1.0, nll_every=2), "nll_every=2 an NLL follows some"),
        (untied, dict(loops=2, groups=((2, 4),)), "application 2 of block 1 in stage 1 cuts"),
    ],
)
def test_what_cannot_be_is_one_sentence(change, settings, sentence):
    model = deit(**settings)
    with pytest.raises(ValueError, match=sentence):
        change(model, abstract_variables(model))
