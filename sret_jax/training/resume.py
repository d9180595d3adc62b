"""What a config changes of the run that it resumes."""

from collections.abc import Callable

from sret_jax.errors import UserError
from sret_jax.parallel.distributed import agreed, is_leader
from sret_jax.training.experiment import Experiment
from sret_jax.training.saved_config import changed_settings

ARCHITECTURE = (
    *("name", "image_size", "blocks", "loops", "groups", "heads", "dim", "nll_every"),
    "permutation",
)


def compare_config(experiment: Experiment, say: Callable[[str], None]) -> None:
    """Says what has changed since the workdir's config was saved.

    Raises:
      UserError: another architecture of the same shapes, or real data instead of synthetic.
    """
    workdir = experiment.workdir
    with agreed():
        changed = changed_settings(experiment.config, workdir) if is_leader() else {}
        model = {k: v for k, v in changed.items() if k.removeprefix("model.") in ARCHITECTURE}
        if "data.synthetic" in changed:
            raise UserError(
                f"{workdir} was not trained with "
                f"config.data.synthetic={experiment.config.data.synthetic}; give another --workdir"
            )
        if model:
            raise UserError(
                f"{workdir} was trained with another model ({_listed(model)}); use its own config "
                "or another --workdir"
            )
    if changed:
        say(f"The config has changed since: {_listed(changed)}.")


def _listed(changed: dict[str, str]) -> str:
    return "; ".join(f"{name}: {change}" for name, change in changed.items())
