"""Evaluates a saved checkpoint: python main.py --mode=eval."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.loader import check_batch_size, eval_batch_size
from sret_jax.data.sources.source import Source
from sret_jax.data.sources.splits import other_slices
from sret_jax.data.views.images import EvalTransform
from sret_jax.evaluation.bad_images import BadImages
from sret_jax.evaluation.confusion import Confusion, write_confusions
from sret_jax.evaluation.evaluation import Evaluator, Results, results_table
from sret_jax.evaluation.labelled import open_labelled
from sret_jax.files import write_json
from sret_jax.models.model import Model
from sret_jax.models.registry import title
from sret_jax.models.variables import Variables, abstract_variables
from sret_jax.parallel.distributed import agreed, is_leader, say
from sret_jax.parallel.mesh import make_mesh, state_shardings
from sret_jax.parallel.preemption import Preemption
from sret_jax.settings.config_model import create_from_config
from sret_jax.settings.saved_config import changed_settings
from sret_jax.training.checks import check_numbers, check_writable
from sret_jax.weights.adaptation import fit, other_architecture
from sret_jax.weights.loading import StoredFolder

EVAL_FILE = "eval.json"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of evaluating saved weights.

    Attributes:
      model: the evaluated model.
      source: the images.
      step: step of the weights.
      results: metrics by name of the weights.
      confusions: confusion counts by name of the weights; empty for very many classes.
      present: number of classes that have images, as far as known.
      remarks: sentences about how labels were numbered, and about classes without images.
    """

    model: Model
    source: Source
    step: int
    results: Results
    confusions: dict[str, Confusion]
    present: int
    remarks: tuple[str, ...]


class OpenedWeights(NamedTuple):
    """Saved weights, and the images to evaluate them on.

    Attributes:
      model: the model.
      source: the images, whose label k means logit k.
      mesh: the devices.
      shardings: shardings of the weights.
      step: step of the weights.
      weights: variables by name, "eval" and, if there are any, "eval_ema".
      remark: a sentence on how labels were numbered, or "".
    """

    model: Model
    source: Source
    mesh: Mesh
    shardings: Variables
    step: int
    weights: dict[str, Variables]
    remark: str


def evaluate_checkpoint(
    config: ConfigDict, workdir: epath.Path, step: int | None = None
) -> dict[str, Any]:
    """Evaluates weights of a workdir or converted checkpoint, and prints a table.

    Args:
      config: config of the model and the data.
      workdir: folder that contains checkpoints/. eval.json and per_class.json are written there,
        and confusion.png for up to 200 classes.
      step: step of the weights; default: the newest readable one.

    Returns:
      The contents of eval.json: {"step", "overrides": the settings that differ from the workdir's
      config.json, "classes": {"model", "present"}, "eval": {"top1", "top5", "loss"}, "eval_ema":
      {...}}, and the "remarks" of `Evaluation`. If some classes of the model have no images, there
      is also "top1_among_present", the top-1 over the logits of the classes that have some.

    Raises:
      UserError: anything the user can fix; raised before compilation.
      Preempted: SIGTERM or Ctrl-C came.
    """
    overrides = {name: new for name, (_, new) in changed_settings(config, workdir).items()}
    found = evaluate_weights(config, workdir, step)
    classes = {"model": found.model.num_classes, "present": found.present}
    remarks = {"remarks": list(found.remarks)} if found.remarks else {}
    report = {
        "step": found.step,
        "overrides": overrides,
        "classes": classes,
        **remarks,
        **found.results,
    }
    if is_leader():
        changed = "".join(f", {name}={value}" for name, value in overrides.items())
        print(
            f"Evaluated {title(found.model, config.model.name)} in {workdir} at step "
            f"{found.step:,}, {len(found.source):,} images of {config.data.name}{changed}:",
            results_table(found.results),
            *found.remarks,
            sep="\n",
        )
        write_json(workdir / EVAL_FILE, report)
        print(f"Written: {workdir / EVAL_FILE}")
        if found.confusions:
            print(found.confusions["eval"].worst())
            write_confusions(workdir, found.step, found.confusions)
    return report


