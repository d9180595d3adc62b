"""Tasks run in order, at once, on cores of their own, and end when they are asked to."""

import os
import signal
import sys
import threading
import time

import pytest

from sret_jax.study.tasks import SIGNALS, Stopped, Task, run_tasks, shares

WAIT_FOR_BOTH = "touch {0}; for i in $(seq 500); do [ -e {1} ] && exit 0; sleep 0.02; done; exit 1"
SAVES_WHEN_ASKED = "trap 'touch saved; exit 75' TERM; touch begun; while :; do sleep 0.02; done"


def shell(tmp_path, name, text, *needs):
    return Task(name, ("sh", "-c", f"cd {tmp_path}; {text}"), tmp_path / f"{name}.txt", needs)


def run(tasks, slots):
    ended = []
    begun = []
    blocked = run_tasks(tasks, slots, os.environ, begun.append, ended.append)
    assert {e.task for e in ended} == set(begun)
    return blocked, ended


def test_tasks_run_in_their_order_but_after_what_they_need(tmp_path):
    tasks = [
        shell(tmp_path, "late", "echo out", "early"),
        shell(tmp_path, "early", "true"),
        shell(tmp_path, "hopeless", "true", "broken"),
        shell(tmp_path, "broken", "echo why >&2; exit 3"),
        shell(tmp_path, "last", "true"),
    ]
    blocked, ended = run(tasks, [()])
    assert [(e.task.name, e.status) for e in ended] == [
        *(("early", 0), ("late", 0), ("broken", 3), ("last", 0))
    ]
    assert [task.name for task in blocked] == ["hopeless"]
    assert (tmp_path / "late.txt").read_text() == "out\n"
    assert (tmp_path / "broken.txt").read_text() == "why\n"


def test_several_tasks_run_at_once(tmp_path):
    tasks = [
        shell(tmp_path, "one", WAIT_FOR_BOTH.format("a", "b")),
        shell(tmp_path, "two", WAIT_FOR_BOTH.format("b", "a")),
    ]
    _, ended = run(tasks, [(), ()])
    assert [e.status for e in ended] == [0, 0]


@pytest.mark.parametrize(("cores", "jobs"), [(2, 1), (2, 2), (8, 3), (1, 3), (64, 5)])
def test_each_task_has_an_equal_share_of_the_cores(cores, jobs, monkeypatch):
    granted = set(range(3, 3 + cores))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: granted, raising=False)
    given = shares(jobs)
    assert len(given) == jobs and {len(share) for share in given} == {max(1, cores // jobs)}
    each = [core for share in given for core in share]
    assert set(each) <= granted
    assert jobs > cores or len(set(each)) == len(each)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux binds processes to cores")
def test_a_process_is_bound_to_its_cores_and_this_one_keeps_its_own(tmp_path):
    before = os.sched_getaffinity(0)
    core = max(before)
    says = "import os; print(os.sched_getaffinity(0))"
    task = Task("bound", (sys.executable, "-S", "-c", says), tmp_path / "bound.txt")
    _, (ended,) = run([task], [(core,)])
    assert (tmp_path / "bound.txt").read_text() == f"{{{core}}}\n"
    assert ended.cores == (core,) and os.sched_getaffinity(0) == before


@pytest.fixture
def handled():
    """Gives signals handlers: a shell that starts the tests in the background ignores SIGINT."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_processes_save_and_starts_no_others(number, tmp_path, handled):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    ended = []
    tasks = [
        shell(tmp_path, "saves", SAVES_WHEN_ASKED),
        shell(tmp_path, "waits", "touch started"),
    ]

    def interrupt():
        while not (tmp_path / "begun").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped):
        run_tasks(tasks, [()], os.environ, lambda task: None, ended.append)
    thread.join()
    assert [(e.task.name, e.status) for e in ended] == [("saves", 75)]
    assert (tmp_path / "saved").exists() and not (tmp_path / "started").exists()
    assert [signal.getsignal(number) for number in SIGNALS] == handlers
