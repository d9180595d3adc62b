"""scripts/launch_slurm.sh, with an srun that ends as a test asks for."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

SRUN = f"""#!{sys.executable}
import json, os, sys
print(json.dumps(sys.argv[1:]))
sys.exit(int(os.environ["ENDS_WITH"]))
"""
SCONTROL = '#!/bin/sh\necho "scontrol $*"\n'


@pytest.mark.parametrize(
    ("status", "seconds", "again"),
    [(0, 700, False), (2, 700, False), (75, 0, True), (134, 0, False), (134, 700, True)],
)
def test_a_job_that_was_stopped_or_crashed_late_is_queued_again(status, seconds, again, tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts" / "launch_slurm.sh", "--config.x='a b'"],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "7",
            "ENDS_WITH": str(status),
            "SECONDS": str(seconds),  # Bash counts on from it
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status
    command, *rest = done.stdout.splitlines()
    assert json.loads(command)[-2:] == ["main.py", "--config.x='a b'"]
    assert rest == (["scontrol requeue 7"] if again else [])
