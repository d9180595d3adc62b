"""The train loop in action: resuming, results, meshes, several processes, damaged checkpoints."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from etils import epath

from sret_jax.checkpoints.manager import CHECKPOINTS
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.exit_status import PREEMPTED
from sret_jax.run import loop
from tests.conftest import ROOT, TINY_FLAGS, WITHOUT_TENSORFLOW, read_metrics, run_python


def main(workdir, *flags, digits_dir, devices=1):
    """Runs main.py with the tiny model in its own process; returns its output."""
    done = run_python(
        "main.py",
        f"--workdir={workdir}",
        f"--config.data.data_dir={digits_dir}",
        *TINY_FLAGS,
        *flags,
        devices=devices,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_main(workdir, *flags, digits_dir, devices=1):
    """Starts main.py with the tiny model in its own process."""
    flags = (
        f"--workdir={workdir}",
        f"--config.data.data_dir={digits_dir}",
        *TINY_FLAGS,
        *flags,
    )
    path = f"{WITHOUT_TENSORFLOW}{os.pathsep}{ROOT}"
    xla_flags = os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}")
    return subprocess.Popen(
        [sys.executable, "main.py", *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": xla_flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def evaluate(workdir, *flags, devices=1):
    """Runs main.py --mode=eval in its own process; returns its output."""
    done = run_python("main.py", "--mode=eval", f"--workdir={workdir}", *flags, devices=devices)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Twenty steps, each of 1 or 2 loops, so that all runs that are compared draw the same.
TWENTY_STEPS = ("--config.epochs=0.9", "--config.recursion.train_loops=uniform:1-2")


@pytest.fixture(scope="module")
def twenty_steps(tmp_path_factory, digits_dir):
    """Twenty steps on one device without interruption, the reference for other runs."""
    workdir = epath.Path(tmp_path_factory.mktemp("whole"))
    output = main(workdir, *TWENTY_STEPS, digits_dir=digits_dir)
    return workdir, output


def checkpoint_arrays(workdir, step):
    """Every array of a checkpoint, by path."""
    import jax
    import orbax.checkpoint as ocp

    items = {}
    for item in ("model", "ema", "train"):
        tree = ocp.StandardCheckpointer().restore(workdir / CHECKPOINTS / str(step) / item)
        flat, _ = jax.tree_util.tree_flatten_with_path(tree)
        items |= {f"{item}{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in flat}
    return items


def test_a_run_leaves_its_results_and_says_where(twenty_steps):
    workdir, output = twenty_steps
    result = json.loads((workdir / "result.json").read_text())
    assert result["step"] == 20
    figures = {"step", "eval", "eval_ema", "best", "devices"}
    seconds = {"train_seconds", "images_per_second", "compile_seconds"}
    assert set(result) == figures | seconds
    assert result["best"] == {"step": 20, "top1": result["eval"]["top1"]}
    assert output.splitlines()[-1].endswith(f"in {workdir / 'checkpoints' / '20'}")
    assert set(result["eval"]) == set(result["eval_ema"]) == {"top1", "top5", "loss"}
    assert result["train_seconds"] > 0 and result["images_per_second"] > 0
    assert result["compile_seconds"] > 0
    for file in ("config.json", "class_names.json", "curves.png", "tensorboard", "parameters.txt"):
        assert (workdir / file).exists()
    assert json.loads((workdir / "class_names.json").read_text()) == [str(i) for i in range(10)]
    for text in (
        "GMACs",
        " parameters, ",
        "step 20/20",
        "images/s",
        "waiting for data",
        " left",
        "lr ",
    ):
        assert text in output
    assert f"Test accuracy {100 * result['eval']['top1']:.2f}%" in output
    assert str(workdir / "result.json") in output
    assert read_metrics(workdir)[20] < read_metrics(workdir)[1]


def wait_for_step(step, workdir, process):
    deadline = time.time() + 900
    while process.poll() is None and max(read_metrics(workdir), default=0) < step:
        assert time.time() < deadline
        time.sleep(0.01)


def test_asked_to_stop_killed_and_started_again_a_run_ends_bitwise_the_same(
    twenty_steps, tmp_path, digits_dir
):
    workdir, _ = twenty_steps
    flags = (*TWENTY_STEPS, "--config.checkpoint.every_epochs=0.25")  # 6 steps
    process = start_main(tmp_path, *flags, "--config.stop_at_step=19", digits_dir=digits_dir)
    wait_for_step(3, tmp_path, process)
    process.terminate()
    output = process.communicate()[0]
    assert process.returncode == PREEMPTED, output
    step = max(read_metrics(tmp_path))
    assert f"Stopped as asked at step {step}, which is saved" in output and step < 14

    process = start_main(tmp_path, *flags, "--config.stop_at_step=20", digits_dir=digits_dir)
    wait_for_step(14, tmp_path, process)
    process.kill()
    output = process.communicate()[0]
    assert f"Resuming {tmp_path} at step {step}" in output
    assert "stop_at_step: 19 -> 20" in output
    assert 14 <= max(read_metrics(tmp_path)) < 20, "the kill came too late to test anything"

    done = run_python("main.py", f"--workdir={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Resuming {tmp_path} at step 1" in done.stdout  # 12 or 18
    whole, resumed = checkpoint_arrays(workdir, 20), checkpoint_arrays(tmp_path, 20)
    assert whole.keys() == resumed.keys()
    for path, array in whole.items():
        np.testing.assert_array_equal(resumed[path], array, err_msg=path)
    assert read_metrics(tmp_path) == read_metrics(workdir)
    assert sorted(read_metrics(tmp_path)) == list(range(1, 21))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval"] == json.loads((workdir / "result.json").read_text())["eval"]


@pytest.mark.slow  # by default two processes with fsdp=2 are compared
@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_every_mesh_of_eight_devices_gives_the_curve_of_one(
    fsdp, twenty_steps, tmp_path, tiny_config
):
    workdir, _ = twenty_steps
    tiny_config.epochs = 0.9
    tiny_config.recursion.train_loops = "uniform:1-2"
    tiny_config.fsdp = fsdp
    result = loop.train(tiny_config, epath.Path(tmp_path))
    ours, one_device = read_metrics(tmp_path), read_metrics(workdir)
    np.testing.assert_allclose(list(ours.values()), list(one_device.values()), rtol=1e-3)
    assert result["step"] == 20


def in_processes(count, workdir, *flags, digits_dir, devices=2, stop_after=None):
    """Runs main.py with the tiny model in several processes; returns the output of each.

    After the step `stop_after`, the last process is asked to stop.
    """
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    cluster = (f"--coordinator=localhost:{port}", f"--processes={count}")
    processes = [
        start_main(
            workdir, *cluster, f"--process_id={i}", *flags, digits_dir=digits_dir, devices=devices
        )
        for i in range(count)
    ]
    if stop_after:
        wait_for_step(stop_after, workdir, processes[0])
        processes[-1].terminate()
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    status = PREEMPTED if stop_after else 0
    assert [process.returncode for process in processes] == [status] * count, "\n".join(outputs)
    return outputs


def test_two_processes_stopped_and_resumed_give_the_curve_of_one_and_evaluate_exactly(
    twenty_steps, tmp_path, digits_dir, tiny_config
):
    workdir, _ = twenty_steps
    flags = (*TWENTY_STEPS, "--config.fsdp=2")
    leader, follower = in_processes(2, tmp_path, *flags, digits_dir=digits_dir, stop_after=6)
    step = max(read_metrics(tmp_path))
    assert f"Stopped as asked at step {step}, which is saved" in leader and step < 20
    assert "Stopped" not in follower
    leader, follower = in_processes(2, tmp_path, *flags, digits_dir=digits_dir)
    assert f"at step {step}" in leader and "(2 processes on 1 host)" in leader
    assert "step 20/20" not in follower  # one process speaks for all
    assert "[Gloo]" not in leader + follower
    ours, one_device = read_metrics(tmp_path), read_metrics(workdir)
    assert sorted(ours) == list(range(1, 21))
    np.testing.assert_allclose(
        [ours[step] for step in range(1, 21)],
        [one_device[step] for step in range(1, 21)],
        rtol=1e-3,
    )
    two = json.loads((tmp_path / "result.json").read_text())["eval"]
    one = evaluate_checkpoint(tiny_config, epath.Path(tmp_path))["eval"]
    assert read_metrics(tmp_path, "loops") == read_metrics(workdir, "loops")
    assert (two["top1"], two["top5"]) == (one["top1"], one["top5"])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.fixture(scope="module")
def stopped_on_two_hosts_of_four(tmp_path_factory, digits_dir):
    """A workdir that two processes of four devices each stopped in before step 20."""
    workdir = tmp_path_factory.mktemp("stopped")
    flags = (*TWENTY_STEPS, "--config.fsdp=2")
    in_processes(2, workdir, *flags, digits_dir=digits_dir, devices=4, stop_after=6)
    return workdir


@pytest.mark.slow  # up to four processes a case
@pytest.mark.parametrize(
    ("processes", "devices", "fsdp"), [(1, 8, 4), (1, 1, 1), (4, 2, 1), (4, 2, 8)]
)
def test_a_run_goes_on_with_other_processes_devices_and_fsdp(
    processes, devices, fsdp, stopped_on_two_hosts_of_four, twenty_steps, tmp_path, digits_dir
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped_on_two_hosts_of_four, workdir)
    outputs = in_processes(
        processes,
        workdir,
        *TWENTY_STEPS,
        f"--config.fsdp={fsdp}",
        digits_dir=digits_dir,
        devices=devices,
    )
    assert f"{8 if devices > 1 else 1} cpu device" in outputs[0]
    assert (f"({processes} processes on 1 host)" in outputs[0]) == (processes > 1)
    assert "Resuming" in outputs[0]
    ours, one_device = read_metrics(workdir), read_metrics(twenty_steps[0])
    assert sorted(ours) == list(range(1, 21))
    np.testing.assert_allclose(
        [ours[step] for step in sorted(ours)],
        [one_device[step] for step in sorted(ours)],
        rtol=1e-3,
    )


def test_a_finished_run_started_again_trains_no_more_and_reports_again(twenty_steps):
    workdir, _ = twenty_steps
    before = (workdir / "metrics.jsonl").read_text()
    done = run_python("main.py", f"--workdir={workdir}")
    assert "complete at step 20." in done.stdout and "Test accuracy" in done.stdout
    assert "Compiling" not in done.stdout
    assert (workdir / "metrics.jsonl").read_text() == before


def test_evaluation_mode_repeats_the_run_s_figures_from_its_own_config(twenty_steps, tmp_path):
    workdir, _ = twenty_steps
    output = evaluate(
        workdir / "checkpoints" / "best",
        f"--json={tmp_path / 'figures.json'}",
        "--config.eval_batch_size=32",
    )
    report = json.loads((workdir / "eval.json").read_text())
    assert report["step"] == 20 and report["overrides"] == {"eval_batch_size": 32}
    assert "images of digits, eval_batch_size=32:" in output
    result = json.loads((workdir / "result.json").read_text())
    for name in ("eval", "eval_ema"):
        assert report[name]["top1"] == result[name]["top1"]
        assert report[name]["loss"] == pytest.approx(result[name]["loss"], rel=1e-4)
    assert f"{100 * result['eval']['top1']:.2f}%" in output
    assert json.loads((tmp_path / "figures.json").read_text()) == report


def test_best_and_every_nth_are_saved_where_epochs_are_no_whole_number_of_steps(
    tiny_config, tmp_path
):
    tiny_config.epochs = 0.62  # 14 of 22.47 steps
    tiny_config.eval_every_epochs = 1.0
    tiny_config.checkpoint.every_epochs = 0.1  # 2 steps
    tiny_config.checkpoint.keep_every_epochs = 0.3  # 7 steps are no multiple of 2; 6 are
    tiny_config.checkpoint.keep_latest = 1
    loop.train(tiny_config, epath.Path(tmp_path))
    top1 = read_metrics(tmp_path, "eval/top1")
    assert sorted(top1) == [2, 4, 6, 8, 10, 12, 14]  # before every save
    kept = {int(p.name) for p in (tmp_path / CHECKPOINTS).iterdir()}
    assert {6, 12, 14} <= kept
    assert max(top1.values()) in {top1[step] for step in kept}


def test_unreadable_images_are_counted_and_named(rotten_folder, tiny_config, tmp_path, capfd):
    data = rotten_folder
    for i in (0, 1):
        shutil.copy(data / "train" / "a" / "4.jpg", data / "train" / "a" / f"{i}.jpg")
    (data / "test" / "b" / "0.jpg").write_bytes(b"nor this")
    tiny_config.data.name = str(data)
    tiny_config.update(batch_size=16, epochs=2.0)
    result = loop.train(tiny_config, epath.Path(tmp_path / "run"))
    output = capfd.readouterr().out
    assert "Unreadable image: " + str(data / "train" / "a" / "2.jpg") in output
    assert "Unreadable image: " + str(data / "test" / "b" / "0.jpg") in output
    assert sum(read_metrics(tmp_path / "run", "bad_images").values()) == 2  # once an epoch
    assert result["eval"]["top5"] == pytest.approx(15 / 16)  # two classes: only the bad one fails


@pytest.fixture
def rotten_folder(tmp_path):
    """Sixteen images in two classes, three of which are unreadable."""
    from tests.archives import encode, photographs

    for split in ("train", "test"):
        for name in ("a", "b"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i, photo in enumerate(photographs(8, seed=1)):
                file = tmp_path / "photos" / split / name / f"{i}.jpg"
                file.write_bytes(encode(photo.resize((40, 30))))
    for i in range(3):
        (tmp_path / "photos" / "train" / "a" / f"{i}.jpg").write_bytes(b"no image")
    return tmp_path / "photos"


def test_too_many_unreadable_images_end_the_run_once_its_last_step_is_saved(
    rotten_folder, tiny_config, tmp_path, capfd
):
    workdir = tmp_path / "run"
    tiny_config.data.name = str(rotten_folder)
    tiny_config.update(batch_size=16, epochs=4.0)
    with pytest.raises(UserError, match=r"[23] of 16 images .* allows 1; .*\.jpg.*; step (\d) is"):
        loop.train(tiny_config, epath.Path(workdir))
    (step,) = (int(path.name) for path in (workdir / CHECKPOINTS).iterdir())

    tiny_config.stop_at_step = step + 1  # after which there is no more to lose
    result = loop.train(tiny_config, epath.Path(workdir))
    assert result["step"] == step + 1
    assert "The last step is done, but " in capfd.readouterr().out


def test_an_evaluation_that_fails_loses_no_step_and_is_made_up_for(
    rotten_folder, tiny_config, tmp_path
):
    for file in (rotten_folder / "test" / "a" / f"{i}.jpg" for i in range(4)):
        file.write_bytes(b"no image")
    workdir = epath.Path(tmp_path / "run")
    tiny_config.data.update(name=str(rotten_folder), max_bad_fraction=0.18)  # 3 in training
    tiny_config.checkpoint.every_epochs = 1.0
    tiny_config.update(batch_size=16, epochs=2.0)
    for _ in range(2):
        with pytest.raises(UserError, match="4 of 16 images .* allows 3; .*step 1 is saved"):
            loop.train(tiny_config, workdir)
        assert [path.name for path in (workdir / CHECKPOINTS).iterdir()] == ["1"]
    tiny_config.data.max_bad_fraction = 0.5
    loop.train(tiny_config, workdir)
    assert sorted(read_metrics(workdir, "eval/top1")) == [1, 2]


@pytest.mark.slow  # its neighbours check the naming and the bound
def test_unreadable_images_within_the_bound_are_named_once(
    rotten_folder, tiny_config, tmp_path, capfd
):
    tiny_config.data.update(name=str(rotten_folder), max_bad_fraction=0.2)
    tiny_config.update(batch_size=16, epochs=4.0)
    assert loop.train(tiny_config, epath.Path(tmp_path / "run"))["step"] == 4
    output = capfd.readouterr().out
    named = [
        output.count(f"Unreadable image: {rotten_folder / 'train' / 'a' / f'{i}.jpg'}")
        for i in range(3)
    ]
    assert max(named) == 1 and sum(named) >= 2  # four epochs of repeats may miss one


def test_synthetic_data_need_no_data_set_and_chosen_steps_are_profiled(
    tiny_config, tmp_path, digits_dir
):
    tiny_config.data.update(synthetic=True, name="imagenet2012", data_dir="/nowhere")
    tiny_config.model.num_classes = 10
    tiny_config.stop_at_step = 4
    tiny_config.profile = (2, 3)
    assert loop.train(tiny_config, epath.Path(tmp_path))["step"] == 4
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))

    tiny_config.data.update(synthetic=False, name="digits", data_dir=str(digits_dir))
    with pytest.raises(UserError, match=r"not trained with config.data.synthetic=False; give"):
        loop.train(tiny_config, epath.Path(tmp_path))


@pytest.mark.slow  # three processes; test_evaluation.py checks batch sizes in one
def test_evaluation_is_exact_for_any_batch_size_and_device_count(twenty_steps):
    workdir, _ = twenty_steps
    result = json.loads((workdir / "result.json").read_text())["eval"]
    for devices, batch_size in ((1, 359), (1, 50), (4, 1000)):
        evaluate(workdir, f"--config.eval_batch_size={batch_size}", devices=devices)
        report = json.loads((workdir / "eval.json").read_text())["eval"]
        assert report["top1"] == result["top1"] and report["top5"] == result["top5"]
        assert report["loss"] == pytest.approx(result["loss"], rel=1e-4)


def test_one_class_is_refused(rotten_folder, tiny_config, tmp_path):
    for split in ("train", "test"):
        shutil.rmtree(rotten_folder / split / "b")
    tiny_config.data.name = str(rotten_folder)
    tiny_config.batch_size = 16
    with pytest.raises(UserError, match="has 1 class, but a classifier needs at least two; give"):
        loop.train(tiny_config, epath.Path(tmp_path / "run"))
