r"""Breaks a real training run again and again, and compares its end with an unbroken one's.

python -m tests.chaos.chaos --workdir=DIR                      (40 faults, about 12 minutes)
python -m tests.chaos.chaos --workdir=DIR --times=1 \
  --config.optim.warmup_lr=1e30 --config.optim.warmup_epochs=0.4   (breaks rollbacks, too)

Whatever else is given goes to main.py.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable

from etils import epath

from sret_jax.checkpoints.manager import CHECKPOINTS
from sret_jax.cli import Parser, clear_errors, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.exit_status import HUNG, PREEMPTED
from sret_jax.run.rollback import Rollbacks
from tests.chaos.attempt import EVAL_STEPS, Attempt

KILLED = -signal.SIGKILL


@dataclasses.dataclass(frozen=True)
class Fault:
    """Something that goes wrong.

    Attributes:
      name: as the table shows it.
      moment: waits for the moment; false if the run ended first.
      act: what then happens to the run.
      status: with which the run must end.
      hit: whether the dead run shows that this was the moment.
      afterwards: what then happens to its newest checkpoint; false if nothing can.
    """

    name: str
    moment: Callable[[Attempt, random.Random], bool]
    act: Callable[[Attempt], object]
    status: int
    hit: Callable[[Attempt], object] = Attempt.steps
    afterwards: Callable[[pathlib.Path], bool] | None = None


def start_up(attempt: Attempt, rng: random.Random) -> bool:
    """Any time until the first step."""
    deadline = time.monotonic() + rng.uniform(0, 15)
    return attempt.happens(lambda: attempt.steps() or time.monotonic() > deadline)


def training(attempt: Attempt, rng: random.Random) -> bool:
    """Any time in some steps."""
    first, delay = rng.randint(1, EVAL_STEPS), rng.uniform(0, 0.05)
    met = attempt.happens(lambda: len(attempt.steps()) >= first)
    time.sleep(delay)
    return met


def training_on(attempt: Attempt, rng: random.Random) -> bool:
    """Any time in some steps, once two checkpoints are whole."""
    return attempt.happens(lambda: len(complete_steps(attempt.workdir)) > 1) and training(
        attempt, rng
    )


def evaluation(attempt: Attempt, rng: random.Random) -> bool:
    """Between the report of a step and that of the evaluation that follows."""
    delay = rng.uniform(0, 0.03)
    met = attempt.happens(lambda: any(s % EVAL_STEPS == 0 for s in attempt.steps()[-1:]))
    time.sleep(delay)
    return met


def saving(attempt: Attempt, rng: random.Random) -> bool:
    """While a checkpoint is half-written."""
    delay = rng.uniform(0, 0.01)
    met = attempt.happens(attempt.half_written)
    time.sleep(delay)
    return met


def kill(attempt: Attempt) -> None:
    """SIGKILL, as the kernel does it when memory runs out."""
    attempt.process.kill()


def terminate(attempt: Attempt) -> None:
    """SIGTERM, as schedulers and machines about to be taken away do it."""
    attempt.process.terminate()


def kill_workers(attempt: Attempt) -> None:
    """SIGKILL to the loader's processes."""
    signal_all(attempt.workers(), signal.SIGKILL)


def stop_workers(attempt: Attempt) -> None:
    """SIGSTOP to the loader's processes: they hang."""
    signal_all(attempt.workers(), signal.SIGSTOP)


def has_not_stepped(attempt: Attempt) -> bool:
    """Whether it died before its first report."""
    return not attempt.steps()


def was_evaluating(attempt: Attempt) -> bool:
    """Whether it died after the report of a step that is evaluated, and before that evaluation."""
    told = [line for line in attempt.lines if line.startswith(("step ", "evaluation at"))]
    return bool(told) and told[-1].startswith("step ") and attempt.steps()[-1] % EVAL_STEPS == 0


def truncate(checkpoint: pathlib.Path) -> bool:
    """Cuts every array of the weights in half."""
    files = list(checkpoint.glob("model/**/d/*"))
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return bool(files)


def empty(checkpoint: pathlib.Path) -> bool:
    """Leaves the folder alone."""
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    return True


FAULTS = (
    Fault("SIGKILL in start-up", start_up, kill, KILLED, has_not_stepped),
    Fault("SIGKILL in training", training, kill, KILLED),
    Fault("SIGKILL in an evaluation", evaluation, kill, KILLED, was_evaluating),
    Fault("SIGKILL in a save", saving, kill, KILLED, Attempt.half_written),
    Fault("SIGTERM in training", training, terminate, PREEMPTED),
    Fault("SIGTERM in an evaluation", evaluation, terminate, PREEMPTED, was_evaluating),
    Fault("loader worker killed", training, kill_workers, 1),
    Fault("loader worker hangs", training, stop_workers, HUNG),
    Fault("SIGKILL, newest checkpoint truncated", training_on, kill, KILLED, afterwards=truncate),
    Fault("SIGKILL, newest checkpoint emptied", training_on, kill, KILLED, afterwards=empty),
)


