"""Evaluates weights on a split, counting every example exactly once."""

import contextlib
from collections.abc import Callable
from itertools import islice

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from clu import metrics
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.loader import eval_batch_size, eval_loader, steps_per_pass
from sret_jax.data.sources.source import Source
from sret_jax.evaluation.confusion import MOST_CLASSES, Confusion, count
from sret_jax.models.apply import evaluation_logits, normalise
from sret_jax.models.model import Model
from sret_jax.models.variables import Variables
from sret_jax.parallel.devices import fits_memory
from sret_jax.parallel.distributed import is_leader
from sret_jax.parallel.mesh import batch_sharding, replicated
from sret_jax.terminal import Progress
from sret_jax.text import table
from sret_jax.training.losses import in_top_k
from sret_jax.training.step import Batch, abstract_batch

Results = dict[str, dict[str, float]]


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Fractions of all examples (top1, top5), and the mean loss in nats over readable ones."""

    top1: metrics.Average.from_output("top1")  # type: ignore[valid-type]
    top5: metrics.Average.from_output("top5")  # type: ignore[valid-type]
    loss: metrics.Average.from_fun(  # type: ignore[valid-type]
        lambda loss, readable, **_: {"values": loss, "mask": readable}
    )


@flax.struct.dataclass
class Totals:
    """Sums over a pass: metrics, and confusion counts (K, K + 1) if classes are few."""

    metrics: EvalMetrics
    counts: jax.Array | None


def empty_totals(classes: int) -> Totals:
    """The totals before the first batch."""
    few = classes <= MOST_CLASSES
    return Totals(
        EvalMetrics.empty(), jnp.zeros((classes, classes + 1), jnp.int32) if few else None
    )


class Evaluator:
    """Evaluates weights of one model on the whole of one source.

    Attributes:
      loader: yields the batches; its `bad_records` lists images that could not be read.
      confusions: confusion counts of the last pass, by name of the weights; empty for more than
        MOST_CLASSES classes.
    """

    def __init__(
        self, model: Model, config: ConfigDict, source: Source, mesh: Mesh, shardings: Variables
    ):
        """Opens the data.

        Args:
          model: from `create_model`.
          config: config of the experiment; its data section and eval_batch_size are used.
          source: the split to evaluate on.
          mesh: from `make_mesh`.
          shardings: shardings of the weights.
        """
        self._images = len(source)
        self._batch_size = eval_batch_size(config, mesh.size)
        self._steps = steps_per_pass(source, self._batch_size)
        self._empty = jax.device_put(empty_totals(model.num_classes), replicated(mesh))
        unnamed = map(str, range(len(source.class_names), model.num_classes))
        self._image_size = model.image_size
        self._sharding = batch_sharding(mesh)
        self._class_names = [*source.class_names, *unnamed]
        self.confusions: dict[str, Confusion] = {}
        self._better: dict[str, np.ndarray] = {}
        self._step = make_eval_step(model, mesh, shardings)
        self.loader = eval_loader(
            source, config, model.image_size, self._batch_size, self._sharding
        )

    def rehearse(self, variables: Variables) -> None:
        """Compiles the step and runs it once, on padding.

        Raises:
          UserError: a batch does not fit in memory.
        """
        with self._fits_memory():
            shapes = abstract_batch(self._batch_size, self._image_size)
            batch = {name: zeros(shape, self._sharding) for name, shape in shapes.items()}
            jax.block_until_ready(self._step(variables, batch, self._empty))

    def evaluate(
        self, weights: dict[str, Variables], between_batches: Callable[[], None]
    ) -> Results:
        """Evaluates several sets of weights in one pass over the data.

        Args:
          weights: variables by name, e.g. {"eval": raw, "eval_ema": average}.
          between_batches: called after each batch; an exception that it raises ends the pass.

        Returns:
          {name: {"top1", "top5" (fractions), "loss" (nats)}}.

        Raises:
          UserError: a batch does not fit in memory.
        """
        totals = dict.fromkeys(weights, self._empty)
        better: dict[str, list[np.ndarray]] = {name: [] for name in weights}
        with Progress("Evaluating", self._images, "images", enabled=is_leader()) as progress:
            for batch in islice(self.loader, self._steps):
                with self._fits_memory():
                    found = {
                        name: self._step(weights[name], batch, totals[name]) for name in weights
                    }
                    totals = {name: total for name, (total, _) in found.items()}
                    for name, (_, bits) in found.items():
                        better[name].append(jax.device_get(bits))
                    jax.block_until_ready(totals)  # keeps one batch on the device at a time
                progress.add(self._batch_size)
                between_batches()
        totals = jax.device_get(totals)
        self._better = {name: np.concatenate(bits) for name, bits in better.items()}
        self.confusions = {
            name: Confusion(total.counts, self._class_names)
            for name, total in totals.items()
            if total.counts is not None
        }
        return {
            name: {key: float(value) for key, value in total.metrics.compute().items()}
            for name, total in totals.items()
        }

    def top1_among(self, classes: np.ndarray) -> dict[str, float]:
        """Top-1 of the last pass over the logits of some classes only, by name of the weights.

        Args:
          classes: the classes, (K,) bool; they must include the class of every image.
        """
        chosen = np.packbits(classes)
        return {
            name: 1 - int(np.any(better & chosen, axis=-1).sum()) / self._images
            for name, better in self._better.items()
        }

    def _fits_memory(self) -> contextlib.AbstractContextManager[None]:
        devices = self._sharding.num_devices
        smaller = max(devices, self._batch_size // 2 // devices * devices)
        return fits_memory(
            f"an evaluation of {self._batch_size:,} images at once does not fit the memory; give "
            f"fewer, e.g. --config.eval_batch_size={smaller}"
        )


def zeros(shape: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of zeros; each process creates the rows of its own devices."""
    return jax.make_array_from_callback(
        shape.shape, sharding, lambda rows: np.zeros(shape.shape, shape.dtype)[rows]
    )


