"""Erasing, mixup and cutmix: exact labels, the published distributions, independence of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from sret_jax.data.views.mixing import ERASE_AREA, Mixing, erase, row_keys
from sret_jax.errors import UserError

SIDE = 64


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def mix(mixing, pairs=2000, side=SIDE):
    """Mixes pairs of a black image of class 0 and a white one of class 1.

    Returns the fraction of white in every pixel of the first image of each pair, and its label.
    """
    images = jnp.tile(jnp.asarray([0.0, 1.0])[:, None, None, None], (pairs, side, side, 1))
    labels = {"hard": mixing.hard_targets(jnp.tile(jnp.asarray([0, 1]), pairs), 2)}
    mixed, targets = jax.jit(mixing)(images, labels, keys(2 * pairs))
    targets = targets["hard"]
    first, second = np.asarray(mixed[::2, ..., 0]), np.asarray(mixed[1::2, ..., 0])
    np.testing.assert_allclose(first + second, 1, atol=1e-6)  # each is mixed with the other
    np.testing.assert_allclose(targets[::2], targets[1::2, ::-1], atol=1e-6)
    return first, np.asarray(targets[::2])


def timm_boxes(count, side, rng):
    """CutMix's clipped boxes as timm samples them, as (height, width)."""
    sizes = []
    for keep in rng.beta(1.0, 1.0, count):
        cut = int(side * np.sqrt(1 - keep))
        y, x = rng.integers(side, size=2)
        edges = np.clip([y - cut // 2, y + cut // 2, x - cut // 2, x + cut // 2], 0, side)
        sizes.append((edges[1] - edges[0], edges[3] - edges[2]))
    return np.array(sizes)


def test_mixup_blends_each_pair_by_a_beta_share_and_labels_it_so():
    white, targets = mix(Mixing(mixup=0.8))
    share = white[:, 0, 0]
    np.testing.assert_allclose(white, share[:, None, None] * np.ones((SIDE, SIDE)), atol=1e-6)
    np.testing.assert_allclose(targets, np.stack([1 - share, share], -1), atol=1e-6)
    assert stats.kstest(share, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3
    assert share.mean() == pytest.approx(0.5, abs=0.02)
    assert share.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.06)


def test_cutmix_pastes_a_clipped_box_and_labels_by_its_exact_share():
    white, targets = mix(Mixing(cutmix=1.0))
    assert set(np.unique(white)) == {0.0, 1.0}
    np.testing.assert_allclose(targets[:, 1], white.mean((1, 2)), atol=1e-6)
    rows, columns = white.any(2), white.any(1)
    sizes = np.stack([rows.sum(1), columns.sum(1)], -1)
    np.testing.assert_array_equal(white.sum((1, 2)), sizes.prod(1))  # one rectangle
    expected = timm_boxes(20000, SIDE, np.random.default_rng(0))
    assert stats.ks_2samp(sizes.prod(1), expected.prod(1)).pvalue > 1e-3
    assert stats.ks_2samp(sizes[:, 0], expected[:, 0]).pvalue > 1e-3


@pytest.mark.parametrize(("switch", "prob"), [(0.5, 1.0), (0.2, 0.6)])
def test_the_switch_chooses_cutmix_and_the_probability_leaves_pairs_alone(switch, prob):
    white, targets = mix(Mixing(mixup=0.8, cutmix=1.0, mix_switch=switch, mix_prob=prob))
    blended = np.mean((white > 0) & (white < 1), (1, 2)) == 1
    assert blended.mean() == pytest.approx((1 - switch) * prob, abs=0.03)
    unmixed = targets[:, 1] == 0
    empty_boxes = np.mean(timm_boxes(20000, SIDE, np.random.default_rng(0)).prod(1) == 0)
    expected = 1 - prob + prob * switch * empty_boxes
    assert unmixed.mean() == pytest.approx(expected, abs=0.03)
    assert not white[unmixed].any()


def mixed_targets(mixing, images, labels):
    """Mixes targets of five classes; "soft" are other targets of the same images."""
    hard = mixing.hard_targets(jnp.asarray(labels), 5)
    return mixing(images, {"hard": hard, "soft": 1 - hard}, keys(len(labels)))


def test_label_smoothing_is_applied_to_both_labels_before_they_are_mixed():
    labels = [3, 1, 0, 0]
    images = jnp.zeros((4, 8, 8, 3))
    _, plain = mixed_targets(Mixing(mixup=0.8), images, labels)
    _, smooth = mixed_targets(Mixing(mixup=0.8, label_smoothing=0.1), images, labels)
    np.testing.assert_allclose(smooth["hard"], 0.9 * plain["hard"] + 0.1 / 5, atol=1e-6)
    np.testing.assert_allclose(smooth["hard"].sum(-1), 1, atol=1e-6)
    _, alone = mixed_targets(Mixing(label_smoothing=0.1), images, labels)
    np.testing.assert_allclose(alone["hard"][0], [0.02, 0.02, 0.02, 0.92, 0.02], atol=1e-6)


def test_all_targets_of_an_image_are_mixed_alike():
    images = jnp.zeros((64, 8, 8, 3))
    _, targets = mixed_targets(Mixing(mixup=0.8, cutmix=1.0), images, [3, 1] * 32)
    assert 0 < targets["hard"][0, 3] < 1
    np.testing.assert_allclose(targets["soft"], 1 - targets["hard"], atol=1e-6)


def timm_rectangles(count, side, rng):
    """Random erasing's rectangles as timm samples them, as (height, width)."""
    sizes = []
    while len(sizes) < count:
        area = rng.uniform(0.02, 1 / 3) * side * side
        aspect = np.exp(rng.uniform(np.log(0.3), np.log(1 / 0.3)))
        h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
        if h < side and w < side:
            sizes.append((h, w))
    return np.array(sizes)


def test_erasing_fills_rectangles_of_the_published_sizes_with_normal_noise():
    count = 3000
    flat = jnp.full((SIDE, SIDE, 3), 100.0)
    images = np.asarray(jax.vmap(erase, (None, 0, None))(flat, keys(count), 0.25))
    erased = np.all(images != 100, -1)
    np.testing.assert_array_equal(np.any(images != 100, -1), erased)  # all channels at once
    hit = erased.any((1, 2))
    assert hit.mean() == pytest.approx(0.25, abs=0.03)
    erased = erased[hit]
    sizes = np.stack([erased.any(2).sum(1), erased.any(1).sum(1)], -1)
    np.testing.assert_array_equal(erased.sum((1, 2)), sizes.prod(1))  # one rectangle
    expected = timm_rectangles(20000, SIDE, np.random.default_rng(0))
    for of in (lambda s: s.prod(1), lambda s: s[:, 0] / s[:, 1]):
        assert stats.ks_2samp(of(sizes), of(expected)).pvalue > 1e-3
    shares = sizes.prod(1) / SIDE**2
    assert ERASE_AREA[0] * 0.9 < shares.min() and shares.max() < ERASE_AREA[1] * 1.1
    noise = images[hit][erased]
    assert stats.kstest(noise.ravel()[:20000], "norm").pvalue > 1e-3
    tops = erased.any(2).argmax(1)
    room = SIDE - sizes[:, 0]
    assert np.mean(tops / room) == pytest.approx(0.5, abs=0.05)


def test_one_image_after_another_is_erased_as_all_at_once():
    mixing = Mixing(erasing=0.5, mixup=0.8, cutmix=1.0)
    images = jax.random.normal(jax.random.key(1), (16, SIDE, SIDE, 3))
    targets = {"hard": jnp.eye(16)}
    at_once, in_turn = (
        jax.jit(functools.partial(mixing, in_turn=choice))(images, targets, keys(16))
        for choice in (False, True)
    )
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_turn), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_what_is_off_changes_nothing():
    images = jax.random.normal(jax.random.key(1), (4, 8, 8, 3))
    labels = [3, 1, 0, 0]
    for off in (Mixing(), Mixing(mixup=0.8, cutmix=1.0, mix_prob=0.0)):
        mixed, targets = mixed_targets(off, images, labels)
        np.testing.assert_array_equal(mixed, images)
        np.testing.assert_array_equal(targets["hard"], jax.nn.one_hot(jnp.asarray(labels), 5))


def test_a_row_depends_on_its_position_alone_whatever_the_batch_size():
    small = jnp.concatenate([row_keys(5, jnp.asarray(step), 4) for step in (2, 3)])
    large = row_keys(5, jnp.asarray(1), 8)
    np.testing.assert_array_equal(jax.random.key_data(small), jax.random.key_data(large))
    beyond_31_bits = [row_keys(5, jnp.asarray(step), 1024) for step in (3_000_000, 902_848)]
    assert not np.array_equal(*map(jax.random.key_data, beyond_31_bits))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(erasing=-0.1), "erasing=-0.1 must be a probability"),
        (dict(mix_prob=1.5), "mix_prob=1.5 must be a probability"),
        (dict(mix_switch=-1), "mix_switch=-1 must be a probability"),
        (dict(mixup=-0.8), "mixup=-0.8 must be 0"),
        (dict(cutmix=float("inf")), "cutmix=inf must be 0"),
        (dict(label_smoothing=1.0), r"label_smoothing=1.0 must be in \[0, 1\)"),
    ],
)
def test_settings_out_of_range_are_named(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        Mixing(**settings)
