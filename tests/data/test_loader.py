"""Batches on devices: real workers and eight devices, one of them in an unusual order."""

import hashlib
import multiprocessing
import pathlib
import time

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from configs import quickstart
from sret_jax.data import read_ahead
from sret_jax.data.loader import SyntheticLoader, eval_loader, steps_per_pass
from sret_jax.data.read_ahead import ReadAhead
from sret_jax.data.sources.source import SyntheticSource, open_source
from sret_jax.errors import UserError
from sret_jax.parallel.mesh import batch_sharding, make_mesh
from sret_jax.training.batches import train_loader, train_samples
from tests.conftest import run_python


@pytest.fixture
def digits(digits_dir):
    return open_source("digits", "train", digits_dir)


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


def digest(batch):
    """A hash of a batch's contents."""
    parts = (np.ascontiguousarray(batch[key]).tobytes() for key in ("image", "label", "record"))
    return hashlib.sha256(b"".join(parts)).hexdigest()


class Host:
    """One of several hosts: a view of a sharding with that host's devices only."""

    def __init__(self, whole, devices):
        self.num_devices = whole.num_devices
        self._whole, self._devices = whole, devices

    def addressable_devices_indices_map(self, shape):
        indices = self._whole.addressable_devices_indices_map(shape)
        return {device: indices[device] for device in self._devices}


INTERLEAVED = (0, 3, 6, 1, 4, 7, 2, 5)


def global_batches(source, hosts, workers, *, start_step=0, count=2, seed=3):
    """Hashes of the batches that several hosts load together, with their devices interleaved."""
    config = full_recipe(seed, workers)
    whole = sharding([jax.devices()[i] for i in INTERLEAVED])
    steps = [{} for _ in range(count)]
    for host in range(hosts):
        mine = Host(whole, jax.devices()[host::hosts])
        loader = train_loader(source, config, 16, 32, mine, start_step=start_step)
        for parts in steps:
            parts.update(loader.next_parts())
        loader.close()
    order = whole.mesh.devices.ravel()
    return [
        digest({key: np.concatenate([parts[d][key] for d in order]) for key in parts[order[0]]})
        for parts in steps
    ]


def full_recipe(seed=3, workers=0):
    config = quickstart.get_config()
    config.seed = seed
    config.augment.update(policy="rand-m9-mstd0.5-inc1", repeats=3, flip=0.5)
    config.data.workers = workers
    return config


@pytest.fixture(scope="module")
def expected(digits_dir):
    """The first batches of the stream, computed sample by sample."""
    source = open_source("digits", "train", digits_dir)
    samples = train_samples(source, full_recipe(), 16)
    return [digest(samples.batch(32)[step]) for step in range(6)]


@pytest.mark.parametrize(("hosts", "workers"), [(1, 0), (2, 0), (4, 0), (2, 2)])
def test_hosts_together_load_the_same_global_batch(hosts, workers, digits, expected):
    assert global_batches(digits, hosts, workers) == expected[:2]


@pytest.mark.slow  # starts 2 to 16 processes each
@pytest.mark.parametrize(("hosts", "workers"), [(1, 2), (1, 4), (2, 4), (4, 2), (4, 4)])
def test_hosts_and_workers_together_load_the_same_global_batch(hosts, workers, digits, expected):
    assert global_batches(digits, hosts, workers) == expected[:2]


def test_the_workers_may_change_midway(digits, expected):
    first = global_batches(digits, 1, 0, count=2)
    rest = global_batches(digits, 1, 3, start_step=2, count=4)
    assert first + rest == expected


def test_another_seed_is_another_stream(digits, expected):
    other = global_batches(digits, 1, 0, count=6, seed=4)
    assert not set(other) & set(expected)