def make_eval_step(model: Model, mesh: Mesh, shardings: Variables) -> jax.stages.Wrapped:
    """Builds the jitted step (variables, batch, totals so far) -> (totals, better logits).

    Padding is masked. An unreadable image counts as wrong and has no loss. The second result marks
    the logits of each image that exceed the logit of its label, as bits (B, ceil(K / 8)): all
    logits of an unreadable image, none of padding.
    """
    model = model.clone(mesh=mesh)

    def eval_step(variables: Variables, batch: Batch, so_far: Totals) -> tuple[Totals, jax.Array]:
        logits = evaluation_logits(model, variables, normalise(model, batch["image"]))
        labels, real = batch["label"], batch["real"]
        readable = real & ~batch["bad"]
        new = EvalMetrics.single_from_model_output(
            top1=in_top_k(logits, labels, 1) & readable,
            top5=in_top_k(logits, labels, 5) & readable,
            loss=optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels),
            mask=real,
            readable=readable,
        )
        counts = so_far.counts
        if counts is not None:
            counts += count(logits, labels, real, readable)
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        first = labels[:, None] <= jnp.arange(logits.shape[-1])[None]  # wins a tie
        worse = (logits < own) | ((logits == own) & first)  # (B, K)
        better = ~(worse & readable[:, None]) & real[:, None]
        return Totals(so_far.metrics.merge(new), counts), jnp.packbits(better, axis=-1)

    return jax.jit(
        eval_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def percent(share: float) -> str:
    """Formats a fraction: 0.98123 -> '98.12%'."""
    return f"{100 * share:.2f}%"


def results_table(results: Results) -> str:
    """Formats the results as a small aligned table."""
    columns = {"top1": "top-1", "top5": "top-5", "loss": "loss"}
    if any("top1_among_present" in r for r in results.values()):
        columns["top1_among_present"] = "top-1 among"
    titles = {"eval": "raw", "eval_ema": "EMA"}
    rows = [
        (
            titles[name],
            *(f"{result[c]:.4f}" if c == "loss" else percent(result[c]) for c in columns),
        )
        for name, result in results.items()
    ]
    text = table(("weights", *columns.values()), rows)
    if "top1_among_present" in columns:
        text += "\n(top-1 among: over the logits of the classes that have images, no others)"
    return text
