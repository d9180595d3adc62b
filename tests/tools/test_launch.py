"""The launcher, with real processes that die."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from sret_jax.tools import launch
from tests.conftest import FAST_COMPILE, ROOT, TINY_FLAGS

# The beginning of every script in these tests; it counts its own starts in files.
OPENING = """
import json, os, pathlib, signal, subprocess, sys, time
flags = dict(arg[2:].split("=", 1) for arg in sys.argv[1:])
rank = int(flags.get("process_id", 0))
starts = pathlib.Path(__file__).parent / f"starts.{rank}"
with starts.open("a") as file:
    print(json.dumps(flags), file=file)
start = len(starts.read_text().splitlines())
def wait_for(name):
    while not (starts.parent / name).exists():
        time.sleep(0.01)
def write(name, text=""):
    (starts.parent / name).write_text(text)
"""
SHORT_WAITS = "launch.MARGIN = 0; launch.LEFTOVER_SECONDS = 0.3"


@pytest.fixture
def start(tmp_path):
    """Starts the launcher, with short timeouts, on a script with this body."""

    def start(body, *flags, settings=SHORT_WAITS):
        (tmp_path / "script.py").write_text(OPENING + body)
        code = f"from sret_jax.tools import launch; {settings}; launch.main()"
        launcher = subprocess.Popen(
            [sys.executable, "-c", code, "--peer_timeout=1", *flags, "script.py", "--own=flag"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # These tests may run under nohup, which makes children ignore hang-ups.
            preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
        )
        launchers.append(launcher)
        return launcher

    launchers = []
    yield start
    for launcher in launchers:
        launcher.kill()


@pytest.fixture
def run(start):
    """Runs a script to its end; returns the status, the output and the launcher's sentences."""

    def run(*args, **kwargs):
        launcher = start(*args, **kwargs)
        output, errors = launcher.communicate(timeout=60)
        return launcher.returncode, output, errors

    return run


@pytest.fixture
def starts(tmp_path):
    """The flags of every start of a process, in order."""

    def starts(rank):
        return [json.loads(line) for line in (tmp_path / f"starts.{rank}").read_text().splitlines()]

    return starts


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def is_running(process):
    try:
        stat = pathlib.Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def test_several_processes_are_told_where_to_meet_and_one_is_not(run, starts):
    body = "print(f'output of {rank}')"
    status, output, errors = run(body, "--processes=2", "--start_timeout=7")
    assert status == 0
    assert output == "output of 0\n"  # as it is; the others' lines say whose they are
    assert errors == "[1] output of 1\n"
    for rank in range(2):
        (flags,) = starts(rank)
        assert re.fullmatch(r"localhost:\d+", flags.pop("coordinator"))
        assert flags == {
            "processes": "2",
            "process_id": str(rank),
            "start_timeout": "7",
            "peer_timeout": "1",
            "own": "flag",
        }
    assert run(body) == (0, "output of 0\n", "")
    assert starts(0)[1] == {"start_timeout": "300", "peer_timeout": "1", "own": "flag"}


def test_after_a_kill_the_process_is_named_and_all_start_again_at_another_port(run, starts):
    body = """
if start == 1 and rank == 1:
    wait_for("ready")
    os.kill(os.getpid(), signal.SIGKILL)
if start == 1 and rank == 0:
    write("ready")
    time.sleep(0.3)
    sys.exit(1)  # as a peer does when the connection breaks
"""
    status, _, errors = run(body, "--processes=2")
    assert status == 0
    assert "process 1 was ended by SIGKILL (out of memory, perhaps); the others have 1 s" in errors
    assert "process 1 was ended by SIGKILL (out of memory, perhaps); starting again" in errors
    assert "(restart 1 of 3)" in errors and "process 0" not in errors
    assert len({flags["coordinator"] for flags in starts(0) + starts(1)}) == 2


def test_a_kill_is_to_blame_even_if_the_error_it_causes_is_seen_first(run):
    body = """
if start == 1 and rank == 0:
    write("failed")
    sys.exit(1)
if start == 1 and rank == 1:
    wait_for("failed")
    time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    status, _, errors = run(body, "--processes=2")
    assert status == 0
    assert "process 0 ended with exit status 1 (an error); the others have 1 s to end" in errors
    assert "process 1 was ended by SIGKILL (out of memory, perhaps); starting again" in errors


def test_a_stopped_process_is_to_blame_for_the_aborts_of_the_others(run, starts):
    body = """
