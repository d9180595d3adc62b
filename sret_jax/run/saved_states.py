"""The states of a run on disk: saved, restored, and gone back to after steps that diverged."""

from collections.abc import Callable

import jax
import numpy as np

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.errors import UserError
from sret_jax.parallel.distributed import agreed, is_leader
from sret_jax.parallel.mesh import with_shardings
from sret_jax.run.lock import Lock
from sret_jax.run.rollback import ROLLBACKS_FILE, Diverged, Rollbacks
from sret_jax.run.watchdog import Watchdog
from sret_jax.training.experiment import Experiment
from sret_jax.training.initial_weights import initial_state
from sret_jax.training.state import TrainState, from_items, to_items


class SavedStates:
    """Saves and restores the train state of a run, as long as the run holds its workdir's lock.

    Attributes:
      checkpoints: the checkpoints on disk.
    """

    def __init__(
        self,
        experiment: Experiment,
        lock: Lock,
        watchdog: Watchdog,
        say: Callable[[str], None],
    ):
        self._experiment = experiment
        self._lock = lock
        self._watchdog = watchdog
        self._say = say
        config = experiment.config
        self.checkpoints = Checkpoints(
            experiment.workdir,
            keep_latest=config.checkpoint.keep_latest,
            keep_best=config.checkpoint.keep_best,
            keep_every=experiment.keep_every,
        )
        self._rollbacks = Rollbacks.read(experiment.workdir)

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving a state, unless its step is saved already."""
        with agreed():
            self._lock.check()
        if step not in self.checkpoints.steps:
            self.checkpoints.save(step, to_items(state))

    def settle(self, failure: str) -> None:
        """Waits until all states are on disk.

        Args:
          failure: beginning of the sentence if one is not: what cannot be saved.

        Raises:
          UserError: a state cannot be written.
        """
        if not self.checkpoints.settle():
            raise UserError(
                f"{failure} to {self._experiment.workdir}; fix the storage and start again to "
                f"resume at step {max(self.checkpoints.steps, default=0):,}"
            )

    def restore(self) -> tuple[TrainState, int, int]:
        """Restores the newest checkpoint, or makes the first state if there is none.

        Returns:
          The state, its step, and the step of its weights, which is smaller after a rollback.
        """
        target = with_shardings(self._experiment.abstract_state, self._experiment.shardings)
        with self._watchdog.during("restoring a checkpoint"):
            restored = self.checkpoints.restore_newest(to_items(target))
        weights_step, items = restored or (0, {})
        if items:
            state = from_items(items)
        else:
            with self._watchdog.during("making the first state"):
                state = initial_state(self._experiment, self._say)
        step = self._rollbacks.continues_at(weights_step)
        if step != weights_step:
            state = state.replace(
                step=jax.device_put(np.int32(step), target.step.sharding),
                bad_streak=jax.device_put(np.int32(0), target.bad_streak.sharding),
            )
        return state, step, weights_step

    def roll_back(self, diverged: Diverged) -> None:
        """Makes the last good checkpoint the newest, and lets `restore` skip the steps taken since.

        A good checkpoint was evaluated before the first step that was not finite; if there is none,
        training restarts from the fresh state. Newer checkpoints are moved aside before the window
        is written, so a run that is killed in between repeats this rollback.

        Raises:
          Diverged: the run has rolled back too often already.
        """
        experiment, limit = self._experiment, self._experiment.config.rollback.most
        if len(self._rollbacks.windows) >= limit:
            before = f" after rollbacks from {self._rollbacks}" if limit else ""
            raise Diverged(
                f"{diverged} at step {diverged.step:,}{before}; lower config.optim.lr_per_512, "
                f"clip with config.optim.clip_norm, or raise config.rollback.most={limit} "
                f"({experiment.workdir / ROLLBACKS_FILE} lists the steps)",
                diverged.step,
                diverged.last_good,
            ) from None
        with agreed():
            self._lock.check()
        self.checkpoints.settle()
        good = self.checkpoints.newest_evaluated(at_most=diverged.last_good) or 0
        self.checkpoints.set_aside([step for step in self.checkpoints.steps if step > good])
        self._rollbacks = self._rollbacks.with_window(good + 1, diverged.step)
        with agreed():
            if is_leader():
                self._rollbacks.write(experiment.workdir)
        self._say(
            f"{diverged} by step {diverged.step:,}: back to the weights of step {good:,}, leaving "
            f"out the steps until here (rollback {len(self._rollbacks.windows)} of {limit})."
        )

    def close(self) -> None:
        """Waits for the last checkpoint."""
        self.checkpoints.close()
