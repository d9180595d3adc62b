"""From the command line of main.py to one call of training or evaluation."""

from typing import Any

from absl import flags
from etils import epath

from sret_jax.parallel import distributed
from sret_jax.training.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.training.experiment import load_config
from sret_jax.training.loop import train


def launch(values: flags.FlagValues) -> dict[str, Any]:
    """Joins the other processes, then trains or evaluates as the flags say.

    Evaluating without --config takes the config saved in the workdir.

    Raises:
      UserError: whatever the user can mend.
    """
    distributed.initialize(values.coordinator, values.processes, values.process_id)
    config_flag: Any = values["config"]
    name = epath.Path(config_flag.config_filename).stem
    workdir = _absolute(values.workdir or f"runs/{name}")
    if values.mode == "train":
        return train(values.config, workdir)
    config = values.config
    if not config_flag.present:
        config = load_config(workdir) or config
    return evaluate_checkpoint(config, workdir)


def _absolute(path: str) -> epath.Path:
    """Orbax takes no relative path; a bucket's is absolute already."""
    return epath.Path(path) if "://" in path else epath.Path(path).expanduser().resolve()
