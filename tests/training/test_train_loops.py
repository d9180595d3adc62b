"""How many loops each training step has."""

from fractions import Fraction

import numpy as np
import pytest

import sret_jax
from configs import common
from sret_jax.errors import UserError
from sret_jax.training.train_loops import make_train_loops, shifted_poisson

MODEL = sret_jax.create_model("deit_tiny", blocks=(1,), loops=3, num_classes=10)


def train_loops(setting, model=MODEL, max_loops=None):
    config = common.get_config()
    config.recursion.update(train_loops=setting, max_loops=max_loops)
    return make_train_loops(config.recursion, model)


def test_fixed_is_the_loops_of_the_model():
    fixed = train_loops("fixed")
    assert fixed.are_fixed
    assert fixed.of_steps(seed=0, total_steps=5).tolist() == [3] * 5


@pytest.mark.parametrize("setting", ["uniform:1-4", "poisson:3"])
def test_a_draw_depends_on_seed_and_step_alone(setting):
    drawn = train_loops(setting)
    long = drawn.of_steps(seed=7, total_steps=1000)
    np.testing.assert_array_equal(drawn.of_steps(seed=7, total_steps=600), long[:600])
    assert np.mean(drawn.of_steps(seed=8, total_steps=1000) == long) < 0.5
    assert set(long.tolist()) == set(drawn.counts)


def test_draws_stay_what_they_were_for_runs_that_resume():
    drawn = train_loops("uniform:1-4").of_steps(seed=0, total_steps=12)
    assert drawn.tolist() == [1, 2, 3, 1, 1, 2, 1, 2, 2, 2, 2, 4]


@pytest.mark.parametrize("setting", ["uniform:2-5", "poisson:2.5"])
def test_counts_are_as_frequent_as_their_probabilities(setting):
    drawn = train_loops(setting, max_loops=6)
    ((_, probabilities),) = drawn.phases
    counts, steps = np.unique(drawn.of_steps(seed=0, total_steps=100_000), return_counts=True)
    assert counts.tolist() == sorted(probabilities)
    np.testing.assert_allclose(steps / 100_000, list(probabilities.values()), atol=0.01)


def test_a_shifted_poisson_variable_has_its_mean_and_is_truncated_by_dropping_what_is_above():
    free = shifted_poisson(Fraction("3.5"), most=100)
    assert sum(free.values()) == pytest.approx(1)
    assert sum(count * p for count, p in free.items()) == pytest.approx(3.5)
    assert max(free) < 60  # later counts have no probability to speak of
    truncated = shifted_poisson(Fraction("3.5"), most=4)
    assert list(truncated) == [1, 2, 3, 4] and sum(truncated.values()) == pytest.approx(1)
    for count in (1, 2, 3):
        ratio = truncated[count + 1] / truncated[count]
        assert ratio == pytest.approx(2.5 / count) == pytest.approx(free[count + 1] / free[count])


def test_a_curriculum_changes_its_count_at_fractions_of_the_run():
    curriculum = train_loops("1@0.25,4@0.7,2")
    for seed in (0, 1):
        assert curriculum.of_steps(seed, 20).tolist() == [1] * 5 + [4] * 9 + [2] * 6
    assert curriculum.counts == [1, 2, 4]


@pytest.mark.parametrize(
    ("setting", "max_loops", "sentence"),
    [
        ("uniform:0-4", None, "counts must ascend from at least 1; give fixed, uniform:1-4, po"),
        ("uniform:4-1", None, "counts must ascend"),
        ("uniform:1-", None, "train_loops='uniform:1-': it has none of the known forms; give fi"),
        ("", None, "none of the known forms"),
        ("poisson:1", None, "mean must be above 1, because every step has a loop"),
        ("poisson:nan", None, "none of the known forms"),
        ("0@0.5,2", None, "every count must be at least 1"),
        ("1@0.7,2@0.7,3", None, "fractions must ascend between 0 and 1"),
        ("1@1,2", None, "fractions must ascend between 0 and 1"),
        ("1@0.5", None, "none of the known forms"),
        ("4", None, "one count for all steps is --config.model.loops=4"),
        ("uniform:1-4", 3, "steps of 4 loops, more than config.recursion.max_loops=3"),
        ("fixed", 2, "steps of 3 loops, more than config.recursion.max_loops=2"),
        ("poisson:3", 0, "max_loops=0 must be at least 1"),
    ],
)
def test_a_setting_that_gives_no_counts_is_refused_with_the_forms(setting, max_loops, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        train_loops(setting, max_loops=max_loops)
    assert "\n" not in str(error.value)


def test_counts_that_the_model_cannot_have_are_refused():
    model = MODEL.clone(nll_ratio=1.0, nll_every=2)
    with pytest.raises(UserError, match="uniform:1-3: nll_every=2 is more than loops=1"):
        train_loops("uniform:1-3", model)
    assert train_loops("uniform:2-3", model).counts == [2, 3]
