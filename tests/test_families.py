"""Everything works for every family: a tiny model of each is trained, and its weights are used."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from flax.traverse_util import flatten_dict
from PIL import Image

import sret_jax
from configs import common, quickstart
from sret_jax.errors import UserError
from sret_jax.models.variables import is_head
from sret_jax.planning.plan import plan
from sret_jax.settings.saved_config import load_config
from sret_jax.tools import anytime, depth, export, predict
from sret_jax.tools.show_batch import show_batch
from tests.run.test_loop import checkpoint_arrays
from tests.tools import test_soft_labels

# Settings of a small form of each model. At 16 pixels it has 4x4 tokens or fewer.
TINY = {
    "deit_tiny_distilled": dict(
        blocks=(2,), heads=(2,), dim=8, patch_size=4, adapters=("lora:2", "norms", "embedding@2")
    ),
    "sret_t": dict(blocks=(1, 1), heads=(2, 4), dim=8, mlp_ratio=2.0, groups=((2, 1), (1, 1))),
    "mixer_s16": dict(blocks=(2,), width=16, patch_size=4),
    "pit_ti_distilled": dict(blocks=(1, 1), heads=(2, 4), dim=8, patch_size=8),
    "swin_tiny": dict(blocks=(2, 1), heads=(2, 4), dim=8, window=2),
}
IN_DEFAULT_SUITE = "deit_tiny_distilled"
PAIRS = (("deit_tiny_distilled", "mixer_s16"), ("mixer_s16", "sret_t"))  # student, teacher


def tiny(name, digits_dir):
    """The config of a run of one step on the digits."""
    config = quickstart.get_config()
    config.model = common.get_config().model
    config.model.update(name=name, image_size=16, dtype="float32", loops=2, **TINY[name])
    config.data.data_dir = str(digits_dir)
    config.epochs, config.stop_at_step, config.fsdp = 1.0, 1, 4
    return config


@pytest.fixture(
    scope="module",
    params=[
        name if name == IN_DEFAULT_SUITE else pytest.param(name, marks=pytest.mark.slow)
        for name in TINY
    ],
)
def run(request, digits_dir, tmp_path_factory):
    """The config of a run of one step, and its workdir."""
    workdir = epath.Path(tmp_path_factory.mktemp(request.param)) / "run"
    config = tiny(request.param, digits_dir)
    sret_jax.fit(config, workdir)
    return config, workdir


def changed(run, **settings):
    """The config of a run with other settings of its model."""
    config = run[0].copy_and_resolve_references()
    config.model.update(settings)
    return config


def test_a_run_that_was_stopped_ends_bitwise_as_one_that_was_not(run, tmp_path):
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "stopped")
    config = changed(run)
    config.stop_at_step = 2
    for name in ("stopped", "whole"):
        sret_jax.fit(config, tmp_path / name)
    stopped, whole = (checkpoint_arrays(tmp_path / name, 2) for name in ("stopped", "whole"))
    assert stopped.keys() == whole.keys()
    for path, array in stopped.items():
        np.testing.assert_array_equal(array, whole[path], err_msg=path)


def test_its_head_is_trained_on_other_classes_at_another_resolution(run, tmp_path, capsys):
    config = changed(run, image_size=32, num_classes=12)
    config.init_from = str(run[1])
    config.optim.update(freeze_backbone=True, layer_decay=0.5)
    if config.model.name.startswith("mixer"):
        with pytest.raises(UserError, match="cannot change its image size to 32"):
            sret_jax.fit(config, tmp_path)
        config.model.image_size = 16
    sret_jax.fit(config, tmp_path / "tuned")
    said = capsys.readouterr().out
    assert "a new head for 12 classes, not the 10 there" in said
    runs = (tmp_path / "tuned", run[1])
    tuned, before = (flatten_dict(sret_jax.load(run)[1]["params"]) for run in runs)
    for path, array in before.items():
        if is_head(path[0]):
            assert tuned[path].shape[-1] == 12
        elif array.shape == tuned[path].shape:  # all others are resized
            np.testing.assert_array_equal(tuned[path], array, err_msg="/".join(path))


def test_it_is_evaluated_with_other_loops_which_is_said(run, capsys):
    anytime.main([str(run[1]), "--loops=1,2"])
    assert "Evaluating with 1 loop instead of 2" in capsys.readouterr().out


@pytest.mark.slow
def test_it_is_exported_and_predicts_the_same(run, tmp_path, capsys):
    picture = tmp_path / "scan.png"
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(picture)
    predict.main([f"--checkpoint={run[1]}", str(picture), f"--json={tmp_path / 'found.json'}"])
    (found,) = json.loads((tmp_path / "found.json").read_text())
    export.main([f"--checkpoint={run[1]}", str(tmp_path / "exported")])
    program = jax.export.deserialize((tmp_path / "exported" / export.MODEL).read_bytes())
    probabilities = jax.nn.softmax(jax.jit(program.call)(pixels[None])[0])
    for one in found["top"]:
        assert one["probability"] == pytest.approx(float(probabilities[one["label"]]), rel=1e-4)


@pytest.mark.slow
def test_its_depth_and_its_batch_are_drawn_and_its_step_is_planned(run, tmp_path):
    config, workdir = run
    depth.main([f"--workdir={workdir}"])
    figures = json.loads((workdir / "depth.json").read_text())
    assert len(figures["gradient_norm"]["start"]) == figures["blocks"] * figures["loops"]
    assert bool(figures["coefficients"]) == (config.model.name == "sret_t")
    assert show_batch(changed(run), tmp_path, 0, 2, 2).exists()
    planned = plan(changed(run), "local", find_batch=False, json_file=None)
    params = sret_jax.load(workdir)[1]["params"]
    assert planned["parameters"] == sum(x.size for x in jax.tree.leaves(params))


@pytest.mark.slow
@pytest.mark.parametrize("loops", [1, 2])
def test_it_learns_two_depths_and_nlls_in_micro_batches(run, loops, tmp_path):
    config = changed(run, nll_ratio=0.5, residual="learned", loops=3)
    config.mixed_depth.loops, config.grad_accum = loops, 2
    sret_jax.fit(config, tmp_path)
    loaded, variables = sret_jax.load(tmp_path)
    assert variables["params"]["stage0_block0"]["nll"]["norm"]["scale"].shape[0] == 3
    assert load_config(epath.Path(tmp_path)).model.name == config.model.name and loaded.loops == 3


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_any_family_teaches_any_other_in_the_step_and_by_stored_labels(
    student, teacher, digits_dir, tmp_path, capsys
):
    sret_jax.fit(tiny(teacher, digits_dir), tmp_path / "teacher")
    config = tiny(student, digits_dir)
    config.teacher = str(tmp_path / "teacher")
    config.distill.hard_weight = 0.5  # two heads need both kinds of labels
    sret_jax.fit(config, tmp_path / "taught")
    assert "Teacher: a model of " in capsys.readouterr().out
    arguments = test_soft_labels.generate_args(tmp_path / "store", config.teacher, digits_dir)
    test_soft_labels.command(*arguments)
    config.teacher = ""
    config.data.update(soft_labels=str(tmp_path / "store"), crops_per_image=2)
    config.augment.update(test_soft_labels.PLAIN, label_smoothing=0.0)
    assert sret_jax.fit(config, tmp_path / "by_labels")["step"] == 1
