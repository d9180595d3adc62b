import pathlib

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from sret_jax.errors import UserError
from sret_jax.run.launch import default_workdir
from sret_jax.settings.config_model import create_from_config
from sret_jax.settings.saved_config import START_FILE, save_description
from tests.conftest import config_given

WORKDIRS = {
    "configs/quickstart.py": "runs/quickstart",
    "configs/sret_lt.py:unsliced,res=384": "runs/sret_lt-unsliced-res384",
    "configs/sret_lt.py:groups=16-14-1": "runs/sret_lt-groups16-14-1",
}


@pytest.mark.parametrize("config", WORKDIRS)
def test_the_default_workdir_tells_the_config_and_its_arguments(config):
    assert default_workdir(config) == WORKDIRS[config]


FILES = st.from_regex(r"([\w./-]*/)?\w[\w.-]*\.py", fullmatch=True)


@given(FILES, st.text())
def test_the_default_workdir_is_one_folder_within_runs(file, args):
    workdir = pathlib.PurePosixPath(default_workdir(f"{file}:{args}"))
    assert workdir.parent == pathlib.PurePosixPath("runs")
    assert workdir.name not in ("", ".", "..")


NUMBERS = st.integers(1, 10**6)
ARGUMENTS = st.fixed_dictionaries(
    {
        "res": NUMBERS.map(lambda n: f"res={n}") | st.just(""),
        "groups": st.lists(NUMBERS, min_size=1, max_size=4).map(
            lambda groups: "groups=" + "-".join(map(str, groups))
        )
        | st.sampled_from(["unsliced", ""]),
        "recipe": st.sampled_from(["recipe=none", "recipe=deit", ""]),
    }
).map(lambda given: ",".join(filter(None, given.values())))


@given(ARGUMENTS, ARGUMENTS)
def test_runs_of_different_arguments_have_different_default_workdirs(one, other):
    same = default_workdir(f"configs/sret_t.py:{one}") == default_workdir(
        f"configs/sret_t.py:{other}"
    )
    assert same == (one == other)


def chosen(workdir, *argv):
    """The config for a command line, which is stored with its start as a run stores it."""
    config, start = config_given(workdir, *argv)
    save_description(config, [], start, workdir)
    return config


def test_a_workdir_goes_on_with_what_it_was_started_with_unless_a_setting_is_given(tmp_path):
    workdir = epath.Path(tmp_path)
    first = ("--config=configs/sret_t.py:unsliced", "--config.epochs=14", "--config.fsdp=2")
    chosen(workdir, *first, "--config.model.heads=(2, 4, 8)")
    elsewhere = f"--config={epath.Path('configs').absolute()}/sret_t.py:unsliced"
    for again in ((), first[:1], (elsewhere,), ("--config=sret_t:unsliced",)):
        config = chosen(workdir, *again)
        assert (config.model.name, config.epochs, config.fsdp) == ("sret_t", 14, 2)
        model = create_from_config(config, num_classes=10)
        assert (model.groups, model.heads) == (((1,), (1,), (1,)), (2, 4, 8))
    assert chosen(workdir, "--config.epochs=20").epochs == 20
    config = chosen(workdir, first[0], "--config.fsdp=1")
    assert (config.epochs, config.fsdp) == (20, 1)
    config = chosen(workdir, "--config=configs/sret_t.py")  # other arguments: another start
    assert (config.epochs, config.fsdp, config.model.groups) == (300, 1, None)


def test_no_groups_mean_that_attention_is_not_sliced_in_the_workdir_too(tmp_path):
    workdir = epath.Path(tmp_path)
    for argv in (("--config=sret_t", "--config.model.groups=()"), ()):
        model = create_from_config(chosen(workdir, *argv), num_classes=10)
        assert model.groups == ((1,), (1,), (1,))


def test_a_damaged_start_file_is_a_sentence(tmp_path):
    (tmp_path / START_FILE).write_text("{")
    with pytest.raises(UserError, match=r"start.json is damaged .* give --config with all"):
        chosen(epath.Path(tmp_path))
