import json

import pytest

from tests.chaos.chaos import FAULTS
from tests.conftest import TINY_FLAGS, run_python


@pytest.mark.slow  # breaks and restarts real runs for a quarter of an hour
@pytest.mark.parametrize(
    "recipe", [(), ("--config.optim.warmup_lr=1e30", "--config.optim.warmup_epochs=0.4")]
)
def test_however_often_it_is_broken_a_run_ends_as_if_it_never_had_been(
    recipe, tmp_path, digits_dir
):
    """The second recipe's first steps overflow, so that rollbacks are broken, too."""
    done = run_python(
        "-m",
        "tests.chaos.chaos",
        f"--workdir={tmp_path / 'chaos'}",
        f"--times={1 if recipe else 4}",
        f"--json={tmp_path / 'report.json'}",
        f"--config.data.data_dir={digits_dir}",
        *TINY_FLAGS,
        *recipe,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["faults"] == {fault.name: 1 if recipe else 4 for fault in FAULTS}
    assert report["endings"] > 0 and not report["problems"]


def test_chaos_refuses_a_folder_that_exists(tmp_path):
    done = run_python("-m", "tests.chaos.chaos", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr == f"Error: --workdir={tmp_path} exists; give a new folder\n"
