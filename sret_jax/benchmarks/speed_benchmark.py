"""Measures training and inference relative to the rate of one large matrix product.

share = 2 * P * MACs * images/s / R. P is the number of passes: 3 in training (forward, and backward
for the inputs and for the weights), 1 in inference. R is the FLOP/s of one matrix product on the
same devices in the same run: 2048^3 on CPUs, elsewhere 8192^3, because smaller products would not
fill them. A multiply-accumulate is two FLOPs; the model's are counted in its program. A teacher's
forward pass takes time but does not count as work. PyTorch's module of the same model, eager and
compiled, is measured in the same rounds.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sret_jax.benchmarks.compiled_bytes import benchmark_bytes
from sret_jax.data.sources.splits import IMAGENET_CLASSES
from sret_jax.errors import UserError
from sret_jax.evaluation.evaluation import empty_totals, make_eval_step
from sret_jax.files import write_json
from sret_jax.models.flops import model_macs
from sret_jax.parallel.mesh import batch_sharding, replicated
from sret_jax.settings.config_model import create_from_config
from sret_jax.terminal import Progress
from sret_jax.text import duration, table
from sret_jax.training.experiment import Experiment, open_experiment

OURS = "ours"  # listed beside PyTorch's names
CPU_SIDE, ACCELERATOR_SIDE = 2048, 8192  # side of the matrices whose product is the peak
BURST_SECONDS = 0.5  # time of matrix products before the steps of each round


class Task(Protocol):
    """Something to time; a call does it once and waits for its end."""

    def __call__(self) -> None: ...


class Work(Task, Protocol):
    """A task with a number of images and of FLOPs, 2 * passes * MACs * images."""

    images: int
    flops: int


class Timing(NamedTuple):
    """The time of a task: wall-clock time, and CPU time of all cores including the system's."""

    seconds: float
    cpu_seconds: float


class MatrixProduct:
    """One side^3 matrix product on every device at once.

    Attributes:
      side: side of the matrices.
      flops: FLOPs of all products together.
    """

    def __init__(self, mesh: Mesh, dtype: str):
        self.side = CPU_SIDE if jax.default_backend() == "cpu" else ACCELERATOR_SIDE
        ones = jnp.ones((self.side, self.side), dtype)
        rows = jnp.tile(ones, (mesh.size, 1))  # `side` on each device
        self._operands = jax.device_put((rows, ones), (batch_sharding(mesh), replicated(mesh)))
        self._product = jax.jit(jnp.matmul)
        self.flops = 2 * mesh.size * self.side**3

    def __call__(self) -> None:
        jax.block_until_ready(self._product(*self._operands))


class Step:
    """The actual train or evaluation step of an experiment, on synthetic images.

    Attributes:
      experiment: the experiment that the step belongs to.
      passes: number of passes over the model's multiply-accumulates in one step.
      compile_seconds: time from the Python code to the compiled program.
      images: images per step.
      flops: FLOPs per step, 2 * passes * MACs * images.
    """

    def __init__(self, experiment: Experiment, *, train: bool):
        self.experiment = experiment
        self.images = experiment.config.batch_size
        self.passes = 3 if train else 1
        self.flops = 2 * self.passes * model_macs(experiment.model) * self.images
        self._batches = experiment.train_batches(start_step=0)
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
    config: ConfigDict,
    *,
    train: bool,
    rounds: int,
    steps: int,
    against: str | None = None,
    topology: str | None = None,
    json_file: epath.Path | None,
) -> dict[str, Any]:
    """Measures the train or evaluation step of a config and prints its share of the peak.

    With a topology it compiles the train step instead; see `benchmark_bytes`.

    Args:
      config: from configs/common.py; no data set is read.
      train: measures the train step; otherwise inference.
      rounds: rounds of matrix products and steps in turn; medians are reported.
      steps: steps per round.
      against: "torch" also measures the model's `torch_peer`, in the same rounds.
      topology: a name that `open_topology` takes.
      json_file: file that the figures are also written to.

    Raises:
      UserError: a number is out of range, training would refuse the config, or PyTorch is missing
        or has no such model.
    """
    check_counts(rounds=rounds, steps=steps)
    if topology:
        return benchmark_bytes(config, topology, json_file=json_file)
    peer = _peer_of(config) if against == "torch" else None
    with tempfile.TemporaryDirectory() as folder:
        step = open_step(config, epath.Path(folder), train=train)
    dtype = peak_dtype(config)
    product = MatrixProduct(step.experiment.mesh, dtype)
    others = {}
    if peer:
        make_steps = torch_module().TorchStep.both
        others = make_steps(peer, step.experiment.model, step.images, step.flops, train)
    peak, ours, *timings = measure([product, step, *others.values()], rounds, steps)
    by_name = {OURS: figures(step, ours, product, peak)}
    for (name, other), timing in zip(others.items(), timings, strict=True):
        by_name[name] = figures(other, timing, product, peak) | {
            "speed_of_ours": speed(ours, timing)
        }
    report = {
        **describe(step),
        "training": train,
        "rounds": rounds,
        "compile_seconds": step.compile_seconds,
        "peak_dtype": dtype,
        "peak_side": product.side,
        "load_average": os.getloadavg()[0],
        "peak_gflops": spread([product.flops / 1e9 / t.seconds for t in peak]),
        "shares": by_name,
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
    """The dtype of the peak measurement: the config's dtype, but float32 on CPUs."""
    return "float32" if jax.default_backend() == "cpu" else config.model.dtype


def check_counts(**counts: int) -> None:
    """Raises UserError if a count is below one."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"--{name}={value} must be at least 1")


def measure(tasks: Sequence[Task], rounds: int, repeats: int) -> list[list[Timing]]:
    """The time of each task by round: the median of its repeats, with the tasks in turn.

    A task that takes less than BURST_SECONDS is repeated for that long. The first call of each
    task is a warm-up and does not count.
    """
    for task in tasks:
        task()
    timings: list[list[Timing]] = [[] for _ in tasks]
    with Progress("Measuring", rounds * len(tasks), "measurements") as progress:
        for task, results in progress.counted(rounds * list(zip(tasks, timings, strict=True))):
            results.append(_median(task, repeats))
    return timings


def _median(task: Task, repeats: int) -> Timing:
    spent: list[Timing] = []
    while len(spent) < repeats or sum(timing.seconds for timing in spent) < BURST_SECONDS:
        start, cpu_start = time.perf_counter(), time.process_time()
        task()
        spent.append(Timing(time.perf_counter() - start, time.process_time() - cpu_start))
    return Timing(*(statistics.median(values) for values in zip(*spent, strict=True)))


def describe(step: Step) -> dict[str, Any]:
    """Describes what was measured, and on which machine."""
    experiment = step.experiment
    return {
        "model": experiment.model_title,
        "slicing": experiment.model.slicing,
        "image_size": experiment.model.image_size,
        "dtype": experiment.config.model.dtype,
        "batch_size": step.images,
        "gmacs_per_image": step.flops / (2e9 * step.passes * step.images),
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
    }


def spread(values: list[float]) -> dict[str, float]:
    """The median, smallest and largest value over the rounds."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def figures(
    work: Work, timings: list[Timing], product: MatrixProduct, peak: list[Timing]
) -> dict[str, Any]:
    """Rates and the share of the peak over the rounds; the peak is that of the same round."""
    shares = [
        (work.flops / taken.seconds) / (product.flops / whole.seconds)
        for taken, whole in zip(timings, peak, strict=True)
    ]
    return {
        "step_seconds": spread([t.seconds for t in timings]),
        "cpu_seconds": spread([t.cpu_seconds for t in timings]),
        "images_per_second": spread([work.images / t.seconds for t in timings]),
        "share_of_peak": spread(shares),
    }