class Chaos:
    """Breaks runs in `workdir`, each started again until it ends."""

    def __init__(self, workdir: pathlib.Path, flags: list[str], seed: int):
        self._workdir = workdir
        self._flags = flags
        self._rng = random.Random(seed)
        self._logs = itertools.count()
        self.injected = dict.fromkeys([fault.name for fault in FAULTS], 0)
        self.problems: list[str] = []
        self.endings = 0

    def run(self, times: int) -> None:
        """Injects every fault `times` times."""
        (self._workdir / "logs").mkdir(parents=True)
        reference = self._workdir / "unbroken"
        if self._attempt(reference).wait() != 0:
            raise UserError(f"the unbroken run fails; see {self._workdir / 'logs' / '0.log'}")
        self._ending = ending(reference)
        todo = [fault for fault in FAULTS for _ in range(times)]
        self._rng.shuffle(todo)
        for number in itertools.count():
            if not todo:
                return
            self._break(self._workdir / f"broken-{number}", todo)

    def _break(self, workdir: pathlib.Path, todo: list[Fault]) -> None:
        """Injects faults from the end of `todo` into one run until it ends."""
        expected = 0
        damaged: set[int] = set()  # and not yet set aside
        while True:
            attempt = self._attempt(workdir)
            fault = todo[-1] if todo else None
            met = fault is not None and fault.moment(attempt, self._rng)
            if fault and met:
                fault.act(attempt)
            status = attempt.wait()
            if left := attempt.leftovers():
                self._complain(f"left behind: {', '.join(left)}", attempt)
            if attempt.steps() and attempt.resumed_at() != expected:
                self._complain(f"resumed at {attempt.resumed_at()}, not at {expected}", attempt)
            if status == 0:
                self._compare(workdir, attempt)
                return
            if not fault or not met or status != fault.status:
                self._complain(f"{fault and fault.name}: status {status}", attempt)
                if fault:
                    todo.pop()
                return
            if attempt.steps():
                damaged.clear()
            steps = [step for step in complete_steps(workdir) if step not in damaged]
            if status == PREEMPTED and max(attempt.steps()) not in steps:
                self._complain(f"step {max(attempt.steps())} is not saved", attempt)
            if self._came_about(fault, attempt, steps):
                todo.pop()
                self.injected[fault.name] += 1
                print(f"{fault.name}: after step {max(attempt.steps(), default=0)}", flush=True)
            damaged |= {step for step in complete_steps(workdir) if step not in steps}
            windows = Rollbacks.read(epath.Path(workdir))
            expected = windows.continues_at(max(steps, default=0))

    def _came_about(self, fault: Fault, attempt: Attempt, steps: list[int]) -> bool:
        """Whether it was this fault; damages the newest of `steps`, and drops it, if it says so."""
        if not fault.hit(attempt):
            return False
        if not fault.afterwards:
            return True
        if len(steps) < 2:
            return False
        return fault.afterwards(attempt.checkpoints / str(steps.pop()))

    def _attempt(self, workdir: pathlib.Path) -> Attempt:
        log = self._workdir / "logs" / f"{next(self._logs)}.log"
        return Attempt(workdir, self._flags, log)

    def _compare(self, workdir: pathlib.Path, attempt: Attempt) -> None:
        self.endings += 1
        if differing := differences(self._ending, ending(workdir)):
            self._complain(f"another ending: {', '.join(differing[:5])}", attempt)
        else:
            print(f"{workdir.name} ended as the unbroken run did", flush=True)

    def _complain(self, problem: str, attempt: Attempt) -> None:
        print(f"PROBLEM: {problem} ({attempt.log})", flush=True)
        self.problems.append(problem)


def complete_steps(workdir: pathlib.Path) -> list[int]:
    """The steps whose checkpoints are whole, ascending."""
    return sorted(
        int(path.name) for path in (workdir / CHECKPOINTS).glob("*") if path.name.isdigit()
    )


def ending(workdir: pathlib.Path) -> dict[str, object]:
    """Every array of the last checkpoint, every line of metrics, and the evaluation."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    facts: dict[str, object] = {}
    step = complete_steps(workdir)[-1]
    with contextlib.closing(ocp.StandardCheckpointer()) as checkpointer:
        for item in ("model", "ema", "train"):
            tree = checkpointer.restore(workdir.absolute() / CHECKPOINTS / str(step) / item)
            flat, _ = jax.tree_util.tree_flatten_with_path(tree)
            facts |= {
                f"{step} {item}{jax.tree_util.keystr(path)}": np.asarray(x).tobytes()
                for path, x in flat
            }
    result = json.loads((workdir / "result.json").read_text())
    facts["result"] = [result["step"], result["eval"], result["eval_ema"]]
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    facts["losses"] = sorted((line["step"], line["loss"]) for line in lines if "loss" in line)
    return facts


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    """The names of what is not the same, bit for bit."""
    return [name for name in one | other if one.get(name) != other.get(name)]


def signal_all(pids: list[int], number: signal.Signals) -> None:
    """Sends a signal to every process that still is."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def table(injected: dict[str, int]) -> str:
    """How often each fault came, aligned."""
    return "\n".join(f"{name:<40} {count:>3}" for name, count in injected.items())


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = Parser(prog="python -m tests.chaos.chaos", description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a new folder")
    parser.add_argument("--times", type=int, default=4, help="that each fault is injected")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and their order")
    parser.add_argument("--json", type=pathlib.Path, help="also write the figures here")
    args, flags = parser.parse_known_args(argv)
    quiet_libraries()
    with clear_errors():
        if args.times < 1:
            raise UserError(f"--times={args.times} must be at least 1")
        if args.workdir.exists():
            raise UserError(f"--workdir={args.workdir} exists; give a new folder")
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(args.workdir.absolute() / "xla"))
        start = time.monotonic()
        chaos = Chaos(args.workdir, flags, args.seed)
        chaos.run(args.times)
        report = {
            "faults": chaos.injected,
            "endings": chaos.endings,
            "problems": chaos.problems,
            "seconds": round(time.monotonic() - start),
        }
        print(table(chaos.injected))
        print(
            f"{sum(chaos.injected.values())} faults, {chaos.endings} runs ended, "
            f"{len(chaos.problems)} problems, {report['seconds']} s"
        )
        if args.json:
            args.json.write_text(json.dumps(report, indent=2) + "\n")
        sys.exit(bool(chaos.problems))


if __name__ == "__main__":
    main()
