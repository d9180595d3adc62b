"""The checkpoints of a run: which ones are kept, and how a run resumes from them.

A workdir contains checkpoints/STEP/{model,ema,train}: the raw weights, their moving average, and
the step with the optimizer's state. Converted weights are a workdir with `model` alone.
"""

import contextlib
import dataclasses
import errno
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import count
from time import sleep
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from sret_jax.checkpoints import checksums
from sret_jax.errors import UserError, few
from sret_jax.files import is_remote
from sret_jax.parallel.distributed import AgreedError, agreed, attempt, gather, is_leader, say

ITEMS = ("model", "ema", "train")
CHECKPOINTS, SET_ASIDE = "checkpoints", "checkpoints_set_aside"
DELETED = "checkpoints_deleted"
METRICS, BEST_METRIC = "metrics", "top1"
RETRY_PAUSES = (1.0, 4.0, 16.0)  # seconds before each retry when storage fails


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Always False: JAX agrees on numbers of polls, which are not the steps of Orbax."""
        del step
        return False

    def metrics(self, step: int) -> Any:
        """The metrics of the step's evaluation; None if there are none or they are damaged."""
        try:
            metrics = super().metrics(step)
            if metrics is not None:
                _best_metric(metrics)
            return metrics
        except (ValueError, KeyError, TypeError):
            return None

    def unkept(self) -> list[int]:
        """The steps that the preservation policy no longer keeps."""
        return self._get_old_steps_to_remove()


@dataclasses.dataclass(frozen=True)
class _LatestEvaluated(policies.PreservationPolicy):
    """Keeps the latest `n` checkpoints that were evaluated."""

    n: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        evaluated = [c.step for c in checkpoints if c.metrics is not None]
        return [c.step in evaluated[-self.n :] for c in checkpoints]


