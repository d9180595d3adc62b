import socket
import subprocess
import sys

import jax
import pytest

from sret_jax.exit_status import HUNG
from sret_jax.parallel import distributed
from tests.conftest import ROOT, run_python


def test_a_process_whose_peers_never_come_says_whom_it_waits_for_and_ends(tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        place = f"localhost:{s.getsockname()[1]}"
    done = run_python(
        "main.py",
        f"--workdir={tmp_path}",
        f"--coordinator={place}",
        "--processes=3",
        "--process_id=0",
        "--start_timeout=4",
    )
    assert done.returncode == HUNG, done.stdout + done.stderr
    assert f"Process 0 waits up to 4 s for the other 2 of this run at {place}; " in done.stdout
    assert done.stderr.startswith("Error: process 0 waited 4 s") and done.stderr.count("\n") == 1
    assert "--processes=1" in done.stdout and "--processes=1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_one_process_is_one_process_also_within_a_slurm_allocation(monkeypatch):
    for name, value in {
        "SLURM_JOB_ID": "12",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "4",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    distributed.initialize(processes=1)  # looks for no cluster, or it would fail here
    assert jax.process_count() == 1


# What the Kubernetes client does in a pod without a service account.
CLIENT = """
class config:
    def load_incluster_config():
        raise Exception("Service token file does not exist.")
"""
JOIN = """
from sret_jax.cli import clear_errors
from sret_jax.parallel import distributed
with clear_errors():
    distributed.initialize()
"""


@pytest.mark.parametrize(
    ("index", "client", "status", "said"),
    [
        (None, True, 0, "This Kubernetes pod is in no indexed job and runs as one process.\n"),
        (None, False, 0, ""),
        ("1", True, 2, "Error: JAX cannot find the other pods of this Kubernetes job (Service "),
        ("1", False, 0, "This is pod 1 of an indexed Kubernetes job, and it runs alone; "),
    ],
)
def test_a_kubernetes_pod_joins_others_or_says_that_it_is_alone(
    index, client, status, said, tmp_path, monkeypatch
):
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{tmp_path}")
    if index is not None:
        monkeypatch.setenv("JOB_COMPLETION_INDEX", index)
    body = CLIENT if client else "raise ImportError"
    (tmp_path / "kubernetes.py").write_text(body)
    done = subprocess.run(
        [sys.executable, "-c", JOIN], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == status, done.stderr
    output = done.stdout + done.stderr
    assert output.startswith(said) and output.count("\n") == bool(said)