def speed(ours: list[Timing], theirs: list[Timing]) -> dict[str, float]:
    """How many times as fast as theirs our step is, over the rounds."""
    pairs = zip(ours, theirs, strict=True)
    return spread([other.seconds / taken.seconds for taken, other in pairs])


def _peer_of(config: ConfigDict) -> Any:
    """PyTorch's module of the model; raises UserError if it would not do what our step does."""
    device = jax.devices()[0]
    if device.platform != "cpu" or config.model.dtype != "float32":
        raise UserError(
            "--against=torch computes in float32 on CPUs, and the step in "
            f"{config.model.dtype} on {device.device_kind}; set --config.model.dtype=float32 "
            "and JAX_PLATFORMS=cpu"
        )
    model = create_from_config(config, config.model.num_classes or IMAGENET_CLASSES)
    return torch_module().torch_peer(model, config.model.name)


def torch_module() -> Any:
    """Imports `torch_benchmark`.

    Raises:
      UserError: PyTorch is not installed.
    """
    try:
        from sret_jax.benchmarks import torch_benchmark
    except ModuleNotFoundError as e:
        raise UserError(
            f"--against=torch needs {e.name}, which is not installed; pip install torch"
        ) from e
    return torch_benchmark


def print_report(report: dict[str, Any]) -> None:
    """Prints the figures and their explanation."""
    passes = 3 if report["training"] else 1
    what = "train step" if report["training"] else "inference"
    peak = report["peak_gflops"]
    slicing = f"{report['slicing']}, " if report["slicing"] else ""
    print(
        f"{what} of {report['model']}, {slicing}{report['gmacs_per_image']:.3f} GMACs per "
        f"{report['image_size']}-pixel image, batch {report['batch_size']}, {report['dtype']}; "
        f"{report['devices']} devices, {report['cores']} cores, load {report['load_average']:.1f}; "
        f"compiled in {duration(report['compile_seconds'])}; medians of {report['rounds']} rounds "
        "(least to largest)"
    )
    product = f"{report['peak_dtype']} {report['peak_side']}^3 matrix product"
    print(f"{product}: {_text(peak, ',.0f')} GFLOP/s")
    rows = [
        (
            name,
            _text(values["share_of_peak"], ".3f"),
            _text(values["images_per_second"], ",.1f"),
            _text(values["step_seconds"], ".3g"),
            _text(values["cpu_seconds"], ".3g"),
        )
        for name, values in report["shares"].items()
    ]
    print(table(("", "share of its rate", "images/s", "seconds", "CPU seconds"), rows))
    for name, values in report["shares"].items():
        if "speed_of_ours" in values:
            times = _text(values["speed_of_ours"], ".2f")
            print(f"Ours is {times} times as fast as {name}.")
    print(
        f"The share is 2 * {passes} * {report['gmacs_per_image']:.3f} GMACs * images/s over the "
        "product's FLOP/s."
    )


def _text(values: dict[str, float], form: str) -> str:
    median, least, largest = (format(values[k], form) for k in ("median", "least", "largest"))
    return f"{median} ({least} to {largest})"
