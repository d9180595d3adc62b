"""Runs that start from another run's weights."""

import contextlib
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

import sret_jax
from configs import quickstart
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.errors import UserError
from sret_jax.models.loops import with_loops
from sret_jax.models.position import resize_position
from sret_jax.models.variables import abstract_variables, block_names
from sret_jax.settings.saved_config import save_description
from sret_jax.tools.convert import convert
from sret_jax.tools.hub_folder import write_hub_folder
from sret_jax.training.experiment import open_experiment
from sret_jax.training.initial_weights import initial_state
from sret_jax.weights.adaptation import reorder_classes
from sret_jax.weights.loading import find
from tests.hub_cache import HubCache, files_of


def make_config(digits_dir, **model):
    config = quickstart.get_config()
    tiny = dict(image_size=16, groups=((2, 1), (1, 1)), heads=(2, 4), dim=8)
    config.model.update({**tiny, **model})
    config.epochs = 1.0
    config.batch_size = config.eval_batch_size = 64
    config.data.data_dir = str(digits_dir)
    return config


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory):
    """A workdir that looks like a run's at step 2: weights and their moving average."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    config = make_config(digits_dir)
    config.seed = 7
    raw = jax.device_get(open_experiment(config, workdir).init_state().variables)
    average = jax.tree.map(lambda x: x + 1, raw)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(2, {"model": raw, "ema": average})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "class_names.json").write_text(json.dumps([str(i) for i in range(10)]))
    return workdir, raw, average


@pytest.fixture
def start(digits_dir, tmp_path):
    """Starts a run from a path, without a step; returns its experiment, state and sentence."""

    def start(path, *, fsdp=1, init_ema=False, **model):
        config = make_config(digits_dir, **model)
        config.update(init_from=str(path), init_ema=init_ema, fsdp=fsdp)
        experiment = open_experiment(config, epath.Path(tmp_path) / "new")
        said = []
        return experiment, initial_state(experiment, said.append), " ".join(said)

    return start


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(tree), jax.device_get(expected))


@pytest.mark.parametrize("ema", [False, True])
def test_a_run_starts_from_raw_or_averaged_weights_and_so_does_its_average(run, start, ema):
    workdir, raw, average = run
    _, state, said = start(workdir / "checkpoints" / "2", init_ema=ema)
    assert said == f"Starting from {workdir}/checkpoints/2."
    assert_equal(state.variables, average if ema else raw)
    assert_equal(state.ema, state.variables)
    assert int(state.step) == 0 and not np.any(jax.tree.leaves(state.opt_state)[1])


def test_a_run_starts_from_a_name_on_the_hub(run, start, tmp_path, monkeypatch):
    workdir, raw, _ = run
    write_hub_folder(find(workdir), epath.Path(tmp_path) / "folder")
    hub = HubCache(tmp_path / "hub", monkeypatch)
    commit = hub.add("me/digits", files_of(tmp_path / "folder"), "v1")
    _, state, said = start("hf://me/digits@v1")
    now = f"hf://me/digits@v1 is now at hf://me/digits@{commit}."
    assert said == f"{now} Starting from hf://me/digits@v1."
    assert_equal(state.variables, raw)
    with pytest.raises(UserError, match="^config.init_from=hf://me/none: .* is not in the cache"):
        start("hf://me/none")


def test_another_size_and_other_loops_keep_the_rest_and_lie_split_over_devices(run, start):
    workdir, raw, _ = run
    experiment, state, said = start(workdir, fsdp=4, image_size=32, loops=3)
    assert "32 pixels instead of 16 (pos_embed resized from 2x2 to 4x4); 3 loops" in said
    _, expected = with_loops(sret_jax.load(workdir)[0], raw, 3)
    position = resize_position(expected["params"].pop("pos_embed"), 4)
    params = state.variables["params"]
    np.testing.assert_allclose(params.pop("pos_embed"), position, atol=1e-6)
    assert_equal(state.variables, expected)
    kernel = params["stage1_block0"]["block"]["mlp"]["fc1"]["kernel"]
    assert (
        kernel.sharding
        == experiment.shardings.variables["params"]["stage1_block0"]["block"]["mlp"]["fc1"][
            "kernel"
        ]
    )
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_adapters_that_the_weights_lack_are_new_and_others_are_refused(run, start, tmp_path):
    workdir, raw, _ = run
    experiment, state, said = start(workdir, adapters=("lora:2", "embedding"))
    assert said == f"Starting from {workdir}, with new adapters lora:2, embedding."
    params = dict(state.variables["params"])
    fresh = experiment.init_state().variables["params"]
    for block in block_names(experiment.model):
        own = dict(params[block])
        assert_equal(own.pop("lora"), fresh[block]["lora"])
        assert not np.any(own.pop("embedding")["bias"])
        params[block] = own
    assert_equal(params, raw["params"])

    with contextlib.closing(Checkpoints(epath.Path(tmp_path / "run"))) as checkpoints:
        checkpoints.save(0, {"model": jax.device_get(state.variables)})
    save_description(experiment.config, experiment.eval_source.class_names, None, tmp_path / "run")
    with pytest.raises(UserError, match=r"adapters is \('lora:2', 'embedding'\) there, \(\) here"):
        start(tmp_path / "run")


def test_other_classes_get_a_fresh_head(run, start, tmp_path):
    workdir, raw, _ = run
    _, state, said = start(workdir, num_classes=12)
    assert "a new head for 12 classes, not the 10 there" in said
    assert state.variables["params"].pop("head")["kernel"].shape == (32, 12)
    head = raw["params"]["head"]
    raw = {**raw, "params": {k: v for k, v in raw["params"].items() if k != "head"}}
    assert_equal(state.variables, raw)

    renamed = tmp_path / "renamed"
    shutil.copytree(workdir / "checkpoints", renamed / "checkpoints")
    (renamed / "class_names.json").write_text(json.dumps([*"01", "too", *"3456789"]))
    _, state, said = start(renamed)
    assert "a new head for 10 classes, not the 10 there: class 2 is 'too' there and '2' in" in said
    assert not np.array_equal(state.variables["params"]["head"]["bias"], head["bias"])

    (renamed / "class_names.json").write_text(json.dumps([*"9876543210"]))
    _, state, said = start(renamed)
    assert said.endswith("with the head's classes in the order of the data.")
    assert_equal(state.variables["params"]["head"], jax.tree.map(lambda x: x[..., ::-1], head))


def test_both_heads_of_a_distilled_model_are_new_or_reordered(start, tmp_path):
    name = "deit_tiny_distilled"
    sizes = dict(image_size=16, blocks=(1,), groups=None, heads=(2,), dim=8, patch_size=8)
    settings = dict(**sizes, loops=1, mlp_ratio=4.0, drop_path_rate=0.05)
    model = sret_jax.create_model(name, num_classes=10, **settings)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(model))
    save_file(sret_jax.to_torch(zeros, model), tmp_path / "w.safetensors")
    _, state, said = start(tmp_path / "w.safetensors", name=name, num_classes=12, **settings)
    assert "a new head for 12 classes, not the 10 there" in said
    params = state.variables["params"]
    for part, leaves in params.items():
        assert np.any(leaves["kernel"] if "head" in part else jax.tree.leaves(leaves)[0]) == (
            part in ("head", "head_dist")
        )
    heads = {part: params[part] for part in ("head", "head_dist")}
    reversed_heads = jax.tree.map(lambda x: x[..., ::-1], heads)
    reordered = reorder_classes({"params": params}, range(12)[::-1])
    assert_equal(reordered, {"params": {**params, **reversed_heads}})


def test_files_and_converted_folders_of_any_architecture_serve_too(run, start, tmp_path):
    workdir, raw, _ = run
    model, _ = sret_jax.load(workdir)
    save_file(sret_jax.to_torch(raw, model), tmp_path / "weights.safetensors")
    _, state, said = start(tmp_path / "weights.safetensors", image_size=32)
    assert "32 pixels instead of 16" in said
    assert "class names are not compared: class 0 is taken for '0', 9 for '9'" in said
    assert "weights.safetensors does not say which settings its weights were trained with" in said
    assert_equal(state.variables["batch_stats"], raw["batch_stats"])
    assert_equal(state.variables["params"]["head"], raw["params"]["head"])

    _, other, said = start(tmp_path / "weights.safetensors", loops=1)
    assert "1 loop instead of 2 (the first NLLs stay)" in said
    # There is no config.json.
    shutil.copytree(workdir / "checkpoints", tmp_path / "converted" / "checkpoints")
    assert_equal(start(tmp_path / "converted", loops=1)[1].variables, other.variables)


def test_weights_that_say_what_they_are_are_compared_with_the_run_s_model(run, start, tmp_path):
    convert(run[0], epath.Path(tmp_path / "w.safetensors"), None)
    for path in (run[0], tmp_path / "w.safetensors"):
        _, _, said = start(path, groups=((1,), (1,)))
        assert said == f"Starting from {path}, with groups ((1,), (1,)) instead of ((2, 1), (1,))."
        with pytest.raises(UserError, match=r"heads is \(2, 4\) there, \(4, 8\) here; dim"):
            start(path, heads=(4, 8), dim=4)


def test_a_run_of_the_head_alone_resumes_when_what_it_started_from_is_gone(
    run, digits_dir, tmp_path, capsys
):
    gone = tmp_path / "gone"
    shutil.copytree(run[0], gone)
    config = make_config(digits_dir)
    config.init_from, config.stop_at_step = str(gone), 1
    config.optim.freeze_backbone = True
    sret_jax.fit(config, tmp_path / "tuned")
    shutil.rmtree(gone)
    config.stop_at_step = 2
    assert sret_jax.fit(config, tmp_path / "tuned")["step"] == 2
    said = capsys.readouterr().out
    assert said.count("Starting from") == 1 and "at step 1." in said
    _, tuned = sret_jax.load(tmp_path / "tuned")
    heads = [variables["params"]["head"] for variables in (tuned, run[1])]
    assert not np.allclose(*(head["kernel"] for head in heads))
    tuned["params"]["head"] = heads[1]
    assert_equal(tuned, run[1])
    assert "Worst classes: " in said
    assert json.loads((tmp_path / "tuned" / "per_class.json").read_text())["step"] == 2
    with pytest.raises(UserError, match="init_from=.*gone: there is no .*gone; give a run"):
        sret_jax.fit(config, tmp_path / "another")


def test_what_cannot_be_started_from_is_said_in_a_sentence(run, start, tmp_path):
    workdir, raw, _ = run
    save_file(sret_jax.to_torch(raw, sret_jax.load(workdir)[0]), tmp_path / "weights.safetensors")
    shutil.copytree(workdir / "checkpoints", tmp_path / "converted" / "checkpoints")
    shutil.rmtree(tmp_path / "converted" / "checkpoints" / "2" / "ema")
    for path, changed, sentence in (
        (tmp_path / "none.pth", {}, "there is no .*none.pth; give a run"),
        (tmp_path, {}, "holds no checkpoints/"),
        (workdir / "checkpoints" / "11", {}, r"no readable step 11; there are \[2\]"),
        (
            workdir,
            dict(mlp_ratio=3.0),
            "another arch.*mlp_ratio is 2.0 there, 3.0 here",
        ),
        (workdir, dict(heads=(4, 8), dim=4), r"heads is \(2, 4\) there, \(4, 8\) here"),
        (tmp_path / "weights.safetensors", dict(mlp_ratio=3.0), "another arch.*mlp.fc1.*expected"),
        (tmp_path / "weights.safetensors", dict(init_ema=True), "set config.init_ema=False"),
        (tmp_path / "converted", dict(init_ema=True), "set config.init_ema=False"),
    ):
        with pytest.raises(UserError, match=f"^config.init_from={path}: .*{sentence}"):
            start(path, **changed)
