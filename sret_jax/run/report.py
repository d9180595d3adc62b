"""Reports a run to people: the progress line, metrics.jsonl, TensorBoard, the result."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import Mesh

from sret_jax.checkpoints.manager import CHECKPOINTS
from sret_jax.distillation.teacher import not_compared
from sret_jax.evaluation.confusion import Confusion, write_confusions
from sret_jax.evaluation.evaluation import Results, percent
from sret_jax.files import write_json, written_whole
from sret_jax.models import adapter_costs
from sret_jax.models.flops import model_macs
from sret_jax.models.kernel_use import in_words
from sret_jax.models.registry import title
from sret_jax.parallel.distributed import agreed, is_leader
from sret_jax.parallel.host import host_count
from sret_jax.run.curves import draw_curves
from sret_jax.run.event_file import EventWriter
from sret_jax.run.metrics_file import METRICS_FILE, JsonlWriter, read_metrics
from sret_jax.run.progress import ProgressLine, Window
from sret_jax.settings.saved_config import Start, save_description
from sret_jax.text import duration, table
from sret_jax.training.experiment import Experiment
from sret_jax.training.train_loops import loops_in_words

RESULT_FILE = "result.json"
PARAMETERS_FILE = "parameters.txt"

Callback = Callable[[int, dict[str, float]], None]


class Reporter:
    """Shows and writes the figures of a run; only process 0 does so.

    Attributes:
      window: the steps since the last report.
    """

    def __init__(self, experiment: Experiment, callbacks: Sequence[Callback]):
        self._experiment = experiment
        self._callbacks = callbacks if is_leader() else ()
        self._progress = ProgressLine(
            experiment.total_steps, experiment.steps_per_epoch, enabled=is_leader()
        )
        self.say = self._progress.say
        self._storage_complaint = ""
        self._writers: list[JsonlWriter | EventWriter] = []
        self.window = Window(0.0)

    def start(self, step: int) -> None:
        """Continues files that were written up to `step`, and drops what was written later."""
        self.close()
        self._writers = self._open_writers(step)
        self.window = Window(self._seconds_until(step))

    def close(self) -> None:
        """Closes the files."""
        for writer in self._writers:
            with self._storage_may_fail():
                writer.close()

    def describe(self, start: Start | None) -> None:
        """Prints the size of the run, and saves its description and parameters in the workdir.

        Args:
          start: the command line of the run, if it has one.
        """
        experiment = self._experiment
        with agreed():
            if is_leader():
                class_names = experiment.eval_source.class_names
                save_description(experiment.config, class_names, start, experiment.workdir)
        devices = devices_in_words(experiment.mesh)
        if not is_leader():
            return
        params = flatten_dict(experiment.abstract_state.variables["params"], sep="/")
        with self._storage_may_fail():
            write_parameters(params, experiment.workdir)
        for line in in_words(experiment.kernel_uses):
            self.say(f"Kernels: {line}.")
        if experiment.teacher:
            path, model = experiment.config.teacher, experiment.teacher.model
            self.say(f"Teacher: {title(model, experiment.teacher.variant)}, {path}.")
        size = experiment.model.image_size
        self.say(
            f"Training {experiment.model_title} on {devices}.\n"
            f"{sum(x.size for x in params.values()):,} parameters, listed in {PARAMETERS_FILE}; "
            f"{model_macs(experiment.model) / 1e9:.3f} GMACs per {size}x{size} image.\n"
            f"{len(experiment.train_source):,} training and {len(experiment.eval_source):,} test "
            f"images in {len(experiment.eval_source.class_names):,} classes; "
            f"{experiment.total_steps:,} steps of {experiment.config.batch_size:,}; the average's "
            f"decay is {1 - float(experiment.hyperparameters.ema_rate):.7g} per step.\n"
            f"Results: {experiment.workdir}"
        )
        if adapters := adapter_costs.in_words(adapter_costs.adapter_costs(experiment.model)):
            self.say(f"Adapters: {adapters}.")
        if loops := experiment.loops_figures():
            self.say(loops_in_words(loops))
        if experiment.lost_gradients:
            self.say(experiment.lost_gradients)
        if experiment.teacher and experiment.teacher.class_names is None:
            self.say(not_compared(experiment.config.teacher))

    def training(self, step: int) -> None:
        """Reports the steps of the window, and starts a new one."""
        batch_size = self._experiment.config.batch_size
        report = self.window.close(batch_size)
        report["train_seconds"] = self.window.seconds
        self._write(step, report)
        left = (self._experiment.last_step - step) * batch_size / report["images_per_second"]
        if "gmacs" in report and step < self._experiment.last_step:  # later steps may cost more
            left *= self._experiment.mean_gmacs(step) / report["gmacs"]
        self._progress.show(step, report, left)

    def evaluation(self, step: int, results: Results, confusions: dict[str, Confusion]) -> None:
        """Reports an evaluation of the raw weights and their average, in all and by class."""
        self._write(step, {f"{n}/{key}": v for n, r in results.items() for key, v in r.items()})
        epoch = step / self._experiment.steps_per_epoch
        raw, ema = results["eval"], results["eval_ema"]
        self.say(
            f"evaluation at step {step:,} (epoch {epoch:.1f}): "
            f"top-1 {percent(raw['top1'])}, top-5 {percent(raw['top5'])}, loss {raw['loss']:.4f}; "
            f"EMA top-1 {percent(ema['top1'])}"
        )
        if not is_leader():
            return
        workdir = self._experiment.workdir
        if confusions:
            self.say(confusions["eval"].worst())
            with self._storage_may_fail():
                write_confusions(workdir, step, confusions)
        with self._storage_may_fail():
            draw_curves(workdir)

    def result(
        self,
        step: int,
        results: Results,
        best: tuple[int, float] | None,
        compile_seconds: float,
    ) -> dict[str, Any]:
        """Writes result.json and prints its path; returns the contents of result.json.

        Args:
          step: the last step.
          results: results of its evaluation.
          best: the step of the best checkpoint, and its raw top-1.
          compile_seconds: time that the last start took to compile, or to load what was compiled.
        """
        seconds, mesh = self.window.seconds, self._experiment.mesh
        images = step * self._experiment.config.batch_size
        result = {
            "step": step,
            **results,
            "best": {"step": best[0], "top1": best[1]} if best else None,
            "train_seconds": seconds,
            "images_per_second": images / seconds if seconds else 0.0,
            "compile_seconds": compile_seconds,
            "devices": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        }
        if is_leader():
            workdir = self._experiment.workdir
            write_json(workdir / RESULT_FILE, result)
            self.say(
                f"\nTest accuracy {percent(results['eval']['top1'])} at step {step:,} "
                f"after {duration(seconds)} of training "
                f"(EMA {percent(results['eval_ema']['top1'])}).\n"
                f"Results: {workdir / RESULT_FILE}, {workdir / 'curves.png'}, "
                f"{workdir / METRICS_FILE}"
            )
            if best:
                self.say(
                    f"Best checkpoint: step {best[0]:,}, test accuracy {percent(best[1])}, in "
                    f"{workdir / CHECKPOINTS / str(best[0])}"
                )
        return result

    def _open_writers(self, step: int) -> list[JsonlWriter | EventWriter]:
        if not is_leader():
            return []
        workdir = self._experiment.workdir
        return [JsonlWriter(workdir, last_step=step), EventWriter(workdir / "tensorboard")]

    def _seconds_until(self, step: int) -> float:
        """Training time up to that step, summed over all starts of the run."""
        lines = read_metrics(self._experiment.workdir)
        return max(
            (x["train_seconds"] for x in lines if "train_seconds" in x and x["step"] <= step),
            default=0.0,
        )

    def _write(self, step: int, scalars: dict[str, float]) -> None:
        for writer in self._writers:
            with self._storage_may_fail():
                writer.write_scalars(step, scalars)
                writer.flush()
        for callback in self._callbacks:
            callback(step, scalars)

    @contextlib.contextmanager
    def _storage_may_fail(self) -> Iterator[None]:
        """Continues without metrics if the disk is full; the next flush writes them."""
        try:
            yield
        except Exception as e:  # file systems may raise anything
            complaint = str(e).splitlines()[0] if str(e) else repr(e)
            if complaint != self._storage_complaint:
                self.say(f"Not all metrics can be written ({complaint}); the run continues.")
            self._storage_complaint = complaint


def write_parameters(params: dict[str, jax.ShapeDtypeStruct], workdir: epath.Path) -> None:
    """Writes name, shape, type and size of every parameter, and the total, to parameters.txt."""
    rows = [[name, str(x.shape), str(x.dtype), f"{x.size:,}"] for name, x in params.items()]
    total = ["total", "", "", f"{sum(x.size for x in params.values()):,}"]
    with written_whole(workdir / PARAMETERS_FILE) as file:
        file.write(table(("name", "shape", "type", "size"), [*rows, total]) + "\n")


def devices_in_words(mesh: Mesh) -> str:
    """Describes a run's devices, and its processes and hosts if several; also a barrier."""
    processes, hosts = jax.process_count(), host_count()
    platform = mesh.devices.flat[0].platform
    devices = f"{mesh.size} {platform} device{'' if mesh.size == 1 else 's'}"
    if processes == 1:
        return devices
    return f"{devices} ({processes} processes on {hosts} host{'' if hosts == 1 else 's'})"
