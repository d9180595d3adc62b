"""Which config a command line names, and which of its settings do not exist."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sret_jax import cli

QUICKSTART = "configs/quickstart.py"


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        ([], "quickstart"),
        (["--config=a.py"], "a.py"),
        (["--config", "a.py:x=1:2"], "a.py:x=1:2"),
        (["-config=a.py", "--config=b.py", "--config.seed=1"], "b.py"),
        (["--config"], ""),
    ],
)
def test_the_config_is_the_last_one_named_either_way(argv, named):
    assert cli._config_given(["main.py", *argv]) == named


FILES = st.sampled_from(
    [QUICKSTART, "configs/sret_t.py:res=32", "configs/sret_t.py:x", "none.py", ""]
)
NAMES = st.sampled_from(["seed", "data.name", "data.nam", "model", "lr"]) | st.text(max_size=9)
FLAGS = (
    FILES.map(lambda file: f"--config={file}")
    | FILES
    | st.just("--config")
    | NAMES.map(lambda name: f"--config.{name}=1")
    | st.text(max_size=9)
)


@given(st.lists(FLAGS, max_size=5))
def test_whatever_the_command_line_the_unknown_setting_is_a_sentence_or_none(argv):
    sentence = cli._unknown_setting(argv)
    assert sentence is None or sentence.startswith("unknown config field ")
    assert sentence is None or "\n" not in sentence


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--config.seeds=1"], "unknown config field 'seeds'; did you mean 'seed'?"),
        (["--noconfig.data.synth"], "'data.synth'; did you mean 'data.synthetic'?"),
        (["--config", "configs/sret_t.py", "--config.lrs=1"], "unknown config field 'lrs'"),
    ],
)
def test_an_unknown_setting_is_named_with_the_nearest(argv, sentence):
    assert sentence in cli._unknown_setting(argv)


@pytest.mark.parametrize("text", ["", "x = 1", "def get_config(): return {}", "def get_config(:"])
def test_a_file_that_is_no_config_has_no_unknown_setting(text, tmp_path):
    (tmp_path / "config.py").write_text(text)
    assert cli._unknown_setting([f"--config={tmp_path / 'config.py'}", "--config.seed=1"]) is None
