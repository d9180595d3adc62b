"""The matrix products of a train step, each timed by itself: what is left to the rest of the step.

seconds = sum over shapes of (how often a step computes it) * (median seconds of one). In the step a
product may find its operands elsewhere or in another order, so the sum is no bound.
"""

import os
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.benchmarks.products import ATTENTION, GRADIENTS, MAPS, Product, XLAProduct, products
from sret_jax.benchmarks.speed_benchmark import (
    OURS,
    MatrixProduct,
    Step,
    Task,
    Timing,
    check_counts,
    describe,
    measure,
    open_step,
    peak_dtype,
    torch_module,
)
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.text import table

STEPS = 3  # of a round; the first after other work takes longer


def benchmark_products(
    config: ConfigDict, *, rounds: int, against: str | None, json_file: epath.Path | None
) -> dict[str, Any]:
    """Times the matrix products of a config's train step and prints what they take in all.

    Args:
      config: as configs/common.py makes it; no data set is read.
      rounds: of the step and all products in turn, of which the medians count.
      against: "torch" times PyTorch's products of the same shapes, too.
      json_file: where to write the figures too.

    Raises:
      UserError: no rounds, a config that training would refuse, no PyTorch, or more than one
        device, or one that is no CPU: there a step is compiled for other products.
    """
    check_counts(rounds=rounds)
    if jax.default_backend() != "cpu" or jax.device_count() > 1:
        devices = f"{jax.device_count()} {jax.devices()[0].device_kind}"
        raise UserError(f"products are timed on one CPU device, here are {devices}; use train")
    makers: dict[str, Callable[[Product], Task]] = {OURS: XLAProduct}
    if against == "torch":
        makers["torch"] = torch_module().TorchProduct
    with tempfile.TemporaryDirectory() as folder:
        step = open_step(config, epath.Path(folder), train=True)
    found = products(step.experiment.trace_train_step().jaxpr.jaxpr)
    report = {**describe(step), "rounds": rounds, **_time(step, found, makers, rounds)}
    print_products(report)
    if json_file:
        write_json(json_file, report)
    return report


def _time(
    step: Step,
    found: dict[Product, int],
    makers: dict[str, Callable[[Product], Task]],
    rounds: int,
) -> dict[str, Any]:
    """The step, one large product, and of each maker the products of each kind."""
    large = MatrixProduct(step.experiment.mesh, peak_dtype(step.experiment.config))
    tasks = {(name, product): make(product) for product in found for name, make in makers.items()}
    timings = measure([step, large, *tasks.values()], rounds, STEPS)
    whole, peak, *each = map(_seconds, timings)
    spent = dict(zip(tasks, each, strict=True))
    return {
        "load_average": os.getloadavg()[0],
        "step_seconds": whole,
        "peak_side": large.side,
        "peak_gflops": large.flops / 1e9 / peak,
        "gflop": _by_kind({product: product.flops / 1e9 for product in found}, found),
        "seconds": {
            name: _by_kind({product: spent[name, product] for product in found}, found)
            for name in makers
        },
    }


def _by_kind(values: dict[Product, float], times: dict[Product, int]) -> dict[str, float]:
    """Sums of the products' values, each as often as it runs, by kind and of all."""
    sums = dict.fromkeys((ATTENTION, GRADIENTS, MAPS), 0.0)
    for product, value in values.items():
        sums[product.kind] += times[product] * value
    return {**sums, "all": sum(sums.values())}


def _seconds(timings: list[Timing]) -> float:
    return statistics.median(timing.seconds for timing in timings)


def print_products(report: dict[str, Any]) -> None:
    """The figures that people read."""
    print(
        f"matrix products of a train step of {report['model']}, batch {report['batch_size']}, "
        f"{report['dtype']}, each by itself; {report['devices']}, {report['cores']} cores, load "
        f"{report['load_average']:.1f}; medians of {report['rounds']} rounds"
    )
    print(f"the step: {report['step_seconds']:.3f} s")
    print(f"a {report['peak_side']}^3 product: {report['peak_gflops']:,.0f} GFLOP/s")
    names = list(report["seconds"])
    rows = []
    for kind, gflop in report["gflop"].items():
        seconds = [report["seconds"][name][kind] for name in names]
        rows.append((kind, f"{gflop:.1f}", *(f"{s:.3f} s, {gflop / s:,.0f}" for s in seconds)))
    print(table(("", "GFLOP", *(f"{name}, GFLOP/s" for name in names)), rows))