def evaluate_weights(
    config: ConfigDict,
    workdir: epath.Path,
    step: int | None = None,
    say: Callable[[str], None] = say,
) -> Evaluation:
    """Evaluates weights of a workdir or converted checkpoint, and writes nothing.

    Weights that were trained with other loops or another image size are adapted to the config by
    `with_loops` and `with_image_size`, and `say` is called with a sentence on it. Raises the same
    errors as `evaluate_checkpoint`.
    """
    opened = open_weights(config, workdir, step, say)
    model, source, remark = opened.model, opened.source, opened.remark
    evaluator = Evaluator(model, config, source, opened.mesh, opened.shardings)
    with contextlib.closing(evaluator.loader), Preemption() as preemption:
        results = evaluator.evaluate(opened.weights, preemption.check)
    BadImages(source, config.data.max_bad_fraction, say).check(evaluator.loader)
    present = _present(source, model, evaluator.confusions)
    remarks = [*source.remarks, remark] if remark else [*source.remarks]
    if slices := other_slices(config, changed_settings(config, workdir)):
        remarks.append(
            f"{workdir} was trained on {slices}, so images that it was trained on may be among "
            "those evaluated."
        )
    if not present.all():
        for name, top1 in evaluator.top1_among(present).items():
            results[name]["top1_among_present"] = top1
        remarks.append(
            f"There are images of {present.sum():,} of the model's {model.num_classes:,} classes; "
            "top-1, top-5 and loss are over the logits of all classes."
        )
    return Evaluation(
        model,
        source,
        opened.step,
        results,
        evaluator.confusions,
        int(present.sum()),
        tuple(remarks),
    )


def open_weights(
    config: ConfigDict,
    workdir: epath.Path,
    step: int | None = None,
    say: Callable[[str], None] = say,
) -> OpenedWeights:
    """Opens config.data.eval_split and reads the weights, adapted to the config.

    Raises the same errors as `evaluate_checkpoint`; see `evaluate_weights` for the arguments.
    """
    with agreed():
        stored = StoredFolder(workdir, step)
        model, source, mesh, remark = _open(config, workdir, stored)
        there, changed = stored.beside(model)
    step, weights = stored.read_all(there, mesh)
    shardings = state_shardings(abstract_variables(model), mesh)
    if changed:
        say(f"Evaluating with {' and '.join(changed)}.")
        fitted = jax.jit(lambda variables: fit(there, variables, model), out_shardings=shardings)
        weights = {name: fitted(variables) for name, variables in weights.items()}
    return OpenedWeights(model, source, mesh, shardings, step, weights, remark)


def _present(source: Source, model: Model, confusions: dict[str, Confusion]) -> np.ndarray:
    """Which classes have images, or with very many classes, which the data name; (K,) bool."""
    for confusion in confusions.values():
        return confusion.images > 0
    named = np.isin(source.class_names, source.classes_here)
    return np.pad(named, (0, model.num_classes - len(named)))


def _open(
    config: ConfigDict, workdir: epath.Path, stored: StoredFolder
) -> tuple[Model, Source, Mesh, str]:
    check_numbers(config)
    mesh = make_mesh(config.fsdp)
    check_batch_size("eval_batch_size", eval_batch_size(config, mesh.size), mesh.size)
    model = create_from_config(config, num_classes=1)  # its errors appear before data are opened
    EvalTransform(config.model.image_size, config.data.test_crop)
    logits = model.sizes(stored.shapes).get("num_classes")
    if logits is None:
        raise other_architecture(["there is no head there"])
    check_writable(workdir)
    if config.model.num_classes not in (None, logits):
        raise other_architecture(
            [f"num_classes is {logits} there, {config.model.num_classes} here"]
        )
    source, remark = open_labelled(config, workdir, logits)
    return create_from_config(config, logits), source, mesh, remark
