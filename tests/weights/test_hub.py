"""Weights by name on the Hugging Face hub, and the folders that are written for it."""

import json
import shutil
import sys

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save

import sret_jax
from configs import quickstart
from sret_jax.distillation.teacher import open_teacher
from sret_jax.errors import UserError
from sret_jax.models.registry import FAMILIES
from sret_jax.models.variables import abstract_variables
from sret_jax.parallel.mesh import make_mesh
from sret_jax.settings.config_model import create_from_config
from sret_jax.tools import convert, export, predict
from sret_jax.weights.array_names import to_arrays
from sret_jax.weights.description import Description
from sret_jax.weights.weight_files import write_weight_file
from tests import golden
from tests.conftest import refusal
from tests.hub_cache import HubCache, files_of
from tests.timm_models import import_timm, needs_timm, timm_model

DIGITS = [f"digit {i}" for i in range(10)]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return HubCache(tmp_path / "hub", monkeypatch)


@pytest.fixture(scope="module")
def folder(saved_run, tmp_path_factory):
    """The averaged weights of a run, in the form of the hub."""
    folder = tmp_path_factory.mktemp("exported") / "digits"
    convert.main([str(saved_run), str(folder), "--hf", "--ema"])
    return folder


def assert_equal(tree, expected):
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_a_run_comes_back_from_the_hub_as_it_was(saved_run, folder, hub, tmp_path, capsys):
    commit = hub.add("me/digits", files_of(folder), "main", "v1")
    expected, average = sret_jax.load(saved_run, ema=True)
    names = ("", "@main", "@v1", f"@{commit}")
    for path in (folder, folder / "model.safetensors", *(f"hf://me/digits{n}" for n in names)):
        model, variables = sret_jax.load(path)
        assert model == expected
        assert_equal(variables, average)
        assert sret_jax.class_names(path) == DIGITS
        assert sret_jax.test_crop(path) == 0.8
        said = f"{path} is now at hf://me/digits@{commit}.\n" if path in NOT_PINNED else ""
        assert capsys.readouterr().out == said
    convert.main(["hf://me/digits@v1", str(tmp_path / "converted")])
    model, variables = sret_jax.load(tmp_path / "converted")
    assert model == expected
    assert_equal(variables, average)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["converted_from"] == f"hf://me/digits@{commit}"


NOT_PINNED = ("hf://me/digits", "hf://me/digits@main", "hf://me/digits@v1")


def test_a_revision_gives_its_own_weights(folder, hub):
    files = files_of(folder)
    hub.add("me/digits", files, "old")
    newer = json.loads(files["config.json"])
    newer["sret_jax"]["class_names"][0] = "nought"
    hub.add("me/digits", {**files, "config.json": json.dumps(newer).encode()}, "main")
    assert sret_jax.class_names("hf://me/digits@old")[0] == "digit 0"
    assert sret_jax.class_names("hf://me/digits")[0] == "nought"


def test_a_teacher_and_commands_take_names(saved_run, folder, hub, tmp_path, capsys):
    hub.add("me/digits", files_of(folder), "main")
    config = quickstart.get_config()
    config.teacher = "hf://me/digits"
    student = create_from_config(config, num_classes=10)
    teacher = open_teacher(config, make_mesh(), student)
    assert teacher.class_names == DIGITS
    assert_equal(teacher.variables, jax.device_get(sret_jax.load(saved_run, ema=True)[1]))
    for command, *args in ((predict, tmp_path / "none.png"), (export, tmp_path)):
        refused = refusal(capsys, command.main, "--checkpoint=hf://me/digits", *args)
        assert "none.png" in refused or "exists already" in refused
    refused = refusal(capsys, convert.main, "hf://me/digits", "hf://me/other")
    assert "hf://me/other names weights on the Hugging Face hub, and this is no place" in refused


def test_the_card_says_what_was_measured_at_the_step_of_the_weights(saved_run, folder, tmp_path):
    card = (folder / "README.md").read_text()
    assert "The run was not evaluated at this step." in card and "model-index" not in card
    run = shutil.copytree(saved_run, tmp_path / "run")
    lines = [{"step": step, "eval/top1": step / 10, "eval_ema/top1": 0.25} for step in (6, 7)]
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    start = {"config": "configs/quickstart.py", "overrides": {"data.name": "my digits"}}
    (run / "start.json").write_text(json.dumps(start))
    convert.main([str(run), str(tmp_path / "raw"), "--hf"])
    card = (tmp_path / "raw" / "README.md").read_text()
    assert "| step | 7 |\n| weights | raw weights |\n| top-1, raw weights | 70.00% |\n" in card
    assert "| top-1, moving average of the weights | 25.00% |" in card
    assert "name: top-1\n      value: 0.7\n" in card
    assert "python main.py --config=configs/quickstart.py '--config.data.name=my digits'" in card
    assert "# license: choose one" in card
    convert.main([str(run), str(tmp_path / "other"), "--hf", "--unsliced"])
    card = (tmp_path / "other" / "README.md").read_text()
    assert "was not evaluated so" in card and "model-index" not in card
    config = json.loads((tmp_path / "raw" / "config.json").read_text())
    assert config["label_names"] == DIGITS and config["num_classes"] == 10
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 16]


