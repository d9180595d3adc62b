"""The losses of exits: their labels, their weights, and what they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sret_jax
from sret_jax.errors import UserError
from sret_jax.models.flops import count_macs
from sret_jax.models.model import Model
from sret_jax.models.variables import abstract_variables
from sret_jax.training.losses import LabelLoss
from sret_jax.training.mixed_depth import DEEP_ONLY, MixedDepth
from tests.explicit import distinct_weights
from tests.timm_models import images

# Two unique blocks and two heads: an exit is not the model with fewer loops.
MODEL = sret_jax.create_model(
    "deit_tiny_distilled",
    num_classes=5,
    image_size=16,
    patch_size=8,
    blocks=(2,),
    loops=3,
    heads=(2,),
    dim=4,
    drop_path_rate=0.0,
    dtype=np.float64,
)
TARGETS = {
    "hard": jax.nn.one_hot(np.array([1, 4]), 5),
    "soft": np.random.default_rng(0).dirichlet(np.ones(5), 2),
}
LOSS = LabelLoss(hard_weight=0.5)


def loss(mixed_depth, params):
    heads, paths, _ = mixed_depth.forward(
        MODEL, {"params": params}, images(16), jax.random.key(0), train=True
    )
    return mixed_depth.loss(heads, paths, TARGETS, LOSS)


def exits(params):
    return MODEL.apply({"params": params}, images(16), method="exit_logits")


def of_labels(params):
    class_token, distillation = exits(params)
    losses = [LOSS((class_token[k], distillation[k]), TARGETS) for k in range(3)]
    return losses[2] + 0.5 * losses[0] + 0.25 * losses[1]


def of_the_deepest(params):
    heads = exits(params)
    total = LOSS(tuple(head[2] for head in heads), TARGETS)
    for k, weight in ((0, 0.5), (1, 0.25)):
        for head in heads:
            soft = jax.lax.stop_gradient(jax.nn.softmax(head[2]))
            total += weight * optax.softmax_cross_entropy(head[k], soft).mean() / 2
    return total


@pytest.mark.parametrize(("labels", "by_hand"), [("data", of_labels), ("deepest", of_the_deepest)])
def test_exits_learn_from_the_labels_or_from_the_deepest_exit(labels, by_hand, float64):
    mixed_depth = MixedDepth(exits=(1, 2), exit_weights=(0.5, 0.25), labels=labels)
    params = distinct_weights(MODEL)["params"]

    @jax.jit
    def both(params):
        of_run = jax.value_and_grad(lambda params: loss(mixed_depth, params))(params)
        return of_run, jax.value_and_grad(by_hand)(params)

    found, expected = both(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, expected
    )


def test_exits_cost_their_heads_and_a_second_path_costs_a_model(float64):
    params = abstract_variables(MODEL)["params"]

    def macs(mixed_depth):
        return count_macs(jax.grad(lambda params: loss(mixed_depth, params)), params)

    deep, of_exits = macs(DEEP_ONLY), macs(MixedDepth(exits=(1, 2)))
    per_head = 2 * 8 * 5  # images * channels * classes
    assert deep < of_exits <= deep + 2 * 3 * 2 * per_head  # exits * products of a gradient * heads
    assert macs(MixedDepth(loops=1)) > 1.2 * deep


def test_a_path_of_fewer_loops_is_an_exit_where_there_is_one_unique_block():
    mixed_depth = MixedDepth(loops=1, exits=(1, 2), weight=0.5)
    assert mixed_depth.weights(MODEL.clone(blocks=(1,))) == {1: 1.0, 2: 0.5}
    assert mixed_depth.weights(MODEL) == {1: 0.5, 2: 0.5}
    assert mixed_depth.weights(MODEL.clone(loops=2)) == {1: 0.5}  # exit 2 is the full depth
    (remark,) = mixed_depth.remarks(MODEL)
    assert "an exit is not the model with fewer loops" in remark
    assert not mixed_depth.remarks(MODEL.clone(blocks=(1,)))


class WithoutExits(Model):
    """Computes its logits in a `__call__` of its own."""

    def __call__(self, images, train=False):
        return jnp.zeros((len(images), self.num_classes))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(exits=(0,)), "exits=(0,) must hold different numbers of loops from 1 to 2"),
        (dict(exits=(3,)), "below the 3 loops of the model, whose loss is always counted"),
        (dict(exits=(1, 1)), "must hold different numbers"),
        (dict(exits=("a",)), "exits=('a',) must hold different numbers"),
        (
            dict(exits=(1, 2), exit_weights=(1.0,)),
            "must hold a number above 0 for each of the exit",
        ),
        (dict(exits=(1,), exit_weights=(0.0,)), "must hold a number above 0 for each of the exits"),
        (dict(exit_weights=(1.0,)), "for each of the exits ()"),
        (dict(exits=(1,), labels="deep"), "mixed_depth.labels 'deep'; did you mean 'deepest'?"),
    ],
)
def test_paths_that_the_model_does_not_have_are_refused(settings, message):
    with pytest.raises(UserError) as error:
        MixedDepth(**settings).check(MODEL)
    assert message in str(error.value)
    other = WithoutExits(num_classes=2, image_size=8, blocks=(1,), loops=3)
    with pytest.raises(UserError, match="a WithoutExits has no exits"):
        MixedDepth(exits=(1,)).check(other)