if start == 1 and rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
elif start == 1:
    os.abort()
"""
    status, _, errors = run(body, "--processes=3")
    assert status == 0
    assert re.search(r"process [02] was ended by SIGABRT .*; the others have 1 s to end", errors)
    assert errors.count("process 1 did not end within 1 s and is killed") == 1
    assert "process 1 hung or was stopped: it continued when another had ended; starting" in errors
    assert [len(starts(rank)) for rank in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("status", [2, 75])
def test_bad_input_and_a_stop_are_not_started_again(status, run, starts):
    assert run(f"sys.exit({status})", "--processes=2") == (status, "", "")
    assert len(starts(0)) == len(starts(1)) == 1


@pytest.mark.parametrize(
    ("end", "status", "sentence"),
    [
        ("sys.exit(76)", 76, "script.py ended with exit status 76 (it hung)"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", 139, "script.py was ended by SIGSEGV"),
    ],
)
def test_when_the_restarts_are_used_up_the_status_is_that_of_the_process(
    end, status, sentence, run, starts
):
    ended, _, errors = run(end, "--restarts=1")
    assert ended == status
    assert len(starts(0)) == 2
    assert f"Launcher: {sentence}; starting again (restart 1 of 1).\n" in errors
    assert errors.endswith(f"Launcher: {sentence}; no restarts are left (of 1).\n")


def test_failures_before_a_long_run_no_longer_count(run, starts):
    body = "sys.exit(start < 4)"
    assert run(body, "--restarts=1", settings=f"{SHORT_WAITS}; launch.LONG_RUN = 0")[0] == 0
    assert len(starts(0)) == 4


SAVES_WHEN_ASKED = """
def save(number, frame):
    write(f"saved.{rank}", signal.Signals(number).name)
    sys.exit(75)
signal.signal(signal.SIGTERM, save)
signal.signal(signal.SIGINT, lambda *_: write("interrupted"))
write(f"ready.{rank}")
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_every_process_saves_and_the_launcher_says_so(how, start, tmp_path):
    launcher = start(SAVES_WHEN_ASKED, "--processes=2")
    wait_for(lambda: all((tmp_path / f"ready.{i}").exists() for i in range(2)))
    os.killpg(launcher.pid, how)  # as a terminal does for Ctrl-C
    assert launcher.wait(20) == 75
    assert [(tmp_path / f"saved.{i}").read_text() for i in range(2)] == ["SIGTERM", "SIGTERM"]
    assert not (tmp_path / "interrupted").exists()


