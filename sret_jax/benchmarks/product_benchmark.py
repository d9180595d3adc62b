"""Times each matrix product of a train step by itself; the difference is the rest of the step.

seconds = sum over shapes of (runs per step) * (median seconds of one product). In the step a
product may find its operands elsewhere or in another order, so the sum is not a bound.
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

STEPS = 3  # per round; the first step after other work takes longer


def benchmark_products(
    config: ConfigDict, *, rounds: int, against: str | None, json_file: epath.Path | None
) -> dict[str, Any]:
    """Times the matrix products of a config's train step and prints their total time.

    Args:
      config: from configs/common.py; no data set is read.
      rounds: rounds of the step and all products in turn; medians are reported.
      against: "torch" also times PyTorch's products of the same shapes.
      json_file: file that the figures are also written to.

    Raises:
      UserError: rounds is 0, training would refuse the config, PyTorch is missing, or there is
        not exactly one device, a CPU; for other devices the step is compiled to other products.
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
    """Times the step, one large product, and each maker's products, by kind."""
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
    """Sums values of products by kind and in all, each multiplied by the number of its runs."""
    sums = dict.fromkeys((ATTENTION, GRADIENTS, MAPS), 0.0)
    for product, value in values.items():
        sums[product.kind] += times[product] * value
    return {**sums, "all": sum(sums.values())}


def _seconds(timings: list[Timing]) -> float:
    return statistics.median(timing.seconds for timing in timings)


def print_products(report: dict[str, Any]) -> None:
    """Prints the figures."""
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
