import argparse
import io
import json
import os
import re
import shutil
import struct
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import sret_jax
from configs import quickstart
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.errors import UserError
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.models.model import IMAGENET_MEAN as MEAN
from sret_jax.models.model import IMAGENET_STD as STD
from sret_jax.settings.saved_config import load_config
from sret_jax.tools import convert
from sret_jax.weights.loading import find
from sret_jax.weights.torch_names import from_torch
from tests import golden
from tests.conftest import refusal


@pytest.fixture(scope="module")
def state_dict():
    return golden.state_dict(golden.build("sret_t"))


def run(*args):
    convert.main([str(a) for a in args])


def fails(capsys, *args):
    return refusal(capsys, convert.main, *args)


def test_safetensors_to_a_checkpoint_and_back_changes_nothing(state_dict, tmp_path):
    save_file(state_dict, tmp_path / "in.safetensors")
    run(tmp_path / "in.safetensors", tmp_path / "folder", "--model=sret_t")
    run(tmp_path / "folder", tmp_path / "out.safetensors", "--model=sret_t")
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(out[name], array, err_msg=name)


def test_relative_paths_and_new_folders_will_do(state_dict, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(state_dict, "in.safetensors")
    run("in.safetensors", "new/folder", "--model=sret_t")
    run("new/folder", "other/out.safetensors", "--model=sret_t")
    assert load_file("other/out.safetensors").keys() == state_dict.keys()


def test_the_average_is_taken_when_asked_for(state_dict, tmp_path):
    variables = from_torch(state_dict, golden.build("sret_t"))
    average = jax.tree.map(lambda x: x + 1, variables)
    checkpoints = Checkpoints(epath.Path(tmp_path / "run"))
    checkpoints.save(0, jax.tree.map(jnp.asarray, {"model": variables, "ema": average}))
    checkpoints.close()
    run(tmp_path / "run", tmp_path / "ema.safetensors", "--model=sret_t", "--ema")
    ours = load_file(tmp_path / "ema.safetensors")["head.weight"]
    np.testing.assert_array_equal(ours, state_dict["head.weight"] + 1)


def test_what_is_converted_says_what_it_is(saved_run, tmp_path, capsys):
    run_dir = shutil.copytree(saved_run, tmp_path / "run")
    config = json.loads((run_dir / "config.json").read_text())
    # Of the same arrays as the published variant's heads and groups.
    config["model"].update(heads=[4, 8], dim=4, permutation="identity")
    config["model"].update(groups=[[1], [1]], dtype="float32")
    (run_dir / "config.json").write_text(json.dumps(config))
    names = ("a.safetensors", "folder", "b.pth", "c.safetensors")
    pytest.importorskip("torch", reason="writing .pth files needs torch")
    model, variables = sret_jax.load(run_dir)
    before = run_dir
    for name in names:
        run(before, tmp_path / name)
        before = tmp_path / name
        again, weights = sret_jax.load(before)
        assert again == model
        jax.tree.map(np.testing.assert_array_equal, weights, variables)
        assert sret_jax.class_names(before) == [f"digit {i}" for i in range(10)]
        assert sret_jax.test_crop(before) == 0.8
    assert "does not say" not in capsys.readouterr().out


def test_a_converted_checkpoint_evaluates_as_its_run(saved_run, digits_dir, tmp_path, capsys):
    run(saved_run, tmp_path / "w.safetensors")
    run(tmp_path / "w.safetensors", tmp_path / "converted")
    reports = []
    for workdir in (shutil.copytree(saved_run, tmp_path / "run"), tmp_path / "converted"):
        config = load_config(epath.Path(workdir), like=quickstart.get_config())
        config.data.data_dir, config.eval_batch_size = str(digits_dir), 64
        config.model.dtype = "float32"
        reports.append(evaluate_checkpoint(config, epath.Path(workdir))["eval"])
    assert reports[0] == reports[1]
    assert "instead of" not in capsys.readouterr().out
    config.model.groups = ((1,), (1,))
    evaluate_checkpoint(config, epath.Path(workdir))
    said = "Evaluating with groups ((1,), (1,)) instead of ((2, 2), (1,))."
    assert said in capsys.readouterr().out
    config.model.update(heads=(4, 8), dim=4)
    with pytest.raises(UserError, match=r"heads is \(2, 4\) there, \(4, 8\) here; dim is"):
        evaluate_checkpoint(config, epath.Path(workdir))


def test_weights_of_others_are_described_by_what_is_assumed_or_given(state_dict, tmp_path, capsys):
    save_file(state_dict, tmp_path / "in.safetensors")
    for flags, groups in (
        ((), ((8, 2), (4, 1), (1,))),
        (("--groups=16-14-1",), ((16, 1), (14, 1), (1,))),
    ):
        out = tmp_path / f"out{len(flags)}"
        run(tmp_path / "in.safetensors", out, *flags)
        said = capsys.readouterr().out
        assert "in.safetensors does not say which model it holds; it is taken for sret_t" in said
        assert ("groups ((8, 2), (4, 1), (1,)), as published" in said) == (not flags)
        config = json.loads((out / "config.json").read_text())
        assert config["converted_from"] == "in.safetensors"
        assert tuple(map(tuple, config["model"]["groups"])) == groups
        assert sret_jax.load(out)[0] == sret_jax.create_model("sret_t", groups=groups)
        assert "does not say" not in capsys.readouterr().out
    assert "--groups=16- should read" in fails(
        capsys, tmp_path / "in.safetensors", tmp_path / "no", "--groups=16-"
    )


@pytest.mark.parametrize(
    "said",
    ["[", "[1]", '{"config": 3}', '{"config": {"model": {}}, "class_names": null, "mean": []}']
    + [json.dumps({"config": {"model": m}, "class_names": None, "mean": MEAN, "std": STD})
       for m in ({}, {"name": "sret_t", "blocks": "ab"}, {"name": "sret_t", "a.b": 1})],
)  # fmt: skip
def test_a_file_that_describes_no_model_is_a_sentence(said, tmp_path, capsys):
    save_file({"a": np.zeros(1)}, tmp_path / "w.safetensors", metadata={"sret_jax": said})
    error = fails(capsys, tmp_path / "w.safetensors", tmp_path / "out")
    assert re.search("describes no model|is damaged|config.model: ", error)


def test_the_model_of_a_file_normalises_images_as_the_file_says(tmp_path):
    said = {
        "config": {"model": {"name": "sret_t", "num_classes": 5}, "data": {"test_crop": 1.0}},
        "class_names": None,
        "mean": [0.5] * 3,
        "std": STD,
    }
    save_file({"a": np.zeros(1)}, tmp_path / "w", metadata={"sret_jax": json.dumps(said)})
    model = find(tmp_path / "w").model()
    assert (model.mean, model.std) == ((0.5, 0.5, 0.5), tuple(STD))


def test_a_training_checkpoint_of_torch_is_read_through_its_wrappers(state_dict, tmp_path):
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
    tensors = {f"module.{k}": torch.from_numpy(v.copy()) for k, v in state_dict.items()}
    tensors["module.patch_embed.bn1.num_batches_tracked"] = torch.tensor(5)
    wrapped = {"model": tensors, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(wrapped, tmp_path / "in.pth")
    run(tmp_path / "in.pth", tmp_path / "folder", "--model=sret_t")
    run(tmp_path / "folder", tmp_path / "out.pth", "--model=sret_t")
    out = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert out.keys() == state_dict.keys()
    for name, array in state_dict.items():
        np.testing.assert_array_equal(out[name].numpy(), array, err_msg=name)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_torch_file_that_would_run_code_is_refused_unrun(tmp_path, capsys):
    torch = pytest.importorskip("torch", reason="reading .pth files needs torch")
    torch.save({"model": Malicious(tmp_path / "owned")}, tmp_path / "evil.pth")
    error = fails(capsys, tmp_path / "evil.pth", tmp_path / "out", "--model=sret_t")
    assert "is not a torch file of plain weights and was not loaded" in error
    assert "save its state dict alone" in error
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def torch_parts():
    """The files inside a .pth file, which is a zip."""
    torch = pytest.importorskip("torch", reason="writing .pth files needs torch")
    file = io.BytesIO()
    torch.save({"model": {"head.weight": torch.zeros(3, 4)}}, file)
    with zipfile.ZipFile(file) as parts:
        return {name: parts.read(name) for name in parts.namelist()}


@given(st.sampled_from(["data.pkl", "byteorder", "version"]), st.integers(0, 400), st.binary())
@example("byteorder", 0, b"x")  # of each kind of error that torch raised
@example("version", 0, b"\xff")
def test_a_damaged_torch_file_is_refused_with_a_sentence(
    torch_parts, tmp_path_factory, part, i, put
):
    path = epath.Path(tmp_path_factory.getbasetemp() / "damaged.pth")
    with zipfile.ZipFile(path, "w") as damaged:
        for name, content in torch_parts.items():
            i %= len(content)
            change = name.endswith(part)
            damaged.writestr(name, content[:i] + put + content[i + 1 :] if change else content)
    with pytest.raises(
        UserError, match=r"damaged.pth (is not a torch file|holds no state|does not fit)"
    ):
        convert.convert(path, path.parent / "out", "sret_t")


def safetensors_file(header, content=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NO_FILE = r"is not a readable safetensors file \(.*"
LYING = {
    struct.pack("<Q", 2**60) + b"{}": NO_FILE + "header too large",
    struct.pack("<Q", 1000) + b"{}": NO_FILE + "invalid header length",
    safetensors_file([1]): "neither a torch file nor safetensors",
    safetensors_file({"a": tensor("F32", [2], 0, 8), "b": tensor("F32", [2], 4, 12)}, bytes(12)): (
        NO_FILE + "invalid offset for tensor `b`"
    ),
    safetensors_file({"a": tensor("F32", [2**40, 2**40], 0, 8)}, bytes(8)): NO_FILE + "overflow",
    safetensors_file({"a": tensor("BF16", [2], 0, 4)}, bytes(4)): "arrays of type BF16; save them",
    safetensors_file({"head.weight": tensor("F32", [], 0, 4)}, bytes(4)): "does not fit sret_t",
    safetensors_file({"pos_embed": tensor("F32", [], 0, 4)}, bytes(4)): "does not fit sret_t",
    safetensors_file({"head.bias": tensor("F32", [0], 0, 0)}): "num_classes=0 must be",
}


@pytest.mark.parametrize("data", LYING, ids=list(LYING.values()))
def test_a_safetensors_file_that_lies_is_refused_with_a_sentence(data, tmp_path, capsys):
    (tmp_path / "in.safetensors").write_bytes(data)
    error = fails(capsys, tmp_path / "in.safetensors", tmp_path / "out", "--model=sret_t")
    assert re.search(LYING[data], error)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_describes_no_model_is_refused_with_a_sentence(tmp_path, capsys):
    arrays = {"params": {"head": {"bias": jnp.zeros(10)}, "pos_embed": jnp.zeros((1, 4, 4, 8))}}
    for name, model in (("other", {"params": {"kernel": jnp.zeros(3)}}), ("run", arrays)):
        checkpoints = Checkpoints(epath.Path(tmp_path / name))
        checkpoints.save(0, {"model": model})
        checkpoints.close()
    out = tmp_path / "out.safetensors"
    assert "holds no weights of a published model" in fails(capsys, tmp_path / "other", out)
    for text in (
        "{}",
        '{"model": {}}',
        '{"model": 3}',
        '{"model": {"name": "sret_t", "dtype": "float32", "heads": 3}}',
    ):
        (tmp_path / "run" / "config.json").write_text(text)
        assert "config.json describes no model" in fails(capsys, tmp_path / "run", out)
    (tmp_path / "run" / "config.json").write_text("[]")
    assert "config.json holds no config" in fails(capsys, tmp_path / "run", out)


def test_what_does_not_fit_is_said(state_dict, tmp_path, capsys):
    save_file(state_dict, tmp_path / "t.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "there").mkdir()
    t = tmp_path / "t.safetensors"
    assert "does not fit sret_s" in fails(capsys, t, tmp_path / "a", "--model=sret_s")
    assert "did you mean 'sret_t'" in fails(capsys, t, tmp_path / "a", "--model=sret_tt")
    assert "exists already" in fails(capsys, t, tmp_path / "there", "--model=sret_t")
    assert "neither a torch file nor safetensors" in fails(
        capsys, tmp_path / "broken.safetensors", tmp_path / "a", "--model=sret_t"
    )
    missing = tmp_path / "none.pth"
    assert f"there is no file or folder {missing};" in fails(capsys, missing, tmp_path / "a")
    assert "holds no checkpoints/" in fails(capsys, tmp_path / "there", tmp_path / "o.safetensors")
