"""The README's promises about the quickstart."""

import json

import jax
import pytest

from configs import quickstart
from sret_jax.models.variables import abstract_variables
from sret_jax.settings.config_model import create_from_config
from tests.conftest import run_python


def test_its_model_has_less_than_half_a_million_parameters():
    model = create_from_config(quickstart.get_config(), num_classes=10)
    assert sum(p.size for p in jax.tree.leaves(abstract_variables(model)["params"])) < 500_000


@pytest.mark.slow  # trains for two minutes
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_reaches_98_percent_from_any_seed(seed, tmp_path):
    done = run_python("main.py", f"--workdir={tmp_path}", f"--config.seed={seed}")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["eval"]["top1"] >= 0.98
