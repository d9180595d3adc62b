"""Storage faults and checkpoints: a full disk, a read-only disk, flipped bytes, a dead writer."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback

import jax
import numpy as np
import pytest
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints
from tests.conftest import ROOT, TINY_FLAGS, run_python, save_evaluated

MEGABYTE = 1 << 20
DISK = 16 * MEGABYTE  # room for two checkpoints
# Each program gets its own mount, which ends with it.
OWN_MOUNTS = ("unshare", "--map-root-user", "--mount")


def tree(step):
    """3 MB that do not compress, and small arrays; all depend on the step alone."""
    rng = np.random.default_rng(step)
    small = {f"small{i}": rng.normal(size=200).astype(np.float32) for i in range(8)}
    return jax.device_put(
        {"large": rng.normal(size=(3, MEGABYTE // 4)).astype(np.float32), **small}
    )


def items(step):
    return {"model": tree(step), "train": {"moments": tree(-step % 1000)}}


def restored(checkpoints, step):
    """The contents of a checkpoint, or None if it is found to be damaged."""
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: items(0))
    targets = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
    return checkpoints.try_restore(step, targets)


def is_right(checkpoints, step):
    found = restored(checkpoints, step)
    return found is not None and jax.tree.all(jax.tree.map(np.array_equal, found, items(step)))


def on_disk(workdir):
    return {path.name for path in (workdir / "checkpoints").iterdir()}


def test_a_full_disk_loses_one_checkpoint_and_nothing_else(tmp_path):
    run_with_own_mounts("fill_the_disk", tmp_path)


def fill_the_disk(workdir):
    mount(workdir)
    checkpoints = Checkpoints(workdir)
    save_evaluated(checkpoints, 1, items(1), 0.5)
    assert checkpoints.settle()
    left = shutil.disk_usage(workdir).free - MEGABYTE
    (workdir / "filler").write_bytes(bytes(left))
    for step in (2, 3):
        save_evaluated(checkpoints, step, items(step), 0.6)
        assert not checkpoints.settle()
        assert checkpoints.steps == [1]
    assert is_right(checkpoints, 1)

    (workdir / "filler").unlink()
    goes_on(checkpoints, workdir)


def test_a_read_only_disk_loses_one_checkpoint_and_does_not_hold_up_the_end(tmp_path):
    run_with_own_mounts("turn_read_only", tmp_path)


def turn_read_only(workdir):
    mount(workdir)
    checkpoints = Checkpoints(workdir)
    save_evaluated(checkpoints, 1, items(1), 0.5)
    assert checkpoints.settle()
    remount(workdir, "ro")
    for step in (2, 3):
        save_evaluated(checkpoints, step, items(step), 0.6)
        assert not checkpoints.settle()
        assert checkpoints.steps == [1]
    assert is_right(checkpoints, 1)

    remount(workdir, "rw")
    goes_on(checkpoints, workdir)


@pytest.mark.slow  # trains twice
def test_training_continues_when_the_disk_fills_up_and_is_resumed_when_there_is_room(tmp_path):
    run_with_own_mounts("train_on_a_disk_that_fills_up", tmp_path, timeout=600)


def train_on_a_disk_that_fills_up(folder):
    mount(folder)
    run, filler = folder / "run", folder / "filler"

    def fill():
        while not (run / "checkpoints" / "6").exists():
            time.sleep(0.002)
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(bytes(1000))

    threading.Thread(target=fill, daemon=True).start()
    flags = (*TINY_FLAGS, "--config.epochs=1", "--config.checkpoint.every_epochs=0.25")
    done = run_python("main.py", f"--workdir={run}", *flags)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "(No space left on device); the newest on disk is step " in done.stdout
    assert "step 22/22" in done.stdout, "training goes on"
    assert "training is complete, but its last checkpoint cannot be written" in done.stderr

    filler.unlink()
    done = run_python("main.py", f"--workdir={run}", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Resuming" in done.stdout and "Test accuracy" in done.stdout
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(1, 23)]


def goes_on(checkpoints, workdir):
    """Storage that works again is used again, at once and after a restart."""
    save_evaluated(checkpoints, 4, items(4), 0.6)
    assert checkpoints.settle()
    assert checkpoints.steps == [4] and on_disk(workdir) == {"4"}
    checkpoints.close()
    checkpoints = Checkpoints(workdir, create=False)
    assert checkpoints.steps == [4] and is_right(checkpoints, 4)
    checkpoints.close()


@pytest.mark.slow  # starts eight programs
def test_whenever_a_run_is_killed_its_newest_checkpoint_is_whole(tmp_path):
    workdir = epath.Path(tmp_path)
    rng = random.Random(0)
    for _ in range(8):
        with start("save_forever", workdir) as program:
            for _ in range(2):
                assert "saving" in program.stdout.readline()
            time.sleep(rng.uniform(0, 0.5))
            program.kill()
        checkpoints = Checkpoints(workdir)
        newest = max(checkpoints.steps, default=0)
        assert not newest or is_right(checkpoints, newest)
        save_evaluated(checkpoints, newest + 1, items(newest + 1), 0.1)
        checkpoints.close()
        assert all(name.isdecimal() for name in on_disk(workdir))  # nothing half-written


def save_forever(workdir):
    checkpoints = Checkpoints(workdir)
    step = max(checkpoints.steps, default=0)
    while True:
        step += 1
        print("saving", step, flush=True)
        save_evaluated(checkpoints, step, items(step), 0.5)


def test_a_checkpoint_that_was_being_deleted_is_not_listed(tmp_path):
    workdir = epath.Path(tmp_path)
    with start("die_while_deleting", workdir) as program:
        assert program.wait(timeout=60) == -signal.SIGKILL
    checkpoints = Checkpoints(workdir)
    assert 2 in checkpoints.steps
    assert all(is_right(checkpoints, step) for step in checkpoints.steps)
    checkpoints.close()


def die_while_deleting(workdir):
    """Dies at the eighth file of checkpoint 1, which checkpoint 2 replaces."""
    checkpoints = Checkpoints(workdir)
    save_evaluated(checkpoints, 1, items(1), 0.5)
    checkpoints.settle()
    unlink, deleted = os.unlink, []

    def unlink_some(path, **kwargs):
        unlink(path, **kwargs)
        deleted.append(path)
        if len(deleted) == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    os.unlink = unlink_some
    save_evaluated(checkpoints, 2, items(2), 0.6)
    checkpoints.close()


def test_a_flipped_byte_is_found(tmp_path):
    workdir = epath.Path(tmp_path)
    checkpoints = Checkpoints(workdir)
    save_evaluated(checkpoints, 1, items(1), 0.5)
    assert checkpoints.settle()
    rng = random.Random(0)
    for path in sorted((tmp_path / "checkpoints" / "1" / "model").rglob("d/*")):
        whole = path.read_bytes()
        for _ in range(3):
            flipped = bytearray(whole)
            flipped[rng.randrange(len(whole))] ^= rng.randrange(1, 256)
            path.write_bytes(flipped)
            assert restored(checkpoints, 1) is None, path
        path.write_bytes(whole)
    assert is_right(checkpoints, 1)
    checkpoints.close()


@pytest.mark.parametrize("text", ['{"top1": 0.', '{"tpp1": 0.5}', "0.5"])
def test_damaged_metrics_make_a_checkpoint_count_as_not_evaluated_and_nothing_worse(tmp_path, text):
    workdir = epath.Path(tmp_path)
    for step in (1, 2):
        checkpoints = Checkpoints(workdir)
        save_evaluated(checkpoints, step, items(step), 0.5 / step)
        checkpoints.close()
    (workdir / "checkpoints" / "1" / "metrics" / "metrics").write_text(text)
    checkpoints = Checkpoints(workdir)
    assert checkpoints.newest_evaluated(at_most=1) is None
    assert is_right(checkpoints, 1)
    save_evaluated(checkpoints, 3, items(3), 0.1)
    checkpoints.close()
    assert on_disk(workdir) == {"2", "3"}


def run_with_own_mounts(program, folder, timeout=120):
    """Runs a function of this file on its own small disk."""
    probe = subprocess.run(
        [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False
    )
    if probe.returncode:
        pytest.skip(f"no file system can be mounted here: {probe.stderr.decode().strip()}")
    with start(program, folder, *OWN_MOUNTS) as running:
        output, _ = running.communicate(timeout=timeout)
    assert running.returncode == 0, output


def start(program, folder, *prefix):
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", __name__, program, str(folder)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if prefix else None,
        text=True,
    )


def mount(folder):
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", folder], check=True)


def remount(folder, mode):
    subprocess.run(["mount", "-o", f"remount,{mode}", folder], check=True)


def main(program, folder):
    """Runs a function of this file; fails if a thread is left that would delay the exit."""
    status = 1
    try:
        globals()[program](epath.Path(folder))
        left = [thread.name for thread in threading.enumerate() if not thread.daemon]
        assert left == ["MainThread"], left
        status = 0
    except Exception:
        traceback.print_exc(file=sys.stdout)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
