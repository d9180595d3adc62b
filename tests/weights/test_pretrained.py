"""Models loaded from runs, steps, converted checkpoints and published files."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

import sret_jax
from configs import quickstart
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.errors import UserError
from sret_jax.models.variables import abstract_variables
from sret_jax.settings.config_model import create_from_config
from tests import golden
from tests.conftest import save_evaluated


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir as a run leaves it: two steps, their averages, config and class names."""
    workdir = epath.Path(tmp_path_factory.mktemp("run"))
    config = quickstart.get_config()
    model = create_from_config(config, num_classes=10)
    images = jnp.zeros((1, 32, 32, 3))
    variables = jax.jit(model.init)(jax.random.key(0), images)
    with contextlib.closing(Checkpoints(workdir, keep_latest=2)) as checkpoints:
        for step in (10, 20):
            scaled = jax.tree.map(lambda x, step=step: step * x, variables)
            average = jax.tree.map(lambda x: -x, scaled)
            save_evaluated(checkpoints, step, {"model": scaled, "ema": average}, 0.5 / step)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "class_names.json").write_text(json.dumps([str(i) for i in range(10)]))
    return workdir, model, variables


def head(variables):
    return np.asarray(variables["params"]["head"]["kernel"])


def test_a_run_gives_its_newest_weights_a_step_its_own_and_ema_the_average(run):
    workdir, model, variables = run
    for path, ema, factor in (
        (workdir, False, 20),
        (workdir / "checkpoints" / "10", False, 10),
        (workdir / "checkpoints" / "best", False, 10),
        (str(workdir), True, -20),
    ):
        loaded, weights = sret_jax.load(path, ema=ema)
        assert loaded == model
        np.testing.assert_array_equal(head(weights), factor * head(variables))
    assert sret_jax.class_names(workdir / "checkpoints" / "10") == [str(i) for i in range(10)]


def test_settings_change_the_model_and_other_loops_its_nlls(run):
    workdir, _, _ = run
    model, weights = sret_jax.load(workdir, loops=3, permutation="identity")
    assert (model.loops, model.permutation) == (3, "identity")
    assert sret_jax.load(workdir, groups=None)[0].groups == ((1,), (1,))
    assert weights["params"]["stage0_block0"]["nll"]["residual"]["skip"].shape == (3,)


def test_published_weights_are_of_the_variant_they_fit_which_is_said(tmp_path, capsys):
    for name, groups in (("sret_t", ((8, 2), (4, 1), (1,))), ("sret_lt", ((1,),) * 3)):
        state_dict = golden.state_dict(golden.build(name))
        save_file(state_dict, tmp_path / "weights.safetensors")
        settings = {"groups": None} if name == "sret_lt" else {}
        model, weights = sret_jax.load(tmp_path / "weights.safetensors", **settings)
        assert model == sret_jax.create_model(name, groups=groups)
        np.testing.assert_array_equal(head(weights), state_dict["head.weight"].T)
        said = capsys.readouterr().out
        assert f"does not say which model it holds; it is taken for {name}" in said
        assert ("with attention groups ((8, 2), (4, 1), (1,)), as published" in said) == (
            not settings
        )


def test_a_converted_checkpoint_needs_no_config(tmp_path, capsys):
    model = golden.build("sret_t")
    variables = sret_jax.from_torch(golden.state_dict(model), model)
    with contextlib.closing(Checkpoints(epath.Path(tmp_path))) as checkpoints:
        checkpoints.save(0, {"model": jax.tree.map(jnp.asarray, variables)})
    loaded, weights = sret_jax.load(tmp_path)
    assert loaded == sret_jax.create_model("sret_t")
    np.testing.assert_array_equal(head(weights), head(variables))
    assert sret_jax.class_names(tmp_path) is None
    assert f"{tmp_path} does not say which model it holds" in capsys.readouterr().out


def test_what_cannot_be_loaded_is_said_in_a_sentence(run, tmp_path):
    workdir, _, _ = run
    save_file({"head.weight": np.zeros((3, 3), np.float32)}, tmp_path / "other.safetensors")
    for path, settings, sentence in (
        (tmp_path, {}, "holds no checkpoints/"),
        (workdir / "checkpoints" / "11", {}, r"no readable step 11; there are \[20, 10\]"),
        (workdir, {"loops": 0}, "loops=0 must be"),
        (workdir, {"groups": ((3,), (1,))}, "3 groups do not divide"),
        (workdir, {"lops": 3}, "did you mean 'loops'"),
        (tmp_path / "none.pth", {}, "there is no .*none.pth; give a run"),
        (tmp_path / "other.safetensors", {}, "does not fit "),
        (tmp_path / "other.safetensors", {"ema": True}, "leave out ema"),
    ):
        with pytest.raises(UserError, match=sentence):
            sret_jax.load(path, **settings)


def test_the_test_crop_is_the_run_s_or_the_published_one(saved_run, tmp_path):
    assert sret_jax.test_crop(saved_run) == 0.8
    assert sret_jax.test_crop(saved_run / "checkpoints" / "7") == 0.8
    model = sret_jax.create_model("sret_t", num_classes=3)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(model))
    save_file(sret_jax.to_torch(zeros, model), tmp_path / "w.safetensors")
    assert sret_jax.test_crop(tmp_path / "w.safetensors") == 0.875
    with pytest.raises(UserError, match="there is no .*SReT_T.pth; give a run"):
        sret_jax.test_crop(tmp_path / "SReT_T.pth")
    (tmp_path / "config.json").write_text('{"data": {}}')
    with pytest.raises(UserError, match=r"config.json has no data.test_crop .*; fix it"):
        sret_jax.test_crop(tmp_path)
