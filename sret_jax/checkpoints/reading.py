"""Reads weights from a workdir or a converted checkpoint, without changing anything there."""

import contextlib
from typing import Any

from etils import epath

from sret_jax.checkpoints.manager import CHECKPOINTS, Checkpoints, is_damage, reason
from sret_jax.errors import UserError

WEIGHTS = {"model": "eval", "ema": "eval_ema"}  # names of items on disk: names of weights here


def read_weights(
    workdir: epath.Path, targets: Any, step: int | None = None
) -> tuple[int, dict[str, Any]]:
    """Reads weights from a workdir or a converted checkpoint, without changing anything there.

    Args:
      workdir: folder that contains checkpoints/.
      targets: the tree {"params", ...} of `jax.ShapeDtypeStruct` with shardings.
      step: the step to read; default: the newest readable one.

    Returns:
      (step, {"eval": raw weights, "eval_ema": moving average, if there is one}).

    Raises:
      UserError: there is no readable checkpoint, or it has another architecture.
    """
    with contextlib.closing(open_existing(workdir)) as checkpoints:
        for candidate in _candidates(checkpoints, step):
            items = [name for name in WEIGHTS if checkpoints.has_item(candidate, name)]
            targets_of = dict.fromkeys(items, targets)
            restored = checkpoints.try_restore(candidate, targets_of) if items else None
            if restored:
                return candidate, {WEIGHTS[name]: restored[name] for name in items}
        raise _none_readable(workdir, step, checkpoints.steps)


def best_step(workdir: epath.Path) -> int:
    """The evaluated step with the highest raw top-1.

    Raises:
      UserError: no checkpoint was evaluated.
    """
    with contextlib.closing(open_existing(workdir)) as checkpoints:
        best = checkpoints.best()
    if best is None:
        raise UserError(
            f"no checkpoint in {workdir / CHECKPOINTS} was evaluated, so none is the best; name "
            f"its step, e.g. {workdir / CHECKPOINTS / '120'}, or give {workdir} for the newest"
        )
    return best[0]


def saved_shapes(workdir: epath.Path, step: int | None = None) -> dict[str, tuple[int, ...]]:
    """The shapes of raw weights on disk, by path such as "params/head/bias".

    Args:
      workdir: folder that contains checkpoints/.
      step: the step to read; default: the newest readable one.

    Raises:
      UserError: there is no such checkpoint.
    """
    with contextlib.closing(open_existing(workdir)) as checkpoints:
        for candidate in _candidates(checkpoints, step):
            if checkpoints.has_item(candidate, "model"):
                try:
                    return checkpoints.shapes(candidate, "model")
                except Exception as e:  # a damaged checkpoint may raise anything
                    if isinstance(e, OSError) and not is_damage(e):
                        raise UserError(
                            f"step {candidate} in {workdir} cannot be read ({reason(e)}); try "
                            "again once the storage works"
                        ) from e
        raise _none_readable(workdir, step, checkpoints.steps)


def _candidates(checkpoints: Checkpoints, step: int | None) -> list[int]:
    return checkpoints.steps if step is None else [s for s in checkpoints.steps if s == step]


def _none_readable(workdir: epath.Path, step: int | None, steps: list[int]) -> UserError:
    folder = workdir / CHECKPOINTS
    if step is None:
        return UserError(f"{folder} holds no readable checkpoint; train first")
    return UserError(f"{folder} holds no readable step {step}; there are {steps}")


def has_checkpoints(workdir: epath.Path) -> bool:
    """Whether a run has saved a step in the workdir, readable or not."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())


def open_existing(workdir: epath.Path) -> Checkpoints:
    """Opens the checkpoints of a workdir for reading.

    Raises:
      UserError: there are none.
    """
    if not (workdir / CHECKPOINTS).is_dir():
        raise UserError(f"{workdir} holds no checkpoints/; give the folder of a run")
    return Checkpoints(workdir, create=False)
