"""The order contract, on the real digits."""

import itertools

import numpy as np
import pytest

from sret_jax.data import order
from sret_jax.data.sources.source import open_source
from sret_jax.data.views.images import EvalTransform
from sret_jax.data.views.training_view import TrainTransform
from sret_jax.errors import UserError

TRANSFORM = TrainTransform(8, (0.5, 1.0), (0.75, 1.33), 0.5)


@pytest.fixture
def digits(digits_dir):
    return open_source("digits", "train", digits_dir)


def samples(source, seed=0, transform=TRANSFORM, replace=True):
    return order.Samples(order.shuffled(source, seed), transform, 8, seed=seed, replace=replace)


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a)


def test_every_epoch_shows_every_record_once_in_another_order(digits):
    stream = order.shuffled(digits, seed=0)
    n = len(digits)
    epochs = [[stream[e * n + i]["record"] for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize("times", [2, 3, 5])
def test_repetition_shows_every_image_so_many_times_near_but_never_beside_itself(times, digits):
    n = len(digits)
    stream = order.shuffled(digits, seed=0)
    repeated = order.Repeated(stream, times)
    group = order.REPEAT_GROUP
    shown = [repeated[p]["record"] for p in range(4 * group * times)]
    for g in range(4):
        start = g * group * times
        once = [stream[g * group + i]["record"] for i in range(group)]
        assert sorted(shown[start : start + group * times]) == sorted(once * times)
    assert all(a != b for a, b in itertools.pairwise(shown))

    epochs = -(-n // group) * group * times  # a pass over the data, up to whole groups
    counts = np.bincount([repeated[p]["record"] for p in range(epochs)], minlength=n)
    surplus = epochs // times - n  # of the next pass
    assert sorted(set(counts)) == [times, 2 * times] if surplus else [times]
    assert np.sum(counts == 2 * times) == surplus


def test_repetition_follows_its_law(digits):
    stream, r, g = order.shuffled(digits, seed=0), 3, 32
    repeated = order.Repeated(stream, r)
    for p in (0, 1, 31, 32, 63, 64, 95, 96, 1000, 4321, 10**6):
        law = (p // (r * g)) * g + (p % g + (p // g) % r) % g
        assert repeated[p]["record"] == stream[law]["record"]


def test_copies_of_an_image_are_augmented_differently(digits):
    stream = order.Samples(
        order.Repeated(order.shuffled(digits, 0), 3), TRANSFORM, 8, seed=0, replace=True
    )
    views = {}
    for p in range(96):
        views.setdefault(stream[p]["record"], set()).add(stream[p]["image"].tobytes())
    assert len(views) == 32
    assert np.mean([len(different) for different in views.values()]) > 2.5


def test_neighbouring_seeds_share_no_epoch(digits):
    n = len(digits)
    streams = [order.shuffled(digits, seed) for seed in range(3)]
    heads = {tuple(s[e * n + i]["record"] for i in range(20)) for s in streams for e in range(3)}
    assert len(heads) == 9


def test_a_sample_is_a_function_of_seed_and_position_alone(digits):
    forward = [samples(digits)[p] for p in range(5)]
    backward = [samples(digits)[p] for p in reversed(range(5))][::-1]
    assert all(same(a, b) for a, b in zip(forward, backward, strict=True))
    assert not same(samples(digits, seed=0)[3], samples(digits, seed=1)[3])


def test_one_record_is_augmented_anew_in_each_epoch(digits):
    n = len(digits)
    stream = samples(digits)
    record = stream[0]["record"]
    again = next(stream[p] for p in range(n, 2 * n) if stream[p]["record"] == record)
    assert not np.array_equal(stream[0]["image"], again["image"])


@pytest.mark.parametrize(
    "hosts", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[0, 3], [2, 1]], [[2], [0], [3], [1]]]
)
def test_hosts_together_hold_the_global_batch_whatever_their_number_or_interleaving(digits, hosts):
    batch = 16
    chunks = samples(digits).batch(batch // 4)
    for step in (0, 5, 100):
        parts = {}
        for mine in hosts:
            view = order.HostChunks(chunks, mine, per_step=4)[step * len(mine) :]
            parts |= {chunk: view[i] for i, chunk in enumerate(mine)}
        together = {
            key: np.concatenate([parts[c][key] for c in range(4)]) for key in ("image", "label")
        }
        one_host = samples(digits).batch(batch)[step]
        assert np.array_equal(together["image"], one_host["image"])
        assert np.array_equal(together["label"], one_host["label"])


class WithBadRecords:
    """A source that contains broken files."""

    def __init__(self, source, bad):
        self.source, self.bad, self.class_names = source, set(bad), source.class_names

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        record = self.source[index]
        return {**record, "image": record["image"][:20]} if index in self.bad else record


def test_a_bad_image_keeps_its_position_and_shows_the_next_readable_one(digits):
    good = samples(digits)
    positions = (3, 4)
    bad = [good[p]["record"] for p in positions]
    stream = samples(WithBadRecords(digits, bad))
    for p in positions:
        assert stream[p]["bad"] and stream[p]["real"]
        assert stream[p]["record"] == good[p]["record"]
        assert stream[p]["label"] == digits[good[5]["record"]]["label"]
        assert stream[p]["image"].any()
    others = [p for p in range(10) if p not in positions]
    assert all(same(stream[p], good[p]) for p in others)


def test_a_source_without_readable_images_is_an_error(digits):
    stream = samples(WithBadRecords(digits, range(len(digits))))
    with pytest.raises(UserError, match="100 images in a row"):
        stream[0]


def test_evaluation_shows_every_record_once_in_order_and_pads_the_last_batch(digits):
    padded = order.Samples(
        order.padded(digits, 64), EvalTransform(8, 1.0), 8, seed=0, replace=False
    )
    length = -(-len(digits) // 64) * 64
    for start in (0, length):  # passes repeat
        real = [padded[start + i]["real"] for i in range(length)]
        records = [padded[start + i]["record"] for i in range(length)]
        assert records[: len(digits)] == list(range(len(digits)))
        assert real == [True] * len(digits) + [False] * (length - len(digits))


def test_a_label_outside_the_classes_is_an_error_that_names_the_record(digits):
    class Mislabelled(WithBadRecords):
        def __getitem__(self, index):
            return {**self.source[index], "label": 10}

        def record_name(self, index):
            return self.source.record_name(index)

    stream = order.shuffled(Mislabelled(digits, []), seed=0)
    with pytest.raises(UserError, match=r"digits/1.0.0 train record \d+ has label 10, expected 0"):
        stream[0]


def test_a_bad_image_in_evaluation_is_black_and_marked(digits):
    broken = WithBadRecords(digits, [2])
    padded = order.Samples(order.padded(broken, 8), EvalTransform(8, 1.0), 8, seed=0, replace=False)
    assert padded[2]["bad"] and not padded[2]["image"].any()
    assert padded[2]["label"] == digits[2]["label"]
