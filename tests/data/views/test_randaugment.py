"""RandAugment: its notation, its levels, how often each operation is drawn."""

import collections

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sret_jax.data.views.randaugment import INCREASING, PLAIN, RandAugment
from sret_jax.errors import UserError
from tests.data.views.test_pixels import REFERENCE

PIXELS = np.zeros((4, 4, 3), np.uint8)


@pytest.fixture
def drawn(monkeypatch):
    """Records the (name, argument) of every operation that is applied."""
    log = []

    def recording(name, operation):
        def apply(pixels, *argument):
            log.append((name, argument))
            return pixels

        return operation._replace(apply=apply)

    for table in (INCREASING, PLAIN):
        for name, operation in list(table.items()):
            monkeypatch.setitem(table, name, recording(name, operation))
    return log


def apply_often(policy, times=3000):
    rng = np.random.default_rng(0)
    for _ in range(times):
        policy(PIXELS, rng)


@pytest.mark.parametrize("case", [c for c in REFERENCE if c["args"]], ids=lambda c: c["key"])
def test_levels_give_timms_arguments(case):
    operation = INCREASING[case["op"]]
    sign = -1 if operation.signed and case["key"].endswith("neg") else 1
    assert operation.argument(sign * case["level"] / 10) == pytest.approx(case["args"][0])


def test_there_are_fifteen_operations_of_each_kind():
    assert len(INCREASING) == len(PLAIN) == 15


def test_the_notation_sets_every_number():
    policy = RandAugment.parse("rand-m7-n3-p0.4-mstd0.5-mmax9-inc1")
    assert policy == RandAugment(m=7, n=3, p=0.4, mstd=0.5, mmax=9, inc=1)
    assert RandAugment.parse("rand") == RandAugment(m=10, n=2, p=0.5, mstd=0, mmax=10, inc=0)


def test_each_operation_is_drawn_equally_often_and_applied_with_probability_p(drawn):
    apply_often(RandAugment.parse("rand-m9-n2-p0.3-inc1"))
    counts = collections.Counter(name for name, _ in drawn)
    assert set(counts) == set(INCREASING)
    assert len(drawn) == pytest.approx(3000 * 2 * 0.3, rel=0.06)
    assert stats.chisquare(list(counts.values())).pvalue > 1e-3


def test_operations_are_drawn_with_replacement(drawn):
    policy = RandAugment.parse("rand-n2-p1-inc1")
    rng = np.random.default_rng(0)
    twice = 0
    for _ in range(3000):
        drawn.clear()
        policy(PIXELS, rng)
        twice += drawn[0][0] == drawn[1][0]
    assert twice / 3000 == pytest.approx(1 / 15, abs=0.015)


def test_levels_are_normal_around_m_and_clipped():
    rng = np.random.default_rng(0)
    policy = RandAugment.parse("rand-m9-mstd0.5-inc1")
    levels = np.array([policy.draw_level(rng) for _ in range(4000)])
    assert levels.max() == 10
    expected = stats.norm(9, 0.5)
    assert np.mean(levels == 10) == pytest.approx(expected.sf(10), abs=0.01)
    assert stats.kstest(levels[levels < 10], stats.truncnorm(-18, 2, 9, 0.5).cdf).pvalue > 1e-3


def test_a_deviation_of_a_hundred_means_uniform_levels():
    rng = np.random.default_rng(0)
    levels = [RandAugment.parse("rand-m8-mstd101").draw_level(rng) for _ in range(4000)]
    assert stats.kstest(levels, stats.uniform(0, 8).cdf).pvalue > 1e-3


def test_signs_are_drawn_evenly_and_only_where_an_operation_has_one(drawn):
    apply_often(RandAugment.parse("rand-m5-p1-inc1"))
    rotations = [argument for name, argument in drawn if name == "Rotate"]
    assert set(rotations) == {(15.0,), (-15.0,)}
    assert np.mean([angle > 0 for (angle,) in rotations]) == pytest.approx(0.5, abs=0.08)
    assert {argument for name, argument in drawn if name == "SolarizeAdd"} == {(55,)}


def test_the_original_operations_grow_milder_where_timms_do():
    assert PLAIN["Posterize"].argument(1.0) == 4
    assert PLAIN["Solarize"].argument(1.0) == 256
    assert PLAIN["Color"].argument(0.0) == pytest.approx(0.1)
    assert PLAIN["Sharpness"].argument(1.0) == pytest.approx(1.9)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("rand-m11", r"m=11 must be in \[0, 10\]"),
        ("rand-m9-m3", "gives m twice"),
        ("rand-p1.5", r"p=1.5 must be in \[0, 1\]"),
        ("rand-n0", "n=0 must be a whole number from 1 to 15"),
        ("rand-n1.5", "n=1.5 must be a whole number from 1"),
        ("rand-inc2", "inc=2 must be 0 or 1"),
        ("rand-mmax11", r"mmax=11 must be in \(0, 10\]"),
        ("rand-mst0.5", "unknown RandAugment setting 'mst'; did you mean 'mstd'"),
        ("rand-m", "'m' should be a name and a number"),
        ("rand-m-9", "'m' should be a name and a number"),
    ],
)
def test_a_mistake_in_the_notation_is_named(text, sentence):
    with pytest.raises(UserError, match=sentence):
        RandAugment.parse(text)


PARTS = st.sampled_from(["m", "n", "p", "mstd", "mmax", "inc", "x"])
NUMBERS = st.floats(0, 16).map(lambda x: f"{x:.3f}") | st.integers(0).map(str) | st.text(max_size=4)
TEXTS = st.text() | st.lists(st.tuples(PARTS, NUMBERS).map("".join), max_size=6).map("-".join)


@given(TEXTS)
def test_whatever_the_notation_it_is_a_policy_within_range_or_one_sentence(text):
    try:
        policy = RandAugment.parse("rand-" + text)
    except UserError as e:
        assert "\n" not in str(e)
    else:
        assert 0 <= policy.m <= 10 and 0 < policy.mmax <= 10 and 0 <= policy.p <= 1
        assert policy.n in range(1, 16) and policy.inc in (0, 1) and policy.mstd >= 0
        rng = np.random.default_rng(0)
        assert 0 <= policy.draw_level(rng) <= policy.mmax
        assert policy(PIXELS, rng).shape == PIXELS.shape


@given(
    m=st.integers(0, 1000).map(lambda n: n / 100),
    n=st.integers(1, 15),
    p=st.integers(0, 100).map(lambda n: n / 100),
    mstd=st.integers(0, 20_000).map(lambda n: n / 100),
    mmax=st.integers(1, 1000).map(lambda n: n / 100),
    inc=st.integers(0, 1),
)
def test_a_policy_written_out_is_read_back(**settings):
    text = "-".join(["rand", *(f"{name}{value}" for name, value in settings.items())])
    assert RandAugment.parse(text) == RandAugment(**settings)
