"""Trains from Python: `fit` does what `python main.py` does."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import logging
from etils import epath
from ml_collections import ConfigDict

from sret_jax.files import absolute
from sret_jax.parallel.devices import start_devices
from sret_jax.run.compilation_cache import keep_compiled
from sret_jax.run.loop import train
from sret_jax.run.report import Callback


def fit(
    config: ConfigDict, workdir: epath.PathLike, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Trains as the config specifies, resuming the run in the workdir if there is one; see `train`.

    Args:
      config: e.g. `sret_jax.get_config("quickstart")`.
      workdir: folder that everything is written to.
      callbacks: each is called as callback(step, figures) whenever figures are reported: every
        config.log_every_steps with "loss", "top1", "lr", ..., and after evaluations with
        "eval/top1", "eval_ema/top1", .... On a local disk metrics.jsonl contains the figures by
        then, so `draw_curves(workdir)` draws them. An exception in a callback ends the run; saved
        checkpoints stay.

    Returns:
      The contents of result.json: {"step", "eval": {"top1", "top5", "loss"}, "eval_ema": {...},
      ...}.

    Raises:
      Preempted: the run was interrupted (in a notebook by the stop button) and is saved; the same
        call resumes it.
      UserError: anything the user can fix, in one sentence.
    """
    workdir = absolute(workdir)
    keep_compiled(workdir)
    start_devices()
    with _quiet_libraries():
        return train(config, workdir, callbacks)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences the logs of libraries in the enclosed code; their errors contain the same."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
