"""scripts/launch_tpu_pod.sh, with a gcloud whose workers are folders of this machine."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.skipif(
    not shutil.which("tmux") or not (ROOT / ".git").exists(),
    reason="needs tmux and a git checkout",
)

# As gcloud: one log a worker, whose shell reads the command once more; exit status of the last.
GCLOUD = """#!/usr/bin/env bash
shift 4 # compute tpus tpu-vm COMMAND
for argument in "$@"; do
  case "$argument" in
    --command=*) command="${argument#*=}" ;;
    --output-directory=*) logs="${argument#*=}" ;;
    --worker=all) workers="0 1" ;;
    --worker=*) workers="${argument#*=}" ;;
    *.tar.gz) archive="${archive:-$argument}" ;;
  esac
done
for worker in $workers; do
  home="$PODS/$worker"
  log="${logs:-$PODS}/$worker.log"
  if [[ -e "$home/unreachable" ]]; then
    echo "ssh: connect to host 10.0.0.$worker port 22: Connection refused" > "$log"
    status=255
  elif [[ -n "${archive:-}" ]]; then
    cp "$archive" "$home/sret_jax.tar.gz"
  else
    env -i PATH="$PATH" HOME="$home" TMUX_TMPDIR="$home" PODS="$PODS" \\
      bash -c "$command" > "$log" 2>&1 || status=$?
  fi
done
exit "${status:-0}"
"""

# A training of this repository's own launcher that saves when asked.
MAIN = """
import json, os, pathlib, signal, sys
home = pathlib.Path.home()
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), os._exit(75)))
with (home / "starts").open("a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
print("training", flush=True)
signal.pause()
"""

# An installer of the Python of these tests.
UV = f"""#!/usr/bin/env bash
mkdir -p .venv/bin
printf '#!/bin/sh\\nexec {sys.executable} "$@"\\n' > .venv/bin/python
chmod +x .venv/bin/python
"""


class Pod:
    """Two workers, and the script that is tried on them."""

    def __init__(self, folder):
        self._folder = folder
        for worker in range(2):
            self._write(f"{worker}/.local/bin/uv", UV)
        self._write("bin/gcloud", GCLOUD)

    def _write(self, path, text):
        path = self._folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def home(self, worker):
        return self._folder / str(worker)

    def call(self, command, *args):
        done = subprocess.run(
            [ROOT / "scripts" / "launch_tpu_pod.sh", command, "my-pod", *args],
            cwd=ROOT,
            env={
                **os.environ,
                "PODS": str(self._folder),
                "PATH": f"{self._folder / 'bin'}:{os.environ['PATH']}",
            },
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        return done.returncode, done.stdout.splitlines()

    def set_up(self):
        """The command setup, then a main.py that only waits."""
        assert self.call("setup") == (0, ["worker 0 1: ready"])
        for worker in range(2):
            assert (self.home(worker) / "sret_jax/sret_jax/models/families/sret.py").exists()
            shutil.copytree(
                ROOT / "sret_jax", self.home(worker) / "sret_jax/sret_jax", dirs_exist_ok=True
            )
            (self.home(worker) / "sret_jax/main.py").write_text(MAIN)

    def starts(self, worker):
        """The flags of every start of main.py on a worker."""
        file = self.home(worker) / "starts"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def wait_for_starts(self):
        deadline = time.monotonic() + 20
        while not all(self.starts(worker) for worker in range(2)):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def end(self):
        for worker in range(2):
            subprocess.run(
                ["tmux", "kill-server"],
                env={**os.environ, "TMUX_TMPDIR": str(self.home(worker))},
                capture_output=True,
                check=False,
            )


@pytest.fixture
def pod():
    with tempfile.TemporaryDirectory() as folder:  # tmp_path is too long for a socket
        pod = Pod(pathlib.Path(folder))
        yield pod
        pod.end()


def test_every_worker_runs_once_says_how_it_is_and_saves_when_stopped(pod):
    never = "does not run; it was never started"
    assert pod.call("status") == (1, [f"worker 0 1: {never}"])
    assert pod.call("start") == (1, ["worker 0 1: not set up; run the command setup first"])
    pod.set_up()

    flags = ["--config.x=((2,2),(1,1))", "a 'b' \"c\" $HOME `id` \\ * ; & \n d", "", "--w=gs://b/r"]
    assert pod.call("start", *flags) == (0, ["worker 0 1: started"])
    assert pod.call("start", *flags) == (0, ["worker 0 1: runs already"])
    pod.wait_for_starts()
    for worker in range(2):
        (start,) = pod.starts(worker)
        assert start == ["--start_timeout=300", "--peer_timeout=100", *flags]
    assert pod.call("status") == (0, ["worker 0 1: runs"])

    stopped = "worker 0 1: does not run; it ended with exit status 75"
    assert pod.call("stop") == (0, [stopped])
    assert pod.call("status") == (1, [stopped])
    log = (pod.home(0) / ".sret_jax/log").read_text()
    assert re.fullmatch("training\nLauncher: stopping .*\nsaved\n", log)


def test_a_worker_that_fails_or_is_out_of_reach_is_named(pod):
    pod.set_up()
    (pod.home(0) / "sret_jax/main.py").write_text("raise SystemExit(2)")
    (pod.home(1) / "unreachable").touch()
    out_of_reach = (
        "worker 1: cannot be reached, or failed: "
        "ssh: connect to host 10.0.0.1 port 22: Connection refused"
    )
    assert pod.call("start") == (1, ["worker 0: started", out_of_reach])
    (pod.home(1) / "unreachable").unlink()

    deadline = time.monotonic() + 20
    while not (pod.home(0) / ".sret_jax/status").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    status, answers = pod.call("status")
    assert status == 1
    assert answers == [
        "worker 0: does not run; it ended with exit status 2",
        "worker 1: does not run; it was never started",
    ]


@pytest.mark.parametrize("args", [(), ("start",), ("dance", "my-pod")])
def test_a_wrong_command_line_is_explained(args):
    script = ROOT / "scripts" / "launch_tpu_pod.sh"
    done = subprocess.run([script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "Usage: " in done.stderr or "no command 'dance'; give setup, start," in done.stderr