def test_arrays_without_published_names_have_those_of_flax(tmp_path, capsys):
    model = golden.build("tiny_sliced").clone(nll_every=2)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.normal(size=x.shape).astype(np.float32), abstract_variables(model)
    )
    description = Description.of(model, "sret_t", None, 0.9)
    first = epath.Path(tmp_path / "w.safetensors")
    write_weight_file(first, to_arrays(variables, model), description.to_json())
    convert.main([str(first), str(tmp_path / "again.safetensors")])
    assert "under their names in Flax, because a model with nll_every=2" in capsys.readouterr().out
    convert.main([str(first), str(tmp_path / "hub"), "--hf"])
    assert "under their names and shapes in Flax, because" in (
        (tmp_path / "hub" / "README.md").read_text()
    )
    assert "params/head/bias" in load_file(tmp_path / "hub" / "model.safetensors")
    for path in (first, tmp_path / "again.safetensors", tmp_path / "hub"):
        loaded, weights = sret_jax.load(path)
        assert loaded == model and sret_jax.test_crop(path) == 0.9
        assert_equal(weights, variables)
    arrays = load_file(first)
    arrays["params/head/bias"] = np.zeros(3, np.float32)
    write_weight_file(first, arrays, description.to_json())
    with pytest.raises(UserError, match=r"params/head/bias is \(3,\) there, \(10,\) here"):
        sret_jax.load(first)


def test_what_is_not_there_is_a_sentence(folder, hub, monkeypatch):
    files = files_of(folder)
    config, weights = files["config.json"], files["model.safetensors"]
    hub.add("me/digits", {"config.json": config, "model.safetensors": weights}, "v1")
    hub.add("me/pickled", {"config.json": config, "pytorch_model.bin": weights}, "main")
    hub.add("me/bare", {"model.safetensors": weights}, "main")
    hub.add("me/broken", {"config.json": b"{", "model.safetensors": weights}, "main")
    hub.add("me/bert", {"config.json": b'{"model_type": "bert"}'}, "main")
    offline = ".* is not in the cache, .*hub, and HF_HUB_OFFLINE is set; unset it"
    for name, sentence in (
        ("me/none", f"hf://me/none: config.json of revision main{offline}"),
        ("me/digits", f"config.json of revision main{offline}"),
        ("me/digits@v2", f"config.json of revision v2{offline}"),
        ("me/bare", f"config.json of revision main{offline}"),
        ("me/pickled", f"model.safetensors of revision .*{offline}.*; pickles .* are not read"),
        ("me/broken", "hf://me/broken/config.json is damaged"),
        ("me/bert", "hf://me/bert/config.json describes no model of timm"),
        ("digits", "hf://digits should read like hf://timm/deit_tiny"),
        ("me/digits/model.safetensors", "should read like"),
        ("me/digits@", "should read like"),
    ):
        with pytest.raises(UserError, match=sentence):
            sret_jax.load(f"hf://{name}")
    with pytest.raises(UserError, match="leave out ema"):
        sret_jax.load("hf://me/digits@v1", ema=True)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="which huggingface_hub reads; pip install huggingface_hub"):
        sret_jax.load("hf://me/digits")


def test_a_name_imports_no_module_of_this_machine(folder, hub, tmp_path, monkeypatch):
    (tmp_path / "strange.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    files = files_of(folder)
    config = json.loads(files["config.json"])
    config["sret_jax"]["config"]["model"]["name"] = "strange:model"
    hub.add("me/odd", {**files, "config.json": json.dumps(config).encode()}, "main")
    with pytest.raises(UserError, match="names a model of the module 'strange', and names from"):
        sret_jax.load("hf://me/odd")


def timm_config(**changes):
    """config.json of a DeiT-Ti for three classes at 32 pixels, as timm 1.0.31 writes it."""
    trained = {
        **dict(tag="fb_in1k", custom_load=False, input_size=[3, 32, 32], fixed_input_size=True),
        **dict(interpolation="bicubic", crop_pct=0.9, crop_mode="center", num_classes=3),
        **dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25], first_conv="patch_embed.proj"),
        **dict(pool_size=None, classifier="head", license="apache-2.0"),
    }
    arguments = {"num_classes": 3, "img_size": [32, 32], "in_chans": 3, "global_pool": "token"}
    return {
        **dict(architecture="deit_tiny_patch16_224", num_classes=3, num_features=192),
        **dict(global_pool="token", label_names=["a", "b", "c"]),
        "model_args": {**arguments, **changes.pop("model_args", {})},
        "pretrained_cfg": {**trained, **changes.pop("pretrained_cfg", {})},
        **changes,
    }


