"""The search for the largest batch, with a model of memory instead of a compiler."""

import pytest

from sret_jax.planning.fitting import MOST_COMPILATIONS, largest_batch


def search(needed, available=16_000, first=64, fixed=1_000, unit=8):
    return largest_batch(needed, available, unit=unit, first=first, fixed=fixed)


@pytest.mark.parametrize("first", [8, 64, 1_504, 80_000])
def test_memory_that_is_affine_in_the_batch_takes_three_compilations_at_most(first):
    batch, compilations = search(lambda batch: 1_000 + 10 * batch, first=first)
    assert batch == 1_496
    assert compilations <= 3


def test_memory_that_is_not_quite_affine_ends_where_the_next_batch_does_not_fit():
    def needed(batch):
        return int(2_500 + 10 * batch + 0.002 * batch**2 + 300 * (batch % 3))

    batch, compilations = search(needed)
    assert needed(batch) <= 16_000 < needed(batch + 8)
    assert batch >= 0.97 * 1_104  # the largest that fits, beyond two that do not
    assert compilations <= MOST_COMPILATIONS


def test_memory_that_hardly_grows_near_the_limit_ends_close_to_the_largest_that_fits():
    def needed(batch):
        return 1_000 + 10 * batch if batch <= 1_104 else 16_001 + batch // 10

    batch, compilations = search(needed, first=624)
    assert 0.95 * 1_104 <= batch <= 1_104
    assert compilations <= MOST_COMPILATIONS


@pytest.mark.parametrize("largest", [640, 760, 1_104, 1_400])
def test_from_far_beyond_a_limit_where_memory_hardly_grows_it_ends_close_too(largest):
    def needed(batch):
        beyond = 16_001 + 23 * max(0, batch - 1_400)
        return 13_000 + batch if batch <= largest else beyond

    batch, compilations = search(needed, first=4_096)
    assert 0.95 * largest <= batch <= largest
    assert compilations <= MOST_COMPILATIONS


@pytest.mark.parametrize("largest", [800, 1_104, 1_400])
@pytest.mark.parametrize("falls", [0, 500])
def test_where_a_larger_batch_needs_no_more_memory_it_ends_close_too(largest, falls):
    def needed(batch):  # in bytes, of which a falling line finds billions of images' worth
        if batch > largest:
            return (16_001 + batch) << 20
        return (1_000 + 20 * batch if batch <= 700 else 15_000 - falls + batch // 10) << 20

    batch, compilations = search(needed, 16_000 << 20, first=256, fixed=1_000 << 20)
    assert 0.95 * largest <= batch <= largest
    assert compilations <= MOST_COMPILATIONS


def test_where_no_batch_fits_none_is_found():
    batch, compilations = search(lambda batch: 20_000 + batch)
    assert batch == 0
    assert compilations <= MOST_COMPILATIONS


def test_a_first_batch_that_is_the_largest_takes_one_compilation():
    assert search(lambda batch: 1_000 + 10 * batch, first=1_496) == (1_496, 1)
