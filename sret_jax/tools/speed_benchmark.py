"""Training and inference as shares of the rate of one large matrix product, taken in one run.

share = 2 * P * MACs * images/s / R, with P = 3 passes in training (forward, and backward for the
inputs and for the weights), 1 in inference, and R the FLOP/s of a 2048^3 matrix product on the
same devices. A multiply-accumulate is two FLOPs; the model's are counted from its program. A
teacher's forward pass takes time and counts as no work.
"""

import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.data.loader import train_loader
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.parallel.mesh import batch_sharding, replicated
from sret_jax.training.evaluation import empty_totals, make_eval_step
from sret_jax.training.experiment import Experiment, open_experiment
from sret_jax.training.flops import model_macs
from sret_jax.training.progress import duration

SIDE = 2048  # of the matrices
BURST_SECONDS = 0.5  # of matrix products before the steps of each round
# The published implementation: sret_t, batch 16, 224 pixels, float32, training on a CPU.
REFERENCE = {"PyTorch eager": 0.44, "torch.compile": 0.61}


class Task(Protocol):
    """Something to time; calling it does it once, to the end."""

    def __call__(self) -> None: ...


class MatrixProduct:
    """One SIDE^3 matrix product on every device at once."""

    def __init__(self, mesh: Mesh, dtype: str):
        ones = jnp.ones((SIDE, SIDE), dtype)
        rows = jnp.tile(ones, (mesh.size, 1))  # SIDE on each device
        self._operands = jax.device_put((rows, ones), (batch_sharding(mesh), replicated(mesh)))
        self._product = jax.jit(jnp.matmul)
        self.flops = 2 * mesh.size * SIDE**3

    def __call__(self) -> None:
        jax.block_until_ready(self._product(*self._operands))


class Step:
    """The actual train or evaluation step of an experiment, on synthetic images.

    Attributes:
      experiment: whose step it is.
      passes: of the model's multiply-accumulates in one step.
      compile_seconds: from the Python code to the program.
      images: of a step.
      flops: of a step, 2 * passes * MACs * images.
    """

    def __init__(self, experiment: Experiment, *, train: bool):
        self.experiment = experiment
        self.images = experiment.config.batch_size
        self.passes = 3 if train else 1
        self.flops = 2 * self.passes * model_macs(experiment.model) * self.images
        self._batches = train_loader(
            experiment.train_source,
            experiment.config,
            experiment.model.image_size,
            self.images,
            batch_sharding(experiment.mesh),
            start_step=0,
        )
        self._state = experiment.init_state()
        start = time.perf_counter()
        self._take = self._compile_training() if train else self._compile_inference()
        self.compile_seconds = time.perf_counter() - start

    def __call__(self) -> None:
        self._take()

    def _compile_training(self) -> Callable[[], None]:
        step = self.experiment.compile_train_step()

        def take() -> None:
            self._state, _ = step(self._state, next(self._batches))
            jax.block_until_ready(self._state)

        return take

    def _compile_inference(self) -> Callable[[], None]:
        mesh, shardings = self.experiment.mesh, self.experiment.shardings
        step = make_eval_step(self.experiment.model, mesh, shardings.variables)
        empty = jax.device_put(empty_totals(self.experiment.model.num_classes), replicated(mesh))
        arguments = (self._state.variables, next(self._batches), empty)
        compiled = step.lower(*arguments).compile()
        return lambda: jax.block_until_ready(compiled(*arguments))


def benchmark_step(
    config: ConfigDict, *, train: bool, rounds: int, steps: int, json_file: epath.Path | None
) -> dict[str, Any]:
    """Measures the train or evaluation step of a config and prints its share of the peak.

    Args:
      config: as configs/common.py makes it; no data set is read.
      train: else inference.
      rounds: of matrix products and steps in turn, of which the medians count.
      steps: in a round.
      json_file: where to write the figures too.

    Raises:
      UserError: a number out of range, or a config that training would refuse.
    """
    check_counts(rounds=rounds, steps=steps)
    with tempfile.TemporaryDirectory() as folder:
        step = open_step(config, epath.Path(folder), train=train)
    dtype = peak_dtype(config)
    product = MatrixProduct(step.experiment.mesh, dtype)
    (product_seconds, step_seconds) = measure([product, step], rounds, steps)
    report = {
        **describe(step),
        "training": train,
        "rounds": rounds,
        "compile_seconds": step.compile_seconds,
        "peak_dtype": dtype,
        **figures(step, step_seconds, product, product_seconds),
    }
    print_report(report)
    if json_file:
        write_json(json_file, report)
    return report


