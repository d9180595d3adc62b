"""Workdirs stay readable when settings are added; a missing setting means the old behaviour."""

import json
import pathlib
import shutil

import pytest
from etils import epath

from configs import quickstart
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.settings import saved_config
from sret_jax.settings.saved_config import CONFIG_FILE, changed_settings, load_config

KEPT = pathlib.Path(__file__).parent.parent / "data" / "saved_config.json"


def older(settings):
    """The settings of a workdir older than all settings in `BEFORE`."""
    for name in saved_config.BEFORE:
        *sections, last = name.split(".")
        inner = settings
        for section in sections:
            inner = inner.get(section, {})
        inner.pop(last, None)
    return {name: value for name, value in settings.items() if value != {}}


@pytest.fixture(params=["kept", "older"])
def earlier(request, saved_run, tmp_path):
    """A workdir with weights and the config.json of an earlier version."""
    workdir = epath.Path(shutil.copytree(saved_run, tmp_path / "run"))
    settings = json.loads(KEPT.read_text())
    if request.param == "older":
        settings = older(settings)
    (workdir / CONFIG_FILE).write_text(json.dumps(settings))
    return workdir


def test_an_earlier_workdir_evaluates_with_its_own_config(earlier, digits_dir):
    config = load_config(earlier, like=quickstart.get_config())
    config.data.data_dir = str(digits_dir)
    config.eval_batch_size = 64
    report = evaluate_checkpoint(config, earlier)
    assert report["step"] == 7 and 0 < report["eval"]["top1"] < 1


def test_settings_that_a_workdir_lacks_are_equal_to_those_that_a_new_one_saves():
    assert json.loads(json.dumps(saved_config.BEFORE)) == saved_config.BEFORE


def test_a_setting_that_the_model_of_a_workdir_lacks_is_not_taken_from_another_config(tmp_path):
    like = quickstart.get_config()
    saved = quickstart.get_config().to_dict()
    saved["model"] = {"name": "mixer_s16", "image_size": 16, "own": 3}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(saved))
    model = load_config(epath.Path(tmp_path), like=like).model
    assert (model.name, model.own, model.heads, model.groups) == ("mixer_s16", 3, None, None)
    assert model.dtype == like.model.dtype  # changes speed and rounding only


def test_an_earlier_workdir_resumes_without_a_change_to_speak_of(earlier):
    config = quickstart.get_config()
    config.model.update(image_size=16, groups=((2, 2), (1, 1)), heads=(2, 4), dim=8)
    config.data.test_crop = 0.8
    config.ema_decay = 0.99
    config.eval_batch_size = 128
    before = {k: tuple(v) if isinstance(v, list) else v for k, v in saved_config.BEFORE.items()}
    config.update_from_flattened_dict(before)
    assert changed_settings(config, earlier) == {}
    config.mixed_depth.loops = 1
    assert changed_settings(config, earlier) == {"mixed_depth.loops": (0, 1)}
