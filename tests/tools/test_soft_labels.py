"""Soft labels are generated, resumed, imported, inspected and verified by the real command."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from etils import epath

import sret_jax
from configs import quickstart
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.distillation.label_teachers import earlier_fingerprints, fingerprint
from sret_jax.distillation.soft_labels import open_soft_labels
from sret_jax.distillation.soft_targets import marginal_smoothing
from sret_jax.distillation.teacher import open_teacher
from sret_jax.errors import UserError
from sret_jax.files import absolute
from sret_jax.models.apply import normalise
from sret_jax.models.model_settings import model_settings
from sret_jax.models.registry import create_model
from sret_jax.models.variables import abstract_variables
from sret_jax.parallel.mesh import make_mesh
from sret_jax.planning.plan import Planner
from sret_jax.planning.topology import open_topology
from sret_jax.run import loop
from sret_jax.settings.config_model import create_from_config
from sret_jax.tools import soft_labels
from sret_jax.training.experiment import open_experiment
from tests.conftest import ROOT, TINY_FLAGS, read_metrics

NEW = pathlib.Path(tempfile.gettempdir()) / "sret_jax_no_room"
PLAIN = dict(policy="", erasing=0.0, mixup=0.0, cutmix=0.0, repeats=1)
MODEL_FLAGS = TINY_FLAGS[:4]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A run of an untrained model with widely spread logits."""
    return write_teacher(tmp_path_factory.mktemp("teacher"), classes=10)


def write_teacher(folder, classes):
    config = quickstart.get_config()
    config.model.update(blocks=(1,), groups=((4, 2),), heads=(2,), dim=8)
    model = create_from_config(config, num_classes=classes)
    variables = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))
    variables["params"]["head"]["kernel"] *= 30
    with contextlib.closing(Checkpoints(epath.Path(folder))) as checkpoints:
        checkpoints.save(1, {"model": variables, "ema": variables})
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return folder


def generate_args(out, teacher, digits_dir, *more):
    return [
        "generate",
        "--config=configs/quickstart.py",
        f"--config.data.data_dir={digits_dir}",
        *MODEL_FLAGS,
        f"--teacher={teacher}",
        "--crops=3",
        "--keep=topk4",
        f"--out={out}",
        *more,
    ]


def command(*args):
    """Runs the command line in this process."""
    argv = [str(arg) for arg in args]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["soft_labels", *argv])  # ml_collections reads settings there
        try:
            soft_labels.main(argv)
        finally:
            for name in [name for name in flags.FLAGS if name.startswith("config")]:
                delattr(flags.FLAGS, name)


def fails(capsys, args):
    """The one sentence of a command that is refused."""
    with pytest.raises(SystemExit) as stopped:
        command(*args)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def store(teacher, digits_dir, tmp_path_factory):
    """A store with labels of all digits."""
    out = tmp_path_factory.mktemp("labels") / "store"
    command(*generate_args(out, teacher, digits_dir))
    return out


@pytest.fixture
def config(tiny_config, store):
    """The config of a student that can learn from the store."""
    tiny_config.augment.update(PLAIN)
    tiny_config.model.update(blocks=(1,), groups=((2,),), loops=1, heads=(2,))
    tiny_config.data.update(soft_labels=str(store), crops_per_image=2)
    return tiny_config


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_replayed_batch_has_the_labels_the_teacher_gives_it(config, teacher, tmp_path):
    experiment = open_experiment(config, absolute(tmp_path))
    config.teacher = str(teacher)
    live = open_teacher(config, make_mesh(), experiment.model)
    loader = experiment.train_batches(start_step=9)
    batch = jax.device_get(next(loader))
    loader.close()
    kept = marginal_smoothing(batch["soft"], batch["soft_classes"], 10)
    images = normalise(live.model, jnp.asarray(batch["image"]))
    exact = live.probabilities(live.place(), images, live.model)
    best, classes = jax.lax.top_k(exact, 4)
    assert float(exact.std()) > 0.05, "a teacher without opinions tests nothing"
    np.testing.assert_allclose(kept, marginal_smoothing(best, classes, 10), atol=5e-4)
    np.testing.assert_allclose(kept.sum(axis=1), 1, atol=2e-3)


