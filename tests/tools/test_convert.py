import argparse
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.checkpoints.torch_names import from_torch
from sret_jax.tools import convert
from tests import golden
from tests.conftest import run_python


@pytest.fixture(scope="module")
def state_dict():
    return golden.state_dict(golden.build("sret_t"))


def run(*args):
    convert.main([str(a) for a in args])


def fails(capsys, *args):
    """The one sentence with which the command ends, at exit status 2."""
    with pytest.raises(SystemExit) as stop:
        run(*args)
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("Error: ") and "\n" not in error
    return error


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
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_said(state_dict, tmp_path, capsys):
    save_file(state_dict, tmp_path / "t.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    (tmp_path / "there").mkdir()
    t = tmp_path / "t.safetensors"
    assert "does not fit sret_s" in fails(capsys, t, tmp_path / "a", "--model=sret_s")
    assert "did you mean 'sret_t'" in fails(capsys, t, tmp_path / "a", "--model=sret_tt")
    assert "give --model" in fails(capsys, t, tmp_path / "a")
    assert "exists already" in fails(capsys, t, tmp_path / "there", "--model=sret_t")
    assert "no readable safetensors" in fails(
        capsys, tmp_path / "broken.safetensors", tmp_path / "a", "--model=sret_t"
    )
    assert "cannot convert" in fails(capsys, tmp_path / "none.pth", tmp_path / "a")
    assert "holds no checkpoints/" in fails(capsys, tmp_path / "there", tmp_path / "o.safetensors")
