"""Evaluation that counts every example exactly once."""

from collections.abc import Callable, Iterator
from itertools import islice

import flax
import jax
import jax.numpy as jnp
from clu import metrics
from jax.sharding import Mesh

from sret_jax.models.sret import SReT
from sret_jax.parallel.mesh import batch_sharding, replicated
from sret_jax.training.losses import cross_entropy, in_top_k
from sret_jax.training.state import Variables
from sret_jax.training.step import Batch, normalise


@flax.struct.dataclass
class EvalMetrics(metrics.Collection):
    """Shares of all examples (top1, top5) and the mean loss in nats over the readable ones."""

    top1: metrics.Average.from_output("top1")  # type: ignore[valid-type]
    top5: metrics.Average.from_output("top5")  # type: ignore[valid-type]
    loss: metrics.Average.from_fun(  # type: ignore[valid-type]
        lambda loss, readable, **_: {"values": loss, "mask": readable}
    )


def make_eval_step(
    model: SReT, mesh: Mesh, shardings: Variables
) -> Callable[[Variables, Batch, EvalMetrics], EvalMetrics]:
    """Builds the jitted step (variables, batch, metrics so far) -> metrics.

    Padding is masked. An unreadable image counts as wrong and has no loss.
    """

    def eval_step(variables: Variables, batch: Batch, so_far: EvalMetrics) -> EvalMetrics:
        logits = model.apply(variables, normalise(batch["image"]), train=False)
        labels, real = batch["label"], batch["real"]
        readable = real & ~batch["bad"]
        new = EvalMetrics.single_from_model_output(
            top1=in_top_k(logits, labels, 1) & readable,
            top5=in_top_k(logits, labels, 5) & readable,
            loss=cross_entropy(logits, labels),
            mask=real,
            readable=readable,
        )
        return so_far.merge(new)

    return jax.jit(
        eval_step,
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def evaluate(
    eval_step: Callable[[Variables, Batch, EvalMetrics], EvalMetrics],
    weights: dict[str, Variables],
    batches: Iterator[Batch],
    steps: int,
    mesh: Mesh,
) -> dict[str, dict[str, float]]:
    """Evaluates several sets of weights in one pass over the data.

    Args:
      eval_step: from `make_eval_step`.
      weights: variables by name, e.g. {"eval": raw, "eval_ema": average}.
      batches: an iterator over evaluation batches; `steps` are taken, one whole pass.
      steps: from `steps_per_pass`.
      mesh: from `make_mesh`.

    Returns:
      {name: {"top1", "top5" (shares), "loss" (nats)}}.
    """
    empty = jax.device_put(EvalMetrics.empty(), replicated(mesh))
    totals = dict.fromkeys(weights, empty)
    for batch in islice(batches, steps):
        totals = {name: eval_step(weights[name], batch, totals[name]) for name in weights}
        jax.block_until_ready(totals)  # keeps one batch on the device at a time
    return {
        name: {key: float(value) for key, value in jax.device_get(total).compute().items()}
        for name, total in totals.items()
    }


def percent(share: float) -> str:
    """0.98123 -> '98.12%'."""
    return f"{100 * share:.2f}%"


def table(results: dict[str, dict[str, float]]) -> str:
    """The results as a small aligned table."""
    rows = [f"{'weights':<10} {'top-1':>8} {'top-5':>8} {'loss':>8}"]
    titles = {"eval": "raw", "eval_ema": "EMA"}
    rows += [
        f"{titles[name]:<10} {percent(r['top1']):>8} {percent(r['top5']):>8} {r['loss']:>8.4f}"
        for name, r in results.items()
    ]
    return "\n".join(rows)
