import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from configs import common
from sret_jax.models.registry import FAMILIES
from sret_jax.training.optimizer import decay_mask, layer_factor, make_optimizer
from tests.timm_models import import_timm, needs_timm


def timm_names(family):
    """The names of a family's members that timm has, here and in timm."""
    names = {name: v.timm or v.hub.partition(".")[0] for name, v in family.variants.items()}
    return [(name, of_timm) for name, of_timm in names.items() if of_timm]


@pytest.fixture(scope="module")
def params():
    model = sret_jax.create_model("sret_t", num_classes=10, image_size=64)
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]


def test_only_kernels_decay(params):
    mask = jax.tree_util.tree_flatten_with_path(decay_mask(params))[0]
    for path, decays in mask:
        assert decays == (path[-1].key == "kernel")
    block = decay_mask(params)["stage0_block0"]
    assert block["nll"]["mlp"]["fc1"] == {"kernel": True, "bias": False}
    assert not any(jax.tree.leaves(block["block"]["attn_residual"]))


@needs_timm
@pytest.mark.parametrize("family", [family for family in FAMILIES if timm_names(family)])
def test_the_arrays_that_decay_are_those_that_decay_in_timm(family):
    name, of_timm = timm_names(family)[0]
    torch = pytest.importorskip("torch")
    with torch.device("meta"):
        theirs = import_timm().create_model(of_timm)
    spared = theirs.no_weight_decay() if hasattr(theirs, "no_weight_decay") else ()
    expected = {name for name, p in theirs.named_parameters() if p.ndim > 1 and name not in spared}
    entries = sret_jax.create_model(name).torch_entries()
    kernels = {entry.torch_name for entry in entries if entry.path[-1] == "kernel"}
    assert kernels == expected


def test_decay_is_decoupled_from_the_gradient():
    optim = common.get_config().optim
    optimizer = make_optimizer(optim)
    params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    direction, _ = optimizer.update(zeros, optimizer.init(params), params, weight_decay=0.05)
    np.testing.assert_allclose(direction["kernel"], 0.05 * 3, rtol=1e-5)
    np.testing.assert_allclose(direction["bias"], 0)


def test_clipping_bounds_the_global_norm_before_adam_sees_it():
    optim = common.get_config().optim
    optim.clip_norm = 1.0
    optimizer = make_optimizer(optim)
    params = {"kernel": jnp.zeros(4)}
    gradient = {"kernel": jnp.full(4, 100.0)}
    _, state = optimizer.update(gradient, optimizer.init(params), params, weight_decay=0.05)
    (first_moment,) = [
        s.mu["kernel"] for s in jax.tree.leaves(state, is_leaf=_has_mu) if _has_mu(s)
    ]
    np.testing.assert_allclose(first_moment, 0.1 * 0.5, rtol=1e-4)


def _has_mu(state):
    return hasattr(state, "mu")


def test_rates_fall_by_unique_block_from_the_head_down():
    parts = ["head", "norm", "pool1", "pos_embed", "stem"]
    parts += ["stage0_block0", "stage0_block1", *(f"stage1_block{b}" for b in range(11))]
    depth = {"head": 0, "norm": 0, "stage1_block10": 1, "stage1_block9": 2, "stage1_block0": 11}
    depth |= {"pool1": 11, "stage0_block1": 12, "stage0_block0": 13, "stem": 14, "pos_embed": 14}
    for part, k in depth.items():
        assert layer_factor(part, parts, layer_decay=0.5) == 0.5**k
        backbone = 1.0 if part == "head" else 0.1
        assert layer_factor(part, parts, layer_decay=0.5, backbone_lr=0.1) == 0.5**k * backbone


WEIGHTS = {part: {"kernel": jnp.ones(3)} for part in ("stem", "stage0_block0", "norm", "head")}


def first_direction(**changes):
    """The first step's direction for WEIGHTS with gradient 0.01, and Adam's state."""
    optim = common.get_config().optim
    optim.update(changes)
    optimizer = make_optimizer(optim)
    gradient = jax.tree.map(lambda p: 0.01 * p, WEIGHTS)
    return optimizer.update(gradient, optimizer.init(WEIGHTS), WEIGHTS, weight_decay=0.05)


def test_factors_multiply_the_direction_and_its_weight_decay():
    plain, _ = first_direction()
    scaled, _ = first_direction(layer_decay=0.9, backbone_lr=0.5)
    for part, factor in {"stem": 0.405, "stage0_block0": 0.45, "norm": 0.5, "head": 1.0}.items():
        expected = factor * plain[part]["kernel"]
        np.testing.assert_allclose(scaled[part]["kernel"], expected, rtol=1e-5)


def test_a_frozen_backbone_has_no_moments_and_no_direction():
    direction, state = first_direction(freeze_backbone=True)
    assert sum(x.size for x in jax.tree.leaves(state)) == 3 + 3 + 1  # m, v and the count
    np.testing.assert_allclose(direction.pop("head")["kernel"], 1.05, rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(direction))