def test_under_nohup_a_hang_up_stops_nothing(start, tmp_path):
    nohup = f"{SHORT_WAITS}; import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    launcher = start(SAVES_WHEN_ASKED, "--processes=2", settings=nohup)
    wait_for(lambda: all((tmp_path / f"ready.{i}").exists() for i in range(2)))
    os.killpg(launcher.pid, signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        launcher.wait(1)
    launcher.terminate()
    assert launcher.wait(20) == 75
    assert [(tmp_path / f"saved.{i}").read_text() for i in range(2)] == ["SIGTERM", "SIGTERM"]


def test_asked_to_stop_before_training_begins_it_can_be_started_again(start, tmp_path):
    launcher = start("write('ready'); time.sleep(60)")
    wait_for((tmp_path / "ready").exists)
    launcher.terminate()
    assert launcher.wait(20) == 75


def test_a_second_ctrl_c_kills_what_does_not_end(start, tmp_path):
    body = "signal.signal(signal.SIGTERM, lambda *_: write('asked')); write('ready')\n"
    launcher = start(body + "while True: time.sleep(0.1)")
    wait_for((tmp_path / "ready").exists)
    launcher.send_signal(signal.SIGINT)
    wait_for((tmp_path / "asked").exists)
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 130


def test_a_killed_launcher_takes_its_processes_along(start, tmp_path):
    launcher = start("write(f'process.{rank}', str(os.getpid())); time.sleep(60)", "--processes=2")
    files = [tmp_path / f"process.{i}" for i in range(2)]
    wait_for(lambda: all(file.exists() and file.read_text() for file in files))
    launcher.kill()
    launcher.wait()
    wait_for(lambda: not any(is_running(file.read_text()) for file in files))


def test_nothing_of_a_killed_process_is_left_when_it_starts_again(run, tmp_path):
    body = """
if start == 1:
    from multiprocessing import shared_memory
    memory = shared_memory.SharedMemory(create=True, size=1000)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    write("left", f"{memory.name} {worker.pid}")
    os.kill(os.getpid(), signal.SIGKILL)
memory, worker = (starts.parent / "left").read_text().split()
assert not pathlib.Path("/dev/shm", memory).exists()
assert not pathlib.Path("/proc", worker).exists()
"""
    assert run(body, "--restarts=1")[0] == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ((), "no script is given; name it after the launcher's flags, as in main.py"),
        (("--processes=2",), "no script is given; name it after the launcher's flags"),
        (("--processes=0", "main.py"), "--processes=0 must be at least 1"),
        (("--restarts=-1", "main.py"), "--restarts=-1 must be at least 0"),
        (("--workdir=X", "main.py"), "the launcher has no flag --workdir=X; flags of main.py go"),
        (("nowhere.py", "--processes=2"), "there is no script 'nowhere.py'; give main.py"),
    ],
)
def test_bad_input_ends_in_one_sentence(flags, sentence, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as end:
        launch.main(list(flags))
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert error.startswith(f"Error: {sentence}") and error.count("\n") == 1


def test_the_launcher_waits_for_no_library():
    code = "import sys, sret_jax.tools.launch; assert not {'jax', 'tensorflow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class Training:
    """The launcher with two processes of main.py, two devices each, on a tiny model."""

    def __init__(self, workdir, digits_dir):
        self.workdir = workdir
        self._memory_before = shared_memory()
        self.memory = set()
        self._log = (workdir.parent / "log").open("w")
        self._launcher = subprocess.Popen(
            [
                *(sys.executable, "-m", "sret_jax.tools.launch"),
                # More restarts than the test causes: processes whose first steps begin more than
                # 30 s apart, as on a busy machine, fail in Gloo.
                *("--processes=2", "--peer_timeout=10", "--restarts=5"),
                *("main.py", f"--workdir={workdir}", f"--config.data.data_dir={digits_dir}"),
                *TINY_FLAGS,
                *("--config.epochs=0.9", "--config.checkpoint.every_epochs=0.25"),  # 6 of 20 steps
                *("--config.data.workers=2", "--config.model.image_size=64"),  # shared memory
            ],
            cwd=ROOT,
            env={
                **os.environ,
                "XLA_FLAGS": f"{FAST_COMPILE} --xla_force_host_platform_device_count=2",
            },
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._launcher.kill()

    def reach(self, step):
        """Waits for a step, and records the shared memory that the loaders use then."""
        while not (self.workdir / "metrics.jsonl").exists() or step not in self.steps():
            assert self._launcher.poll() is None, self.output()
            self.memory |= shared_memory() - self._memory_before
            time.sleep(0.05)

    def steps(self):
        lines = (self.workdir / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines if '"loss"' in line]

    def ranks(self):
        """The processes of main.py, each of which leads a session."""
        pid = self._launcher.pid
        return sorted(
            map(int, pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        )

    def end(self):
        status = self._launcher.wait(300)
        return status, self.output()

    def output(self):
        return pathlib.Path(self._log.name).read_text()


def members(sessions):
    """All processes in those sessions."""
    processes = [int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*")]
    return [process for process in processes if session(process) in sessions]


def session(process):
    try:
        return os.getsid(process)
    except ProcessLookupError:
        return None


def shared_memory():
    return set(pathlib.Path("/dev/shm").glob("psm_*"))


@pytest.mark.slow  # two processes compile and train, twice
@pytest.mark.parametrize(
    ("rank", "how", "sentence"),
    [
        (1, signal.SIGKILL, "process 1 was ended by SIGKILL (out of memory, perhaps)"),
        (0, signal.SIGSTOP, "process 0 hung or was stopped: it continued when another had ended"),
    ],
)
def test_a_run_goes_on_to_its_end_when_a_process_is_lost_midway(
    rank, how, sentence, tmp_path, digits_dir
):
    with Training(tmp_path / "run", digits_dir) as run:
        run.reach(14)
        ranks = run.ranks()
        assert len(members(ranks)) >= 2 * (1 + 2)  # loader workers too
        os.kill(ranks[rank], how)
        status, output = run.end()
        assert status == 0, output
        assert f"Launcher: {sentence}; starting again (restart " in output
        assert "at step 12." in output and "Test accuracy" in output
        assert run.steps() == list(range(1, 21))
        assert not members(ranks)
        assert run.memory and not run.memory & shared_memory()
