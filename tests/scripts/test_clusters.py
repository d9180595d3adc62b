"""The JobSets and the SkyPilot file of scripts/: what they run, and what they do at its end."""

import json
import os
import re
import subprocess
import sys

import pytest
import yaml

from sret_jax import exit_status
from tests.conftest import ROOT

SCRIPTS = ROOT / "scripts"
PYTHON = f"""#!{sys.executable}
import json, sys
print(json.dumps(sys.argv[1:]))
"""


def jobset(kind):
    """A JobSet, its only job, and the only container of that."""
    whole = yaml.safe_load((SCRIPTS / f"jobset_{kind}.yaml").read_text())
    (replicated,) = whole["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    return whole, replicated["name"], job, container


def skypilot():
    return yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text())


def run_on_skypilot(folder, tools=()):
    """The command that a node runs, with these other programs on it."""
    for path, text in ((".venv/bin/python", PYTHON), *((f"bin/{name}", "") for name in tools)):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text or "#!/bin/sh\n")
        (folder / path).chmod(0o755)
    done = subprocess.run(
        ["bash", "-euc", skypilot()["run"]],
        cwd=folder,
        env={
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": "1",
            **skypilot()["envs"],
            "WORKDIR": "gs://BUCKET/RUN",
            "DATA": "gs://BUCKET/DATA",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


TRAINING = [
    "--config=configs/sret_s.py",
    "--workdir=gs://BUCKET/RUN",
    "--config.data.data_dir=gs://BUCKET/DATA",
]


def test_the_pods_of_gpu_nodes_are_told_of_each_other_by_flags_of_main():
    whole, name, job, container = jobset("gpu")
    set_name = whole["metadata"]["name"]
    port = container["ports"][0]["containerPort"]
    flags = [
        f"--coordinator={set_name}-{name}-0-0.{set_name}:{port}",
        f"--processes={job['parallelism']}",
        "--process_id=$(JOB_COMPLETION_INDEX)",
    ]
    assert container["command"] == ["python", "main.py"]
    assert container["args"] == [*flags, *TRAINING]
    flags[-1] = "--process_id=1"
    done = subprocess.run(
        [sys.executable, "main.py", *flags, *TRAINING, "--the_only_unknown_flag"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == exit_status.BAD_INPUT
    assert re.match("Error: Unknown command line flag 'the_only_unknown_flag'", done.stderr)


def test_tpu_pods_find_each_other_and_fill_their_slice():
    _, _, job, container = jobset("tpu")
    assert container["command"] == ["python", "main.py"] and container["args"] == TRAINING
    topology = job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    rows, columns = map(int, topology.split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] * chips == rows * columns


@pytest.mark.parametrize("kind", ["gpu", "tpu"])
def test_a_jobset_ends_at_bad_input_and_continues_after_a_stop(kind):
    whole, _, job, container = jobset(kind)
    assert job["completions"] == job["parallelism"] and job["backoffLimit"] == 0
    actions = {
        status: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        if rule["onExitCodes"]["containerName"] == container["name"]
        for status in rule["onExitCodes"]["values"]
    }
    assert actions == {exit_status.BAD_INPUT: "FailJob", exit_status.PREEMPTED: "Ignore"}
    (rule,) = whole["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_skypilot_tells_gpu_nodes_of_each_other_and_starts_a_stopped_run_again(tmp_path):
    flags = ["--coordinator=10.0.0.1:8476", "--processes=2", "--process_id=1"]
    gpu, tpu = tmp_path / "gpu", tmp_path / "tpu"
    assert run_on_skypilot(gpu, ["nvidia-smi"]) == ["main.py", *flags, *TRAINING]
    assert run_on_skypilot(tpu) == ["main.py", *TRAINING]
    recovery = skypilot()["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [exit_status.PREEMPTED]
