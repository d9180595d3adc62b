"""Batches on devices: real workers, eight devices, one of them in an odd order."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import quickstart
from sret_jax.data import sources
from sret_jax.data.loader import eval_loader, steps_per_pass, train_loader
from sret_jax.errors import UserError


@pytest.fixture
def digits(digits_dir):
    return sources.open_source("digits", "train", digits_dir)


def sharding(devices):
    mesh = Mesh(np.array(devices), ("data",))
    return NamedSharding(mesh, PartitionSpec("data"))


def batches(source, devices, *, start_step=0, count=2, **data):
    config = quickstart.get_config()
    config.seed = 3
    config.data.update(data)
    loader = train_loader(source, config, 16, 16, sharding(devices), start_step=start_step)
    taken = [jax.device_get(next(loader)) for _ in range(count)]
    loader.close()
    return taken


def same(first, second):
    return all(
        np.array_equal(a[key], b[key]) for a, b in zip(first, second, strict=True) for key in a
    )


def test_batches_are_the_same_on_any_devices_in_any_order(digits):
    one = batches(digits, jax.devices()[:1])
    assert same(one, batches(digits, jax.devices()))
    assert same(one, batches(digits, [jax.devices()[i] for i in (3, 0, 7, 1, 2, 6, 5, 4)]))


def test_a_loader_started_at_a_step_gives_what_one_from_the_start_gives_there(digits):
    three = batches(digits, jax.devices()[:2], count=3)
    assert same(three[2:], batches(digits, jax.devices()[:2], start_step=2, count=1))


def test_worker_processes_change_nothing(digits):
    threads = batches(digits, jax.devices()[:2], workers=0)
    assert same(threads, batches(digits, jax.devices()[:2], workers=2))


def test_every_device_holds_its_own_rows(digits):
    config = quickstart.get_config()
    loader = train_loader(digits, config, 16, 16, sharding(jax.devices()), start_step=0)
    batch = next(loader)
    whole = jax.device_get(batch["image"])
    for shard in batch["image"].addressable_shards:
        assert shard.data.shape == (2, 16, 16, 3)
        np.testing.assert_array_equal(shard.data, whole[shard.index])


def test_evaluation_passes_count_every_example_once(digits):
    config = quickstart.get_config()
    loader = eval_loader(digits, config, 8, 48, sharding(jax.devices()))
    steps = steps_per_pass(digits, 48)
    for _ in range(2):
        labels = []
        for _ in range(steps):
            batch = jax.device_get(next(loader))
            labels += batch["label"][batch["real"]].tolist()
        assert labels == [digits[i]["label"] for i in range(len(digits))]


def test_a_batch_the_devices_do_not_divide_is_an_error(digits):
    with pytest.raises(UserError, match=r"batch_size=12 .* 8 devices \(1 hosts\); use 16"):
        train_loader(
            digits, quickstart.get_config(), 8, 12, sharding(jax.devices()), start_step=0
        )  # fmt: skip
