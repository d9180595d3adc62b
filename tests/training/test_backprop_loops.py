"""Gradients through the last loops of each block only."""

import jax
import jax.numpy as jnp
import pytest

import sret_jax
from configs import common
from sret_jax.errors import UserError
from sret_jax.models.apply import training_logits
from sret_jax.training.backprop_loops import check_backprop_loops, lost_gradients
from sret_jax.training.train_loops import make_train_loops

SIZES = dict(num_classes=10, image_size=16, patch_size=8, heads=(2,), dim=8, mlp_ratio=1.0)
MODEL = sret_jax.create_model("deit_tiny", blocks=(2,), loops=3, **SIZES)


@pytest.fixture
def train_loops():
    return make_train_loops(common.get_config().recursion, MODEL)


@pytest.mark.parametrize(
    ("k", "frozen", "sentence"),
    [
        (0, False, "backprop_loops=0 must be from 1 to 3, the most loops of a training step"),
        (4, False, "backprop_loops=4 must be from 1 to 3"),
        (1, True, "backprop_loops=1 has no effect with config.optim.freeze_backbone=True"),
    ],
)
def test_gradients_pass_through_one_to_all_loops(k, frozen, sentence, train_loops):
    config = common.get_config()
    config.recursion.backprop_loops = k
    config.optim.freeze_backbone = frozen
    with pytest.raises(UserError, match=sentence):
        check_backprop_loops(config, train_loops, exits=())


def test_an_exit_with_a_loss_must_come_where_there_is_a_gradient(train_loops):
    config = common.get_config()
    config.recursion.backprop_loops = 1
    with pytest.raises(
        UserError, match="exit 2 a loss, but only the last 1 of 3 .*backprop_loops=2, or exits"
    ):
        check_backprop_loops(config, train_loops, exits=[2])
    config.recursion.backprop_loops = 2
    check_backprop_loops(config, train_loops, exits=[2])


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ((), ["cls_token", "patch_embed", "pos_embed", "stage0_block0"]),
        (("inject:add",), []),  # carries the gradient to the input of a block
    ],
)
def test_the_parameters_that_are_said_to_have_no_gradient_have_none(adapters, expected):
    model = MODEL.clone(backprop_loops=1, adapters=adapters)
    images = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    params = jax.jit(model.init)(jax.random.key(1), images)["params"]
    params = jax.tree.map(lambda p: p + 0.1, params)  # new adapters are 0 and pass no gradient

    @jax.jit
    @jax.grad
    def gradients(params):
        (logits,), _ = training_logits(model, {"params": params}, images, jax.random.key(2))
        return jnp.sum(logits**2)

    found = gradients(params)
    without = [name for name in params if not any(jnp.any(g) for g in jax.tree.leaves(found[name]))]
    assert sorted(without) == expected
    sentence = lost_gradients(model, params, 1, most=3)
    lost = sum(x.size for name in without for x in jax.tree.leaves(params[name]))
    assert (
        f"stops in stage0_block1: in them, the parts before it have no gradient, {lost:,} of"
        in sentence
    ) == bool(expected)
    assert all(name in sentence for name in without)
    assert lost_gradients(model, params, 1, most=1) == lost_gradients(model, params, None, 3) == ""
