"""Configs are found by name from any folder, and by path."""

import pytest

import sret_jax
from sret_jax.config_files import config_names, configs_help
from sret_jax.errors import UserError
from tests.conftest import ROOT

TAKES_NONE = {"quickstart"}


@pytest.mark.parametrize("arguments", ["", ":unsliced,res=384"])
def test_a_config_is_the_same_by_name_and_by_path_from_any_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    by_name = sret_jax.get_config(f"sret_s{arguments}")
    assert by_name == sret_jax.get_config(f"{ROOT}/configs/sret_s.py{arguments}")
    assert by_name.model.image_size == (384 if arguments else 224)


def test_the_help_has_every_config_and_whether_it_takes_arguments():
    assert set(config_names()) == {f.stem for f in (ROOT / "configs").glob("*.py")} - {"common"}
    without = [line for line in configs_help().splitlines() if line.endswith("no arguments")]
    assert without == [f"  {', '.join(sorted(TAKES_NONE))}: no arguments"]
    for name in config_names():
        assert name in configs_help()
        if name in TAKES_NONE:
            with pytest.raises(UserError, match="takes no arguments after a colon"):
                sret_jax.get_config(f"{name}:x")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ("sret_z", r"unknown config 'sret_z'; did you mean 'sret_.'\? \(one of .*quickstart"),
        ("nope/sret_s.py", "no config file 'nope/sret_s.py'; sret_jax has --config=sret_s"),
        ("sret_s:recipe=foo", "unknown recipe 'foo'; did you mean"),
        ("finetune:model=sret_m", r"unknown model 'sret_m'; did you mean 'sret_.+'\?"),
    ],
)
def test_a_config_that_is_not_there_is_one_sentence(config, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        sret_jax.get_config(config)
    assert "\n" not in str(raised.value)
