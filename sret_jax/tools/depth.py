"""Draws how a run depends on depth: gradients, at start and now, and residual coefficients.

python -m sret_jax.tools.depth --workdir=RUN --picture=FILE.png --json=FILE.json
"""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from sret_jax.cli import Parser, clear_errors, path_argument, quiet_libraries
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.models.apply import normalise, training_logits
from sret_jax.models.inspection import residual_coefficients
from sret_jax.models.model import Model
from sret_jax.models.read_out import mean_of_heads
from sret_jax.models.variables import block_names
from sret_jax.picture import picture
from sret_jax.settings.saved_config import CONFIG_FILE, is_converted, load_config
from sret_jax.training.experiment import Experiment, open_experiment
from sret_jax.weights.loading import StoredFolder

PLAIN = "The model's residual sums are plain: there are no learned coefficients to draw."


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser.of("depth", __doc__)
    parser.add_argument("--workdir", type=path_argument, required=True, help="workdir of a run")
    parser.add_argument("--picture", type=path_argument, help="default: depth.png in the workdir")
    parser.add_argument("--json", type=path_argument, help="default: depth.json in the workdir")
    args = parser.parse_args(argv)
    quiet_libraries()
    with clear_errors():
        figures = measure_depth(args.workdir)
        picture = args.picture or args.workdir / "depth.png"
        figures_file = args.json or args.workdir / "depth.json"
        write_json(figures_file, figures)
        draw(figures, picture)
    print(f"Written: {figures_file} and {picture}")


def measure_depth(workdir: epath.Path) -> dict[str, Any]:
    """Measures gradient norms by depth on a training batch, and reads residual coefficients.

    Returns:
      {"step", "blocks": number of unique blocks, "loops",
       "gradient_norm": {"start": [...], "end": [...]}: per application, from first to last, the
       norm of the mean loss's gradient at the application's output, for fresh weights and for the
       newest ones;
       "coefficients": {name: [...]}: per application, of the newest weights; None for the NLL's
       coefficients where an application has no NLL}.

    Raises:
      UserError: the workdir has no config of a run or no readable checkpoint.
    """
    config = load_config(workdir)
    if config is None or is_converted(config):
        raise UserError(f"{workdir} holds no {CONFIG_FILE} of a run; give the --workdir of one")
    experiment = open_experiment(config, workdir)
    model = experiment.model.clone(mesh=experiment.mesh)
    step, weights = StoredFolder(workdir).read_all(model, experiment.mesh)
    gradient_norm = jax.jit(_gradient_norms, static_argnums=0)
    batch = _first_batch(experiment)
    norms = {
        name: np.asarray(gradient_norm(model, variables, batch)).tolist()
        for name, variables in (
            ("start", experiment.init_state().variables),
            ("end", weights["eval"]),
        )
    }
    return {
        "step": step,
        "blocks": sum(model.blocks),
        "loops": model.loops,
        "gradient_norm": norms,
        "coefficients": residual_coefficients(model, weights["eval"]),
    }


def _first_batch(experiment: Experiment) -> dict[str, jax.Array]:
    with contextlib.closing(experiment.train_batches(start_step=0)) as loader:
        return next(loader)


def _gradient_norms(model: Model, variables: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Gradient norms by depth; shape (applications,)."""
    names = block_names(model)

    def loss_fn(probes: jax.Array) -> jax.Array:
        collection = {name: {"gradient_norm": probes[i]} for i, name in enumerate(names)}
        probed = {**variables, "probes": collection}
        images = normalise(model, batch["image"])
        heads, _ = training_logits(model, probed, images, jax.random.key(0))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(
            mean_of_heads(heads), batch["label"]
        )
        return losses.mean()

    return jax.grad(loss_fn)(jnp.zeros((len(names), model.loops))).ravel()


def draw(figures: dict[str, Any], path: epath.Path) -> None:
    """Draws the results of `measure_depth`: gradients, and coefficients if they are learned."""
    coefficients = figures["coefficients"]
    roles = ("skip", "branch") if coefficients else ()
    with picture(path, 13 if roles else 6, 4) as figure:
        gradients, *panels = figure.subplots(1, 1 + len(roles), squeeze=False).flat
        applications = np.arange(1, figures["blocks"] * figures["loops"] + 1)
        steps = {"start": "before training", "end": f"after {figures['step']:,} steps"}
        for (name, label), colour in zip(steps.items(), ("tab:grey", "tab:blue"), strict=True):
            gradients.plot(applications, figures["gradient_norm"][name], label=label, color=colour)
        gradients.set_yscale("log")
        gradients.set_ylabel("norm of the loss's gradient")
        gradients.set_title("Gradient with respect to each application's output")
        if not roles:
            figure.supxlabel(PLAIN, fontsize="small")
        of_role = dict(zip(roles, panels, strict=True))
        for name, values in coefficients.items():
            kind, role = name.split(", ")
            given = [(a, v) for a, v in zip(applications, values, strict=True) if v is not None]
            style = {"marker": ".", "markersize": 2, "linestyle": ""} if kind == "NLL" else {}
            of_role[role].plot(*zip(*given, strict=True), label=kind, **style)
        for role, axes in of_role.items():
            axes.set_title(f"Learned coefficient of the {role}")
        for axes in (gradients, *panels):
            for first in applications[:: figures["loops"]]:
                axes.axvline(first, color="0.85", linewidth=0.6, zorder=0)
            axes.set_xlabel("application (grey lines: a new block begins)")
            axes.legend(frameon=False, markerscale=4)


if __name__ == "__main__":
    main()