def test_timm_s_config_gives_family_pixels_crop_and_classes(hub, capsys):
    three = dict(num_classes=3, image_size=32, mean=(0.5,) * 3, std=(0.25,) * 3)
    expected = sret_jax.create_model("deit_tiny", **three)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: rng.random(x.shape, np.float32), abstract_variables(expected)
    )
    weights = save(sret_jax.to_torch(variables, expected))

    def add(name, **changes):
        config = json.dumps(timm_config(**changes)).encode()
        hub.add(name, {"config.json": config, "model.safetensors": weights}, "main")
        return f"hf://{name}"

    name = add("timm/tiny")
    model, loaded = sret_jax.load(name)
    assert model == expected
    assert_equal(loaded, variables)
    assert sret_jax.class_names(name) == ["a", "b", "c"] and sret_jax.test_crop(name) == 0.9
    capsys.readouterr()
    other = {"interpolation": "bilinear", "crop_mode": "squash"}
    assert sret_jax.load(add("timm/view", pretrained_cfg=other, label_names=None))[0] == expected
    assert (
        "view/config.json says bilinear interpolation and crop mode squash for"
        in capsys.readouterr().out
    )
    assert sret_jax.class_names("hf://timm/view") is None
    for number, (changes, sentence) in enumerate(
        (
            (dict(architecture="resnet50"), "'resnet50' is no architecture of the families here"),
            (dict(model_args=dict(global_pool="avg")), "changes timm's deit_tiny.* by global_pool"),
            (dict(model_args=dict(depth=2)), "deit_tiny_patch16_224 by depth=2, which is not read"),
            (dict(pretrained_cfg=dict(input_size=[3, 32, 48])), r"expected \[3, S, S\]"),
            (
                dict(
                    pretrained_cfg=dict(input_size=[3, 31, 31]), model_args=dict(img_size=[31, 31])
                ),
                "config.json: image_size=31 is not divisible",
            ),
            (dict(num_classes=0), "without a classifier are not read"),
            (dict(num_classes=4), "changes timm's deit_tiny_patch16_224 by num_classes=3"),
            (dict(pretrained_cfg=dict(mean=None)), "describes no model of timm"),
            (
                dict(pretrained_cfg=dict(crop_pct=87.5)),
                "describes no model of timm .*crop_pct=87.5",
            ),
            (dict(pretrained_cfg=dict(mean=[0.5, 0.5])), r"mean=\(0.5, 0.5\) must hold three"),
            (
                dict(pretrained_cfg=dict(std=[1, 1, 0])),
                r"std=.* must hold three numbers, each above",
            ),
        )
    ):
        with pytest.raises(UserError, match=sentence):
            sret_jax.load(add(f"timm/{number}", **changes))


@needs_timm
def test_a_folder_that_timm_writes_is_read(tmp_path):
    timm = import_timm()
    theirs = timm_model("vit_tiny_patch16_224", img_size=32, num_classes=3)
    timm.models.save_for_hf(theirs, tmp_path / "vit", safe_serialization=True)
    model, variables = sret_jax.load(tmp_path / "vit")
    half = (0.5, 0.5, 0.5)
    same = dict(num_classes=3, image_size=32, mean=half, std=half)
    assert model == sret_jax.create_model("deit_tiny", **same)
    assert_equal(variables, sret_jax.from_torch(theirs.state_dict(), model))


@needs_timm
def test_the_names_of_timm_and_of_the_hub_exist_with_the_crops_that_we_say():
    timm = import_timm()
    on_hub = set(timm.list_pretrained())
    for family in FAMILIES:
        of_family = family.variants.values()
        for published in [*of_family, *(v for o in of_family for v in o.other_sizes.values())]:
            if published.hub:
                assert published.hub in on_hub
                config = timm.get_pretrained_cfg(published.hub)
                assert (config.crop_pct, config.interpolation) == (published.test_crop, "bicubic")
        for architecture in family.timm_names():
            assert timm.is_model(architecture), architecture
