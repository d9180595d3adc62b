"""A workdir is read back: the settings of its run, or one clear sentence."""

import copy
import json

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from configs import common, quickstart
from sret_jax.errors import UserError
from sret_jax.parallel.mesh import make_mesh
from sret_jax.settings.saved_config import CONFIG_FILE, load_config
from sret_jax.training.checks import check_numbers
from sret_jax.training.experiment import check_settings

LIKE = quickstart.get_config()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return epath.Path(tmp_path_factory.mktemp("run"))


def load(workdir, text, like=LIKE):
    (workdir / CONFIG_FILE).write_text(text)
    return load_config(workdir, like=like)


def settings(config):
    return json.loads(json.dumps(config.to_dict()))


@pytest.mark.parametrize("config", [LIKE, common.get_variant("sret_s", "unsliced,res=384")])
def test_a_saved_config_is_read_back_whole(config, workdir):
    text = json.dumps(config.to_dict())
    assert settings(load(workdir, text)) == settings(load(workdir, text, None)) == settings(config)
    assert load(workdir, text).augment.crop_scale == config.augment.crop_scale
    assert settings(LIKE) == settings(quickstart.get_config())


def test_a_workdir_without_a_config_has_none(tmp_path):
    assert load_config(epath.Path(tmp_path)) is None


def changed(**changes):
    return json.dumps({**settings(LIKE), **changes})


DAMAGED = {
    "": r"holds no config \(Expecting value.*; fix it, or move it away and give --config",
    json.dumps(settings(LIKE))[:300]: "holds no config",
    "[1, 2]": r"holds no config \(expected an object, found \[1, 2\]\)",
    "[" * 100_000: "holds no config .maximum recursion",
    '{"a\\n.b": 1}': "holds no config .*does not accept dots",
    changed(batchsize=1): r"config.json: unknown setting 'batchsize'; did you mean 'batch_size'\?",
    changed(data={"name": "x"}): "lacks the settings data.data_dir; data.eval_split; ",
    changed(data=3): "unknown setting 'data'",
    changed(batch_size="many"): "config.json: Could not override field 'batch_size'",
    changed(seed={"a": 1}): "unknown setting 'seed.a'",
}


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_config_is_one_sentence(text, workdir):
    with pytest.raises(UserError, match=DAMAGED[text]) as error:
        load(workdir, text)
    assert "\n" not in str(error.value)


def test_bytes_that_are_no_text_are_no_config(workdir):
    (workdir / CONFIG_FILE).write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match="holds no config .'utf-8' codec"):
        load_config(workdir)


NAMES = st.sampled_from(
    ["seed", "batch_size", "data.name", "model.groups", "model", "augment.flip"]
)


@given(st.text() | JSON.map(json.dumps) | st.tuples(NAMES, JSON))
def test_whatever_config_json_holds_is_a_config_or_a_sentence(workdir, content):
    if isinstance(content, tuple):
        changed = settings(LIKE)
        *path, last = content[0].split(".")
        (changed[path[0]] if path else changed)[last] = content[1]
        content = json.dumps(changed)
    (workdir / CONFIG_FILE).write_bytes(content.encode(errors="surrogatepass"))
    for like in (None, LIKE):
        try:
            config = load_config(workdir, like)
            assert isinstance(config, ConfigDict)
            if like is not None:
                assert config.keys() == LIKE.keys()
                check_numbers(config)
        except UserError as e:
            assert "\n" not in str(e)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("seed", 2**32, "config.seed=4294967296 must be at most 4294967295"),
        ("epochs", float("inf"), "config.epochs=inf must be a number"),
        ("batch_size", None, "config.batch_size=None must be a number"),
        ("profile", ("a", 2), r"config.profile=\('a', 2\) must be \(\) or \(first, last\)"),
        ("optim.layer_decay", 0.0, r"config.optim.layer_decay=0.0 must be in \(0, 1\]"),
        ("optim.layer_decay", 1.1, r"config.optim.layer_decay=1.1 must be in \(0, 1\]"),
        ("optim.backbone_lr", 0.0, r"config.optim.backbone_lr=0.0 must be in \(0, 1\]"),
        ("optim.freeze_backbone", True, "freeze_backbone=True leaves .* give .*config.init_from"),
    ],
)
def test_a_number_that_is_none_is_named(name, value, sentence):
    config = copy.deepcopy(LIKE)
    config.update_from_flattened_dict({name: value})
    with pytest.raises(UserError, match=sentence):
        check_numbers(config)


@pytest.mark.parametrize(
    ("loops", "weight", "sentence"),
    [
        (2, 1.0, "mixed_depth.loops=2 must be a whole number below the 2 loops of the model"),
        (-1, 1.0, "mixed_depth.loops=-1 must be"),
        (1, 0.0, "mixed_depth.weight=0.0 must be above 0"),
    ],
)
def test_a_shallow_path_that_is_none_is_named(loops, weight, sentence):
    config = copy.deepcopy(LIKE)
    config.mixed_depth.update(loops=loops, weight=weight)
    with pytest.raises(UserError, match=sentence):
        check_settings(config, make_mesh())


def test_a_shallow_path_must_be_below_the_fewest_loops_of_a_step():
    config = copy.deepcopy(LIKE)
    config.mixed_depth.loops = 1
    config.recursion.train_loops = "uniform:1-4"
    with pytest.raises(UserError, match=r"loops=1 must .* \(.*uniform:1-4 has steps of 1 loops\)"):
        check_settings(config, make_mesh())
    config.recursion.train_loops = "uniform:2-4"
    check_settings(config, make_mesh())