class Checkpoints:
    """The checkpoints of one workdir, written asynchronously.

    A checkpoint is saved first and evaluated afterwards, so a failing evaluation loses nothing.
    The newest checkpoint is kept. Among evaluated checkpoints, the latest `keep_latest` and the
    best `keep_best` by raw top-1 are kept. So is every `keep_every`-th step. A checkpoint is
    deleted only if no rule keeps it.
    """

    def __init__(
        self,
        workdir: epath.Path,
        *,
        keep_latest: int = 1,
        keep_best: int = 1,
        keep_every: int | None = None,
        create: bool = True,
    ):
        self._workdir = workdir
        self._last_is_lost = False
        rules: list[policies.PreservationPolicy] = [
            policies.LatestN(1),
            _LatestEvaluated(keep_latest),
            policies.BestN(
                get_metric_fn=_best_metric, n=keep_best, keep_checkpoints_without_metrics=False
            ),
        ]
        if keep_every:
            rules.append(policies.EveryNSteps(keep_every))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(rules),
            create=create,
            todelete_subdir=f"../{DELETED}",  # renaming is atomic
            # Otherwise threads wait five minutes for a folder that cannot be created.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._manager = self._open()
        self._clear_leftovers()

    @property
    def steps(self) -> list[int]:
        """The steps on disk, readable or not, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Starts writing `items` (some of model, ema, train) as the checkpoint of `step`.

        If storage fails, a sentence reports it, now or at the next call, and the disk is unchanged.

        Args:
          step: must be greater than the latest step.
          items: trees of arrays by item name.
        """
        saves = {name: checksums.Save(tree) for name, tree in items.items()}

        def start() -> None:
            self._manager.reload()  # a checkpoint deleted by hand must not count as kept
            if not self._manager.save(step, args=ocp.args.Composite(**saves)):
                raise RuntimeError(f"Orbax refused to save step {step}; on disk are {self.steps}")

        self.settle()
        self._last_is_lost = not self._storage_holds(start)

    def settle(self) -> bool:
        """Waits for the save in progress. Returns whether the last save is on disk."""
        if not self._storage_holds(self._manager.wait_until_finished):
            self._last_is_lost = True
        self._clear_leftovers()
        return not self._last_is_lost

    def restore_newest(self, targets: Mapping[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """Restores the newest readable checkpoint, and moves newer ones that are damaged aside.

        Args:
          targets: trees of `jax.ShapeDtypeStruct` with shardings, by item name.

        Returns:
          (step, {item: tree}), or None if there is no checkpoint.

        Raises:
          UserError: a checkpoint lacks an item or has another architecture, or none is readable.
        """
        steps = self.steps
        for i, step in enumerate(steps):
            restored = self.try_restore(step, targets)
            if restored is not None:
                self.set_aside(steps[:i])
                return step, restored
        if steps:
            raise UserError(
                f"none of the checkpoints {steps} in {self._workdir} can be read; fix the storage "
                "or train in another --workdir"
            )
        return None

    def is_evaluated(self, step: int) -> bool:
        """Whether `step` was saved together with its metrics, as process 0 sees the disk."""
        return bool(gather(step in self.steps and self._manager.metrics(step) is not None)[0])

    def newest_evaluated(self, at_most: int) -> int | None:
        """The newest evaluated step that is at most `at_most`."""
        return next(
            (step for step in self.steps if step <= at_most and self.is_evaluated(step)), None
        )

    def best(self) -> tuple[int, float] | None:
        """The evaluated step with the highest raw top-1, and that top-1; the newest of equals."""
        top1 = {
            step: _best_metric(metrics)
            for step in self.steps
            if (metrics := self._manager.metrics(step)) is not None
        }
        step = max(top1, key=top1.__getitem__, default=None)
        return None if step is None else (step, top1[step])

    def set_aside(self, steps: list[int]) -> None:
        """Moves checkpoints aside, newest first, without deleting them."""
        if not steps:
            return
        with agreed():
            if is_leader():
                for step in sorted(steps, reverse=True):
                    self._set_one_aside(step)
        self._manager.reload()

    def _set_one_aside(self, step: int) -> None:
        aside = self._workdir / SET_ASIDE
        targets = (aside / f"{step}.{i}" for i in count())
        try:
            aside.mkdir(parents=True, exist_ok=True)
            target = next(path for path in targets if not path.exists())
            (self._workdir / CHECKPOINTS / str(step)).rename(target)
        except FileNotFoundError:
            return  # deleted by hand
        except OSError as e:
            raise UserError(
                f"the checkpoint of step {step} cannot be moved to {aside} ({e.strerror or e}); "
                "fix the storage"
            ) from e
        print(f"The checkpoint of step {step} is now {target}.", flush=True)

    def has_item(self, step: int, name: str) -> bool:
        """Whether the checkpoint of `step` contains that item."""
        return (self._workdir / CHECKPOINTS / str(step) / name).is_dir()

    def try_restore(self, step: int, targets: Mapping[str, Any]) -> dict[str, Any] | None:
        """Restores one checkpoint, or returns None if any process finds it damaged.

        If storage fails, it is tried again after each of `RETRY_PAUSES`.

        Raises:
          UserError: the checkpoint lacks an item or has another architecture, or storage keeps
            failing.
        """
        pauses = iter(RETRY_PAUSES)
        while True:
            restored, error = self._restore(step, targets)
            if error is None:
                return restored
            complaint = f"The checkpoint of step {step} cannot be read ({reason(error)})"
            if gather(is_damage(error)).any():
                say(f"{complaint}; trying the one before it.")
                return None
            pause = next(pauses, None)
            if pause is None:
                raise AgreedError(
                    f"the checkpoint of step {step} in {self._workdir} cannot be read "
                    f"({reason(error)}), though nothing shows that it is damaged; start again "
                    "once the storage works, or move "
                    f"{self._workdir / CHECKPOINTS / str(step)} away to continue without it"
                )
            say(f"{complaint}; trying again in {pause:.0f} s.")
            sleep(pause)

    def _restore(
        self, step: int, targets: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Exception | None]:
        """Tries once to restore a checkpoint; returns its items and the error of any process."""
        restores = {name: checksums.Restore(tree) for name, tree in targets.items()}
        restored: dict[str, Any] = {}

        def restore() -> None:
            args = ocp.args.Composite(**restores)
            restored.update(self._manager.restore(step, args=args))

        # One action at a time: Orbax restores in all processes or in none.
        for action in (
            functools.partial(self._check_whole, step, targets),
            functools.partial(self._check_matches, step, targets),
            restore,
        ):
            if error := attempt(action):
                return {}, error
        return restored, None

    def _check_whole(self, step: int, items: Iterable[str]) -> None:
        """Verifies all files of a checkpoint in process 0; raises if they differ from the saved."""
        if is_leader():
            folder = self._workdir / CHECKPOINTS / str(step)
            if not any(self.has_item(step, name) for name in ITEMS):
                raise checksums.Damaged(f"{folder} holds none of {', '.join(ITEMS)}")
            for name in items:
                checksums.check(folder / name)

    def shapes(self, step: int, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of an item's arrays, by path."""
        folder = self._workdir / CHECKPOINTS / str(step) / name
        return array_shapes(ocp.StandardCheckpointHandler().metadata(folder).tree)

    def record_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds evaluation metrics to a checkpoint, and deletes checkpoints that no rule keeps.

        Does nothing if the checkpoint could not be saved.

        Args:
          step: step of a checkpoint that was saved or is being saved.
          metrics: metrics of the raw weights; "top1" ranks the checkpoint.
        """

        def write() -> None:
            handler = ocp.JsonCheckpointHandler(filename=METRICS)
            with contextlib.closing(ocp.Checkpointer(handler)) as checkpointer:
                # Orbax looks for metrics here when it opens the folder.
                folder = self._workdir / CHECKPOINTS / str(step) / METRICS
                checkpointer.save(folder, args=ocp.args.JsonSave(dict(metrics)), force=True)
            self._manager.reload()

        self.settle()
        if step in self.steps:
            if self._storage_holds(write):  # all processes have listed the steps by now
                self._storage_holds(self._delete_unkept)
            self._clear_leftovers()
            self._manager.reload()

    def _delete_unkept(self) -> None:
        """Deletes, in process 0, what no rule keeps; `_clear_leftovers` completes it.

        In a file system the folder is first renamed, which is atomic. In a bucket a rename would
        copy every object.
        """
        for step in self._manager.unkept() if is_leader() else []:
            folder = self._workdir / CHECKPOINTS / str(step)
            if is_remote(folder):
                folder.rmtree()
            else:
                (self._workdir / DELETED).mkdir(exist_ok=True)
                folder.rename(self._workdir / DELETED / str(step))

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Removes deleted and half-written checkpoints, to free space; no save is in progress.

        It runs repeatedly because the writer of a failed save may still be alive. Orbax would do it
        once, in a thread at the same time as the next save.
        """
        if self._options.create and is_leader():
            with contextlib.suppress(OSError):
                (self._workdir / DELETED).rmtree(missing_ok=True)
                for unfinished in ocp.utils.tmp_checkpoints(self._workdir / CHECKPOINTS):
                    unfinished.get().rmtree()

    def _open(self) -> ocp.CheckpointManager:
        handlers = {name: checksums.Handler() for name in ITEMS}
        return _Manager(self._workdir / CHECKPOINTS, options=self._options, item_handlers=handlers)

    def _storage_holds(self, action: Callable[[], object]) -> bool:
        """Calls `action`; if it fails in a process, all remove half-written files and continue."""
        error = attempt(action)
        if error is None:
            return True
        with contextlib.suppress(Exception):
            self._manager.close()
        self._manager = self._open()
        self._clear_leftovers()
        newest = f"step {self.steps[0]}" if self.steps else "none"
        say(
            f"A checkpoint could not be written to {self._workdir} ({reason(error)}); the "
            f"newest on disk is {newest}."
        )
        return False

    def _check_matches(self, step: int, targets: Mapping[str, Any]) -> None:
        for name, target in targets.items():
            if not self.has_item(step, name):
                raise UserError(
                    f"{self._workdir} holds weights but no {name!r} item at step {step} (converted "
                    "weights cannot be resumed); train in another --workdir"
                )
            problems = differences(self.shapes(step, name), array_shapes(target))
            if problems:
                raise UserError(
                    f"the checkpoint of step {step} in {self._workdir} has another architecture "
                    f"or optimizer; use its own config or another --workdir. {len(problems)} "
                    f"arrays of {name!r} differ: {few(problems)}"
                )


def reason(error: Exception) -> str:
    """The operating system's message inside the storage layers' error, or else its first line."""
    text = str(error) or repr(error)
    known = map(os.strerror, (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO))
    return next((reason for reason in known if reason in text), text.splitlines()[0])


def is_damage(error: Exception) -> bool:
    """Whether the error shows that the checkpoint is damaged, rather than that storage failed."""
    return isinstance(error, checksums.Damaged | FileNotFoundError)


def _best_metric(metrics: Mapping[str, float]) -> float:
    return float(metrics[BEST_METRIC])


def differences(old: Mapping[str, tuple], new: Mapping[str, tuple]) -> list[str]:
    """Sentences about the arrays that one side lacks or whose shapes differ; shapes by path."""
    return [
        f"{path} is {old.get(path, 'missing')} there, {new.get(path, 'missing')} here"
        for path in sorted(old.keys() | new.keys())
        if old.get(path) != new.get(path)
    ]


def array_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays of a tree, by path such as "params/head/bias"."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    keystr = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    return {keystr(path): tuple(leaf.shape) for path, leaf in flat}
