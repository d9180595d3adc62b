"""Exit per image: every image leaves at the exit that its rule names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.errors import UserError
from sret_jax.models.apply import exited_logits
from sret_jax.models.checks import check_exit
from sret_jax.models.halting import ExitRule, signals
from sret_jax.models.read_out import mean_of_heads
from tests.explicit import distinct_weights
from tests.timm_models import images

LOOPS = 4
SIZES = dict(num_classes=5, image_size=32, loops=LOOPS, heads=(2,), dim=8, dtype=np.float64)


def exits_by_hand(rule, logits, states):
    """The number of loops of each image, from all exits' logits (L, B, K) and states."""
    p = np.exp(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
    change = np.linalg.norm((states[1:] - states[:-1]).reshape(LOOPS, len(p[0]), -1), axis=-1)
    residual = change / np.linalg.norm(states[:-1].reshape(LOOPS, len(p[0]), -1), axis=-1)
    label = p.argmax(-1)
    leaves = {
        "entropy": -(p * np.log(p)).sum(-1) <= rule.threshold,
        "confidence": p.max(-1) >= rule.threshold,
        "stable": np.concatenate([np.zeros((1, len(p[0])), bool), label[1:] == label[:-1]]),
        "residual": residual <= rule.threshold,
    }[rule.kind]
    leaves[-1] = True
    return leaves.argmax(0) + 1


@pytest.mark.parametrize(
    ("name", "own"),
    [
        (
            "deit_tiny_distilled",
            dict(blocks=(2,), patch_size=8, nll_ratio=1.0, adapters=("lora:2", "inject:add")),
        ),
        # A cycle of two: windows are shifted in turn.
        ("swin_tiny", dict(blocks=(1,), window=4, adapters=("lora:2", "inject:add"))),
    ],
)
def test_each_image_leaves_at_the_exit_that_the_rule_names(name, own, float64):
    model = sret_jax.create_model(name, **SIZES, **own)
    variables = jax.tree.map(jnp.asarray, distinct_weights(model))
    x = images(32, batch=8)

    def all_exits(x):
        exits = mean_of_heads(model.apply(variables, x, method="exit_logits"))
        *_, seen = model.apply(variables, x, lambda *both: both, method="observed")
        return exits, jnp.concatenate([seen[0][:1], seen[1]])  # (L + 1, B, N, C)

    logits, states = map(np.asarray, jax.jit(all_exits)(x))
    found = signals(logits, states[:-1], states[1:])
    left = set()
    for kind, values in zip(
        ("entropy", "confidence", "residual"), found[:2] + found[3:], strict=True
    ):
        threshold = float(np.median(values[:-1]))
        left |= check_rule(ExitRule(kind, threshold), model, variables, x, logits, states)
    left |= check_rule(ExitRule("stable"), model, variables, x, logits, states)
    assert len(left) > 1  # images leave at several exits


def check_rule(rule, model, variables, x, logits, states):
    """Asserts that the images leave as they should, and returns their numbers of loops."""
    found = jax.tree.map(np.asarray, signals(logits, states[:-1], states[1:]))
    expected = exits_by_hand(rule, logits, states)
    run = jax.jit(lambda x: exited_logits(model, variables, x, rule))
    actual, loops = run(x)
    np.testing.assert_array_equal(loops, expected, err_msg=str(rule))
    np.testing.assert_array_equal(rule.exits(found), expected, err_msg=str(rule))
    of_exit = logits[expected - 1, np.arange(len(expected))]
    np.testing.assert_allclose(actual, of_exit, rtol=0, atol=1e-9 * np.abs(of_exit).max())
    return set(expected.tolist())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("entropie:0.4", "unknown exit rule 'entropie'; did you mean 'entropy'?"),
        ("entropy", "exit='entropy' needs a number after the colon, as in 'entropy:0.4'"),
        ("entropy:low", "needs a number after the colon"),
        ("residual:0", "exit='residual:0': the threshold must be above 0"),
        ("residual:nan", "the threshold must be above 0"),
        ("confidence:1.5", "a confidence is a probability in (0, 1]"),
        ("stable:2", "exit='stable:2': the rule 'stable' takes no threshold"),
        ("entropy:1.7", "the entropy of 5 classes is at most log 5 = 1.61 nats"),
        ("confidence:0.2", "the likeliest of 5 classes has a probability of at least 0.2"),
    ],
)
def test_a_rule_that_is_unknown_or_that_every_image_meets_is_refused(text, message):
    model = sret_jax.create_model("deit_tiny", blocks=(1,), patch_size=8, **SIZES)
    with pytest.raises(UserError) as error:
        check_exit(model, ExitRule.parse(text))
    assert message in str(error.value)


def test_a_model_without_loops_has_no_early_exit():
    model = sret_jax.create_model("deit_tiny")
    with pytest.raises(UserError, match="applies each block once, so no image can leave earlier"):
        check_exit(model, ExitRule.parse("stable"))
    assert str(ExitRule.parse("entropy:0.40")) == "entropy:0.4"
