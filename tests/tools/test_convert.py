import argparse
import io
import json
import os
import re
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

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.checkpoints.torch_names import from_torch
from sret_jax.errors import UserError
from sret_jax.tools import convert
from tests import golden
from tests.conftest import refusal, run_python


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


def test_a_converted_checkpoint_evaluates(tmp_path, digits_dir):
    model = golden.build("tiny_unsliced_1_loop", nll_ratio=1.0, blocks=(1, 1, 1))
    variables = model.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    checkpoints = Checkpoints(epath.Path(tmp_path / "converted"))
    checkpoints.save(0, {"model": variables})
    checkpoints.close()
    done = run_python(
        "main.py",
        "--mode=eval",
        f"--workdir={tmp_path / 'converted'}",
        f"--config.data.data_dir={digits_dir}",
        "--config.model.image_size=64",
        "--config.model.blocks=(1,1,1)",
        "--config.model.loops=1",
        "--config.model.groups=((1,),(1,),(1,))",
        "--config.model.heads=(2,4,8)",
        "--config.model.dim=8",
        "--config.model.mlp_ratio=2.5",
    )
    assert done.returncode == 0, done.stderr
    assert "raw" in done.stdout and "EMA" not in done.stdout


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
    assert "is no torch file of plain weights and was not loaded" in error
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
        UserError, match=r"damaged.pth (is no torch file|holds no state|does not fit)"
    ):
        convert.file_to_folder(path, path.parent / "out", "sret_t")


def safetensors_file(header, content=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


NO_FILE = r"is no readable safetensors file \(.*"
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
    safetensors_file({"head.weight": tensor("F32", [0, 3], 0, 0)}): "num_classes=0 must be",
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
    assert "holds no weights of a SReT" in fails(capsys, tmp_path / "other", out)
    for text in (
        "{}",
        '{"model": {}}',
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
    assert "there is no" in fails(capsys, tmp_path / "none.pth", tmp_path / "a")
    assert "holds no checkpoints/" in fails(capsys, tmp_path / "there", tmp_path / "o.safetensors")
