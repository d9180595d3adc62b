"""The train loop: resume, step, report, save, evaluate, roll back, and stop on request."""

import contextlib
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.data.loader import Loader, SyntheticLoader
from sret_jax.data.sources.splits import data_remarks
from sret_jax.errors import UserError
from sret_jax.evaluation.bad_images import BadImages, TooManyBadImages
from sret_jax.evaluation.evaluation import Evaluator, Results
from sret_jax.parallel.devices import fits_memory
from sret_jax.parallel.distributed import agreed, gather, is_leader
from sret_jax.parallel.preemption import Preempted, Preemption
from sret_jax.run.crash import write_crash_report
from sret_jax.run.data_record import record_images
from sret_jax.run.lock import Lock, locked, removed_if_unused
from sret_jax.run.profiler import Profiler
from sret_jax.run.report import Callback, Reporter
from sret_jax.run.resume import compare_config
from sret_jax.run.rollback import Diverged
from sret_jax.run.saved_states import SavedStates
from sret_jax.run.watchdog import Watchdog
from sret_jax.settings.saved_config import Start
from sret_jax.terminal import Progress
from sret_jax.text import duration
from sret_jax.training.checks import check_numbers, check_writable
from sret_jax.training.experiment import CompiledStep, Experiment, open_experiment, small_data
from sret_jax.training.state import TrainState
from sret_jax.training.step import Metrics

REMEMBERED_LOSSES = 20


def train(
    config: ConfigDict,
    workdir: epath.Path,
    callbacks: Sequence[Callback] = (),
    *,
    start: Start | None = None,
) -> dict[str, Any]:
    """Trains to the end, resuming from the newest checkpoint in `workdir`.

    Writes checkpoints, config.json, start.json, class_names.json, data.json, metrics.jsonl,
    tensorboard/, curves.png, result.json, per_class.json and, for up to 200 classes, confusion.png
    there; also rollbacks.json if losses were not finite, and crash/ after a crash.

    Args:
      config: from configs/common.py.
      workdir: local or remote folder.
      callbacks: called as callback(step, figures) in process 0 whenever figures are reported.
      start: the command line that the config comes from, which the workdir stores.

    Returns:
      The contents of result.json: {"step", "eval": {"top1", "top5", "loss"}, "eval_ema": {...},
      "best": {"step", "top1"}, "train_seconds", "images_per_second", "compile_seconds",
      "devices"}.

    Raises:
      Preempted: SIGTERM or Ctrl-C came; a checkpoint of the last step is saved.
      UserError: before compilation: a bad config, data set or checkpoint, or another run in the
        workdir. Later: a label outside the classes, a hundred successive unreadable images, losses
        that are not finite after config.rollback.most rollbacks, or a last checkpoint that cannot
        be written.
    """
    with contextlib.ExitStack() as resources:
        if is_leader():
            resources.enter_context(removed_if_unused(workdir))
        preemption = resources.enter_context(Preemption())
        with agreed():
            check_numbers(config)
            check_writable(workdir)
            lock = resources.enter_context(locked(workdir)) if is_leader() else Lock()
            experiment = open_experiment(config, workdir)
        watchdog = resources.enter_context(Watchdog(**config.watchdog))
        run = resources.enter_context(
            contextlib.closing(Run(experiment, preemption, lock, watchdog, callbacks, start))
        )
        try:
            run.train()
            return run.finish()
        except Exception as error:
            run.report_crash(error)
            raise