def test_a_student_learns_stored_labels(config, tmp_path):
    config.stop_at_step = 2
    loop.train(config, epath.Path(tmp_path))
    assert all(np.isfinite(read_metrics(tmp_path)[step]) for step in (1, 2))
    # The untrained teacher is mostly wrong, so the labels learnt are not the true classes.
    assert read_metrics(tmp_path, "teacher_top1")[2] < 0.7


def test_a_plan_searches_batches_of_whole_sets_of_crops(config):
    assert Planner(config, open_topology("local"))._unit == 8 * 2
    config.batch_size = 96
    config.data.crops_per_image = 3
    assert Planner(config, open_topology("local"))._unit == 8 * 3


def test_hosts_together_write_what_one_writes(store, teacher, digits_dir, tmp_path, capsys):
    out = tmp_path / "store"
    for host in (1, 0):
        more = ("--shards=2", f"--shard={host}")
        command(*generate_args(out, teacher, digits_dir, *more))
        if host == 1:
            assert "1 of 3 are there" in capsys.readouterr().out
            with pytest.raises(UserError, match=r"incomplete \(1 of 3 shards exist\)"):
                open_soft_labels(absolute(out))
    assert contents(out) == contents(store)


def test_a_killed_generation_goes_on_and_its_half_store_is_not_trained_on(
    store, teacher, digits_dir, config, tmp_path
):
    out = tmp_path / "store"
    args = generate_args(out, teacher, digits_dir)
    process = subprocess.Popen(
        [sys.executable, "-m", "sret_jax.tools.soft_labels", *args],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    deadline = time.time() + 120
    while not list(out.glob("labels-*")) and time.time() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("labels-*")}
    assert 0 < len(finished) < 3, "the kill came too early or too late to test anything"

    config.data.soft_labels = str(out)
    with pytest.raises(UserError, match="are incomplete .* start the command that generates them"):
        open_experiment(config, absolute(tmp_path / "run"))
    command(*args)
    assert contents(out) == contents(store)
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


def test_inspect_and_verify_say_what_a_store_holds(store, teacher, digits_dir, capsys):
    command("inspect", store)
    said = capsys.readouterr().out
    for words in ("digits train, 1,438 images", "3 of 3 shards; complete", "topk4", "75 an image"):
        assert words in said
    flags = [arg for arg in generate_args("", teacher, digits_dir) if arg.startswith("--config")]
    command("verify", store, "--images=20", *flags)
    said = capsys.readouterr().out
    assert "Compared 60 crops of 20 images" in said and "the true one" in said
    difference = float(said.split("Largest difference of a probability: ")[1].split()[0])
    assert difference < 5e-4


def test_verify_notices_another_teacher(store, digits_dir, tmp_path, capsys):
    other = write_teacher(tmp_path, classes=10)
    config = json.loads((other / "config.json").read_text())
    config["model"]["groups"] = [[1, 1]]
    (other / "config.json").write_text(json.dumps(config))
    flags = ["--config=configs/quickstart.py", f"--config.data.data_dir={digits_dir}"]
    error = fails(capsys, ["verify", store, f"--teacher={other}", *flags])
    assert "is not the teacher of" in error


def test_teachers_of_the_same_arrays_that_compute_otherwise_have_other_fingerprints():
    settings = dict(blocks=(1,), groups=((4, 2),), heads=(2,), dim=8, image_size=32, loops=2)
    model = create_model("sret_t", **settings)
    arrays = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(model))
    changes = (
        {},
        *(dict(heads=(4,), dim=4), dict(groups=((2, 2),)), dict(permutation="identity")),
        dict(dtype=jnp.bfloat16),
    )
    prints = [fingerprint(model.clone(**change), arrays) for change in changes]
    assert len(set(prints)) == len(prints)
    for same in (dict(unroll=1, remat="block", attention="xla"), dict(drop_path_rate=0.5)):
        assert fingerprint(model.clone(**same), arrays) == prints[0]
    arrays["params"]["head"]["bias"] = arrays["params"]["head"]["bias"] + 1
    assert fingerprint(model, arrays) not in prints
    other_family = type("Other", (type(model),), {}).of(**model_settings(model))
    assert fingerprint(other_family, arrays) != fingerprint(model, arrays)