def open_step(config: ConfigDict, folder: epath.Path, *, train: bool) -> Step:
    """Compiles a config's step for synthetic data; `folder` stands for the workdir."""
    config.data.synthetic = True
    return Step(open_experiment(config, folder), train=train)


def peak_dtype(config: ConfigDict) -> str:
    """What the peak is measured in: the config's dtype, but float32 on CPUs."""
    return "float32" if jax.default_backend() == "cpu" else config.model.dtype


def check_counts(**counts: int) -> None:
    """Raises UserError for a count below one."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")


def measure(tasks: list[Task], rounds: int, repeats: int) -> list[list[float]]:
    """Seconds that each task takes, by round: the median of its repeats, the tasks in turn.

    A task that is done in less than BURST_SECONDS is repeated for as long. The first call of each,
    which warms up, does not count.
    """
    for task in tasks:
        task()
    seconds: list[list[float]] = [[] for _ in tasks]
    for number in range(rounds):
        print(f"\r\033[Kround {number + 1}/{rounds}", end="", file=sys.stderr, flush=True)
        for task, results in zip(tasks, seconds, strict=True):
            results.append(_median_seconds(task, repeats))
    print("\r\033[K", end="", file=sys.stderr)
    return seconds


def _median_seconds(task: Task, repeats: int) -> float:
    spent: list[float] = []
    while len(spent) < repeats or sum(spent) < BURST_SECONDS:
        start = time.perf_counter()
        task()
        spent.append(time.perf_counter() - start)
    return statistics.median(spent)


def describe(step: Step) -> dict[str, Any]:
    """What was measured, and on what."""
    experiment = step.experiment
    return {
        "model": experiment.config.model.name,
        "groups": experiment.model.groups,
        "image_size": experiment.model.image_size,
        "dtype": experiment.config.model.dtype,
        "batch_size": step.images,
        "gmacs_per_image": step.flops / (2e9 * step.passes * step.images),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
    }


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median over the rounds, and the least and the largest."""

    median: float
    least: float
    largest: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))


def figures(
    step: Step, step_seconds: list[float], product: MatrixProduct, product_seconds: list[float]
) -> dict[str, Any]:
    """Rates and the share of the peak, each over the rounds; a share is that of its own round."""
    shares = [
        (step.flops / taken) / (product.flops / peak)
        for taken, peak in zip(step_seconds, product_seconds, strict=True)
    ]
    spreads = {
        "peak_gflops": Spread.of([product.flops / 1e9 / s for s in product_seconds]),
        "step_seconds": Spread.of(step_seconds),
        "images_per_second": Spread.of([step.images / s for s in step_seconds]),
        "share_of_peak": Spread.of(shares),
    }
    return {name: dataclasses.asdict(spread) for name, spread in spreads.items()}


def print_report(report: dict[str, Any]) -> None:
    """The figures and the sentences people read."""
    passes = 3 if report["training"] else 1
    what = "train step" if report["training"] else "inference"
    print(
        f"{report['model']}, groups {report['groups']}, {report['gmacs_per_image']:.3f} GMACs per "
        f"{report['image_size']}-pixel image, batch {report['batch_size']}, {report['dtype']}; "
        f"{report['devices']} devices, {report['cores']} cores; medians of {report['rounds']} "
        "rounds (least to largest)"
    )
    rows = [
        (f"{report['peak_dtype']} {SIDE}^3 matrix product", "peak_gflops", ",.0f", "GFLOP/s"),
        (what, "step_seconds", ".3f", "s"),
        (what, "images_per_second", ",.1f", "images/s"),
        ("share of that product's rate", "share_of_peak", ".3f", ""),
    ]
    print(f"{'compiled in':34}{duration(report['compile_seconds']):>9}")
    for title, name, form, unit in rows:
        values = report[name]
        least, largest = format(values["least"], form), format(values["largest"], form)
        print(f"{title:34}{format(values['median'], form):>9} {unit:9} ({least} to {largest})")
    print(
        f"The share is 2 * {passes} * {report['gmacs_per_image']:.3f} GMACs * images/s over the "
        "product's FLOP/s."
    )
    if report["training"]:
        known = ", ".join(f"{name} {share}" for name, share in REFERENCE.items())
        print(
            "Reported for the published implementation (sret_t, batch 16, 224 pixels, float32, "
            f"training on a CPU): {known}."
        )