class Counted:
    """A source that writes a mark to a file for every record that any process reads."""

    def __init__(self, source, file):
        self.source, self.file, self.class_names = source, str(file), source.class_names

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        with open(self.file, "ab", buffering=0) as f:  # noqa: PTH123, appends are atomic
            f.write(b".")
        return self.source[index]

    def record_name(self, index):
        return self.source.record_name(index)

    def reads(self):
        """The number of reads, once reading has stopped."""
        path, before = pathlib.Path(self.file), -1
        while (now := path.stat().st_size if path.exists() else 0) != before:
            before = now
            time.sleep(0.5)
        return now


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("prefetch", "batch_size"), [(2, 32), (1, 8), (3, 48)])
def test_no_more_is_read_ahead_than_the_config_allows(
    workers, prefetch, batch_size, digits, tmp_path
):
    source = Counted(digits, tmp_path / "reads")
    config = full_recipe(workers=workers)
    config.data.prefetch = prefetch
    loader = train_loader(
        source, config, 16, batch_size, sharding(jax.devices()[:2]), start_step=1000
    )
    next(loader)
    assert batch_size < source.reads() <= (1 + prefetch) * batch_size
    loader.close()


def test_a_start_far_into_the_run_reads_nothing_of_what_came_before(digits, tmp_path):
    source = Counted(digits, tmp_path / "reads")
    loader = train_loader(
        source, full_recipe(), 16, 32, sharding(jax.devices()[:2]), start_step=10**6
    )
    next(loader)
    loader.close()
    assert source.reads() <= 3 * 32


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 12, 64, 128, 1024])
@pytest.mark.parametrize("workers", [0, 1, 2, 16, 64])
@pytest.mark.parametrize("prefetch", [1, 2])
def test_a_plan_keeps_to_its_budget_and_divides_the_rows(rows, workers, prefetch):
    budget = prefetch * rows
    plan = ReadAhead.plan(rows, budget, workers)
    assert rows % plan.chunk == 0
    assert max(1, plan.workers) * plan.ahead * plan.chunk <= budget
    assert plan.workers <= workers
    if plan.workers:
        assert plan.ahead >= 4


def test_synthetic_batches_need_no_data_and_are_always_the_same():
    config = quickstart.get_config()
    config.data.synthetic = True
    source = SyntheticSource(1000, 10)
    loader = train_loader(source, config, 16, 32, sharding(jax.devices()), start_step=0)
    first, second = next(loader), next(loader)
    assert first["image"] is second["image"]
    assert first["image"].shape == (32, 16, 16, 3) and len(first["image"].sharding.device_set) == 8
    assert int(first["label"].max()) < 10 and bool(first["real"].all())


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


def test_workers_without_shared_memory_become_threads(digits, monkeypatch, capsys):
    monkeypatch.setattr(read_ahead, "shared_memory_left", lambda: 10_000)
    assert same(
        batches(digits, jax.devices()[:2], workers=2), batches(digits, jax.devices()[:2], workers=0)
    )
    assert not multiprocessing.active_children()
    said = capsys.readouterr().out
    assert said.startswith("Images are read in threads: worker processes may need 0 MB of shared ")
    assert "/dev/shm has 0 MB left" in said and "--shm-size=" in said and said.count("\n") == 1


SCRIPT = """
import grain
from sret_jax.data.read_ahead import ReadAhead
print("the script runs")
def double(x):
    return 2 * x
chunks = iter(ReadAhead(chunk=2, workers=2, ahead=4).read(grain.MapDataset.range(8).map(double)))
print([next(chunks) for _ in range(8)])
chunks.close()
"""


def test_workers_do_not_run_the_script_that_starts_them_again(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = run_python(str(tmp_path / "script.py"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["the script runs", "[0, 2, 4, 6, 8, 10, 12, 14]"]


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
    with pytest.raises(UserError, match=r"batch_size=12 .* 8 devices; use 16"):
        train_loader(
            digits, quickstart.get_config(), 8, 12, sharding(jax.devices()), start_step=0
        )  # fmt: skip


def test_synthetic_batches_are_one_that_is_already_on_the_devices():
    sharding = batch_sharding(make_mesh())
    loader = SyntheticLoader(16, 8, 10, sharding)
    batch = next(loader)
    assert next(loader) is batch
    assert {array.sharding for array in batch.values()} == {sharding}
