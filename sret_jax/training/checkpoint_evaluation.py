"""Evaluation of a saved checkpoint: python main.py --mode=eval."""

import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.checkpoints.manager import read_weights
from sret_jax.data.loader import check_batch_size
from sret_jax.models.sret import abstract_variables
from sret_jax.parallel.mesh import make_mesh, state_shardings, with_shardings
from sret_jax.training.evaluation import Evaluator, table
from sret_jax.training.experiment import build_model, check_numbers, create_from_config, open_split
from sret_jax.training.progress import name_bad_images

EVAL_FILE = "eval.json"


def evaluate_checkpoint(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Evaluates the newest weights of a workdir or converted checkpoint; prints a table.

    Args:
      config: of the model and the data.
      workdir: holds checkpoints/; eval.json is written there.

    Returns:
      What eval.json holds: {"step", "eval": {"top1", "top5", "loss"}, "eval_ema": {...}}.

    Raises:
      UserError: whatever the user can mend; before any compilation.
    """
    check_numbers(config)
    mesh = make_mesh(config.fsdp)
    check_batch_size("eval_batch_size", config.eval_batch_size, mesh.size)
    create_from_config(config, num_classes=1)  # mistakes in the model show before data is opened
    source = open_split(config, workdir, config.data.eval_split)
    model = build_model(config, source)
    abstract = abstract_variables(model)
    shardings = state_shardings(abstract, mesh)
    step, weights = read_weights(workdir, with_shardings(abstract, shardings))
    evaluator = Evaluator(model, config, source, mesh, shardings)
    results = evaluator.evaluate(weights)
    name_bad_images(source, evaluator.loader)
    evaluator.loader.close()
    report = {"step": step, **results}
    if jax.process_index() == 0:
        print(f"{workdir} at step {step:,}, {len(source):,} images of {config.data.name}:")
        print(table(results))
        (workdir / EVAL_FILE).write_text(json.dumps(report, indent=2) + "\n")
        print(f"Written: {workdir / EVAL_FILE}")
    return report
