import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sret_jax.training.launch import default_workdir

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
