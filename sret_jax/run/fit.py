"""Training from Python: what `python main.py` does, in one call."""

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
    """Trains as the config says, resuming what is in the workdir; see `train`.

    Args:
      config: of a file in configs/, e.g. `quickstart.get_config()`.
      workdir: where everything is written.
      callbacks: each is called as callback(step, figures) whenever figures are reported: every
        config.log_every_steps with "loss", "top1", "lr", ..., and after evaluations with
        "eval/top1", "eval_ema/top1", .... On a disk, the figures are in metrics.jsonl by
        then, so that `draw_curves(workdir)` draws them. What they raise ends the run; what is
        saved stays.

    Returns:
      What result.json holds: {"step", "eval": {"top1", "top5", "loss"}, "eval_ema": {...}, ...}.

    Raises:
      Preempted: the run was interrupted (in a notebook: its stop button), and is saved; the same
        call again resumes it.
      UserError: whatever the user can fix, in one sentence.
    """
    workdir = absolute(workdir)
    keep_compiled(workdir)
    start_devices()
    with _quiet_libraries():
        return train(config, workdir, callbacks)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Silences what the libraries log in the enclosed code; what they raise says it too."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
