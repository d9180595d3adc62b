import pytest

from sret_jax.training.launch import default_workdir

WORKDIRS = {
    "configs/quickstart.py": "runs/quickstart",
    "configs/sret_lt.py:unsliced,res=384": "runs/sret_lt-unsliced-res384",
    "configs/sret_lt.py:groups=16-14-1": "runs/sret_lt-groups16-14-1",
}


@pytest.mark.parametrize("config", WORKDIRS)
def test_the_default_workdir_tells_the_config_and_its_arguments(config):
    assert default_workdir(config) == WORKDIRS[config]