class Run:
    """A started training run: its state, its data and its reporter."""

    def __init__(
        self,
        experiment: Experiment,
        preemption: Preemption,
        lock: Lock,
        watchdog: Watchdog,
        callbacks: Sequence[Callback],
        start: Start | None,
    ):
        self.experiment = experiment
        self._preemption = preemption
        self._watchdog = watchdog
        self._resources = contextlib.ExitStack()
        self.state: TrainState
        self.step: int
        config = experiment.config
        self._reporter = Reporter(experiment, callbacks)
        self._saved = SavedStates(experiment, lock, watchdog, self._reporter.say)
        self._resources.callback(self._saved.close)
        self._resources.callback(self._reporter.close)
        self._checkpoints = self._saved.checkpoints
        self._warnings = self._resume()
        self._reporter.describe(start)
        with agreed():
            if is_leader():
                data = (experiment.train_source, experiment.eval_source)
                self._warnings += record_images(*data, experiment.workdir, resumes=self.step > 0)
                self._warnings += data_remarks(*data)
        self._evaluator = Evaluator(
            experiment.model,
            config,
            experiment.eval_source,
            experiment.mesh,
            experiment.shardings.variables,
        )
        self._resources.callback(self._evaluator.loader.close)
        self._bad_images = {
            name: BadImages(source, config.data.max_bad_fraction, self._reporter.say)
            for name, source in (
                ("train", experiment.train_source),
                ("eval", experiment.eval_source),
            )
        }
        self._results: Results = {}
        self._compile_seconds = 0.0
        self._loader: Loader | SyntheticLoader | None = None
        self._losses: deque[tuple[int, jax.Array]] = deque(maxlen=REMEMBERED_LOSSES)

    def train(self) -> None:
        """Takes the remaining steps.

        Raises:
          Preempted: the run was asked to stop; a checkpoint of the last step is on disk.
          TooManyBadImages: too many images are unreadable; a checkpoint is on disk, too.
        """
        if self.step >= self.experiment.last_step and self._checkpoints.is_evaluated(self.step):
            self._say_warnings()
            total = self.experiment.total_steps
            early = f" of {total:,}, where config.stop_at_step ends it" if self.step < total else ""
            self._reporter.say(f"Training is complete at step {self.step:,}{early}.")
            return
        try:
            train_steps = self._compile_steps()
        finally:
            self._say_warnings()  # the next start cannot know what changed before this one
        try:
            while not self._results or self.step < self.experiment.last_step:
                try:
                    self._take_steps(train_steps)
                except Diverged as diverged:
                    self._roll_back(diverged)
        except Preempted:
            step = self._save_before_stopping()
            raise Preempted(
                f"Stopped as asked at step {step:,}, which is saved; start again to resume."
            ) from None
        except TooManyBadImages as error:
            step = self._save_before_stopping()
            raise TooManyBadImages(
                f"{error}; step {step:,} is saved, from which the next start continues"
            ) from None

    def finish(self) -> dict[str, Any]:
        """Evaluates the last step if necessary; writes and prints the result.

        Raises:
          UserError: the last checkpoint cannot be written.
        """
        if not self._results:
            self._save_and_evaluate()
        self._saved.settle("training is complete, but its last checkpoint cannot be written")
        best = self._checkpoints.best()
        return self._reporter.result(self.step, self._results, best, self._compile_seconds)

    def close(self) -> None:
        """Waits for the last checkpoint and stops the loader's workers."""
        self._resources.close()

    def report_crash(self, error: Exception) -> None:
        """Writes crash/ for an error that the user did not cause."""
        if isinstance(error, UserError | Preempted) and not isinstance(error, Diverged):
            return
        batches = self._loader.recent_records if self._loader else []
        names = self.experiment.train_source.record_name
        try:
            facts = {
                "step": self.step,
                "losses": {step: _as_text(loss) for step, loss in self._losses},
                "batches": [[names(record) for record in batch] for batch in batches],
                "config": self.experiment.config.to_dict(),
            }
            path = write_crash_report(self.experiment.workdir, error, facts)
        except Exception as e:  # the crash itself is more important
            print(f"No crash report could be written: {e}", flush=True)
        else:
            print(f"What is known of the crash is in {path}.", flush=True)

    def _take_steps(self, train_steps: Mapping[int, CompiledStep]) -> None:
        """Steps from the current state to the end.

        Args:
          train_steps: the compiled step of each number of loops.

        Raises:
          Diverged: too many successive steps were not finite.
          Preempted: the run was asked to stop during the last step.
        """
        experiment, config = self.experiment, self.experiment.config
        loops = experiment.loops_of_steps
        self._check_streak(self.step, {"bad_streak": self.state.bad_streak})
        if self._is_due(self.step) and not self._checkpoints.is_evaluated(self.step):
            self._save_and_evaluate()  # a preemption or a rollback may have skipped it
        with contextlib.ExitStack() as resources:
            self._loader = experiment.train_batches(self.step)
            resources.callback(self._loader.close)
            profiler = Profiler(config.profile, experiment.workdir)
            resources.callback(profiler.close)
            gather(True)  # on CPUs all processes must begin the first step within 30 s
            window = self._reporter.window
            window.restart()
            while self.step < experiment.last_step:
                profiler.before(self.step + 1)
                with window.waiting():
                    batch = next(self._loader)
                with self._fits_memory():
                    self.state, metrics = train_steps[loops[self.step]](self.state, batch)
                self.step += 1
                self._losses.append((self.step, metrics["loss"]))
                self._check_streak(self.step - 1, window.add(metrics))
                profiler.after(self.step, metrics)
                self._watchdog.beat(step=True)

                last = self.step == experiment.last_step
                report = last or self.step % config.log_every_steps == 0
                if report or self._is_due(self.step):
                    self._check_streak(self.step, metrics)
                if report:
                    self._reporter.training(self.step)
                    self._check_images("train", self._loader)
                if self._is_due(self.step):
                    with window.paused():
                        self._save_and_evaluate()
                self._preemption.check()

    def _is_due(self, step: int) -> bool:
        """Whether an evaluation, and possibly a checkpoint, follows that step."""
        return step > 0 and (self._is_save_due(step) or step % self.experiment.eval_every == 0)

    def _is_save_due(self, step: int) -> bool:
        return step >= self.experiment.last_step or step % self.experiment.save_every == 0

    def _save_and_evaluate(self) -> None:
        """Saves if due, then evaluates; so a failing evaluation loses no step."""
        if self._is_save_due(self.step):
            self._saved.save(self.step, self.state)
        if not self._results:
            self._checkpoints.settle()  # the first evaluation might kill the process
        self._watchdog.beat()
        results = self._evaluator.evaluate(
            {"eval": self.state.variables, "eval_ema": self.state.ema}, self._between_batches
        )
        self._check_images("eval", self._evaluator.loader)
        if not math.isfinite(results["eval"]["loss"]):
            raise Diverged("the evaluation's loss is not finite", self.step, self.step - 1)
        if not self._checkpoints.is_evaluated(self.step):
            self._checkpoints.record_metrics(self.step, results["eval"])
        self._results = results
        self._reporter.evaluation(self.step, results, self._evaluator.confusions)
        self._watchdog.beat()

    def _check_images(self, split: str, loader: Loader | SyntheticLoader) -> None:
        """Reports unreadable images. Too many end the run, unless its last step is done."""
        try:
            self._bad_images[split].check(loader)
        except TooManyBadImages as error:
            if self.step < self.experiment.last_step:
                raise
            self._reporter.say(f"The last step is done, but {error}.")

    def _between_batches(self) -> None:
        self._watchdog.beat()
        self._preemption.check()

    def _save_before_stopping(self) -> int:
        """Saves the current step if necessary; returns it once it is on disk."""
        if self.step:
            self._saved.save(self.step, self.state)
        self._saved.settle(f"step {self.step:,}, at which the run stops, cannot be saved")
        return self.step

    def _check_streak(self, step: int, metrics: Metrics | None) -> None:
        """Raises Diverged after config.rollback.bad_steps successive steps that were not finite."""
        streak = int(metrics["bad_streak"]) if metrics else 0
        if streak >= self.experiment.config.rollback.bad_steps:
            raise Diverged(
                f"{streak} steps in a row had a loss or gradient that is not finite",
                step,
                step - streak,
            )

    def _roll_back(self, diverged: Diverged) -> None:
        """Goes back to the last good weights, and leaves out the steps since."""
        self._saved.roll_back(diverged)
        self.state, self.step, weights_step = self._saved.restore()
        self._reporter.start(weights_step)
        self._results = {}

    def _resume(self) -> list[str]:
        """Restores the state; returns sentences to print before the first step."""
        experiment = self.experiment
        self.state, self.step, weights_step = self._saved.restore()
        changes = []
        if self.step:
            self._reporter.say(f"Resuming {experiment.workdir} at step {self.step:,}.")
            changes = compare_config(experiment, self.step)
        self._reporter.start(weights_step)
        of_exits = experiment.mixed_depth.remarks(experiment.model)
        return changes + small_data(experiment) + of_exits

    def _fits_memory(self) -> contextlib.AbstractContextManager[None]:
        config = self.experiment.config
        return fits_memory(
            f"a train step of {config.batch_size:,} images does not fit the memory with "
            f"config.grad_accum={config.grad_accum}; raise that, or recompute activations with "
            "--config.model.remat=full"
        )

    def _say_warnings(self) -> None:
        for warning in self._warnings:
            self._reporter.say(warning)

    def _compile_steps(self) -> dict[int, CompiledStep]:
        """Compiles the evaluation step, and a train step for each number of loops that is left."""
        start = time.perf_counter()
        programs = len(set(self.experiment.loops_of_steps[self.step :].tolist()))
        steps = "the train step" if programs < 2 else f"{programs} train steps"
        self._reporter.say(f"Compiling the evaluation step and {steps}...")
        with Progress("Compiling", enabled=is_leader()):
            with self._watchdog.during("compiling the evaluation step"):
                self._evaluator.rehearse(self.state.variables)
            with self._watchdog.during(f"compiling {steps}"), self._fits_memory():
                compiled = self.experiment.compile_train_steps(self.step)
        self._compile_seconds = time.perf_counter() - start
        self._reporter.say(f"Compiled in {duration(self._compile_seconds)}.")
        return compiled


def _as_text(loss: jax.Array) -> str:
    """Formats a loss, even if the step that should have computed it failed."""
    try:
        return str(loss)
    except Exception as e:
        return type(e).__name__