@pytest.mark.parametrize("form", [0, 1])
def test_stores_with_an_earlier_fingerprint_are_verified_and_gone_on_with(
    form, store, teacher, digits_dir, tmp_path, capsys
):
    old = shutil.copytree(store, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    loaded = sret_jax.load(teacher, dtype=jnp.float32)
    manifest["teacher"]["fingerprint"] = earlier_fingerprints(*loaded)[form]
    (old / "manifest.json").write_text(json.dumps(manifest))
    args = generate_args(old, teacher, digits_dir)
    command("verify", old, "--images=2", *[arg for arg in args if arg.startswith("--config")])
    said = capsys.readouterr().out
    assert "has an older form, which does not include all of family" in said
    assert "Largest difference" in said
    command(*args)
    assert f"Complete: {old}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.image_size": 32}, "made with config.model.image_size=16, and this config has 32"),
        ({"distill.temperature": 2.0}, "config.distill.temperature=1.0, and this config has 2.0"),
        ({"augment.crop_scale": (0.5, 1.0)}, r"crop_scale=\(0.6, 1.0\), and this config has"),
        ({"augment.flip": 0.5}, "augment.flip=0.0, and this config has 0.5"),
        ({"augment.policy": "three"}, "policy='three' changes what the teacher saw"),
        ({"augment.mixup": 0.8}, "mixup=0.8 changes .* set config.augment.mixup=0.0"),
        ({"augment.cutmix": 1.0}, "cutmix=1.0 changes"),
        ({"augment.erasing": 0.25}, "erasing=0.25 changes"),
        ({"augment.repeats": 3}, "repeats=3 repeats images as config.data.crops_per_image does"),
        ({"data.train_split": "train[:90%]"}, r"\(1,438 images of 10 classes\).*\(1,294 images"),
        ({"data.train_split": "train[1:]+test[:1]"}, r"train \(its images differ\), and this is"),
        ({"data.crops_per_image": 4}, "crops_per_image=4 is more than the 3 crops"),
        ({"data.crops_per_image": 0}, "crops_per_image=0 must be above 0"),
        ({"data.soft_labels": "", "data.crops_per_image": 2}, "requires stored soft labels; set"),
        ({"data.soft_labels": "/nowhere"}, "/nowhere holds no soft labels .* make some with"),
        ({"data.synthetic": True}, "synthetic=True has no images to label"),
        ({"teacher": "runs/x"}, "teacher=runs/x and config.data.soft_labels=.* leave one out"),
        ({"model.num_classes": 12}, "are of 10 classes, and config.model.num_classes=12"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_labels_that_do_not_fit_the_config_are_refused(changes, sentence, config, tmp_path):
    if "data.crops_per_image" not in changes:
        config.data.crops_per_image = 1
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=sentence):
        open_experiment(config, absolute(tmp_path))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--crops=0"], "--crops=0 must be at least 1"),
        (["--keep=top5"], "--keep=top5 must be topk5, topk10 or full"),
        (["--keep=topk11"], "--keep=topk11 is more than the 10 classes"),
        (["--shards=2", "--shard=2"], "--shard=2 of --shards=2 does not exist"),
        (["--config.distill.temperature=0"], "temperature=0.0 must be above 0"),
        (["--crops=1000000000", f"--out={NEW}"], "MB left, and the soft labels take"),
        (["--teacher=/nowhere"], "teacher=/nowhere: there is no file or folder"),
        (["--teacher=onnx:/nowhere.onnx"], "onnx:/nowhere.onnx cannot be read"),
        (["--config.augment.flip=0.5"], "begun with law.flip=0.0, and this command has law.flip"),
        (["--crops=4"], "begun with crops=3, and this command has crops=4; give the same"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_generated_is_refused(more, sentence, store, teacher, digits_dir, capsys):
    before = contents(store)
    assert sentence in fails(capsys, generate_args(store, teacher, digits_dir, *more))
    assert contents(store) == before
    shutil.rmtree(NEW, ignore_errors=True)


def test_a_folder_that_holds_something_else_is_left_alone(teacher, digits_dir, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    error = fails(capsys, generate_args(tmp_path, teacher, digits_dir))
    assert "exists and holds something else" in error
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_a_teacher_of_other_classes_is_refused(digits_dir, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    other = write_teacher(tmp_path / "other", classes=12)
    error = fails(capsys, generate_args(tmp_path / "store", other, digits_dir))
    assert "has 12 classes and the student 10" in error
