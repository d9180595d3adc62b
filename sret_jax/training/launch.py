"""From the command line of main.py to one call of training or evaluation."""

from typing import Any

from absl import flags
from etils import epath

from sret_jax.parallel import distributed
from sret_jax.training import loop
from sret_jax.training.experiment import load_config


def launch(values: flags.FlagValues) -> dict[str, Any]:
    """Joins the other processes, then trains or evaluates as the flags say.

    Evaluating without --config takes the config saved in the workdir.

    Raises:
      UserError: whatever the user can mend.
    """
    distributed.initialize(values.coordinator, values.processes, values.process_id)
    config_file = values["config"].config_filename
    workdir = epath.Path(values.workdir or f"runs/{epath.Path(config_file).stem}").expanduser()
    if not workdir.is_absolute() and "://" not in str(workdir):
        workdir = epath.Path.cwd() / workdir
    if values.mode == "train":
        return loop.train(values.config, workdir)
    config = values.config
    if values["config"].using_default_value:
        config = load_config(workdir) or config
    return loop.evaluate_checkpoint(config, workdir)
