"""The train loop: resume, step, report, evaluate, save."""

import contextlib
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from clu import metric_writers, parameter_overview
from etils import epath
from ml_collections import ConfigDict

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.data.loader import Loader, SyntheticLoader, train_loader
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.parallel.distributed import agreed, is_leader
from sret_jax.parallel.mesh import batch_sharding, with_shardings
from sret_jax.training.bad_images import BadImages
from sret_jax.training.curves import draw_curves
from sret_jax.training.evaluation import Evaluator, Results, percent
from sret_jax.training.experiment import (
    Experiment,
    changed_settings,
    open_experiment,
    save_description,
)
from sret_jax.training.flops import model_macs
from sret_jax.training.metrics_file import JsonlWriter, read_metrics
from sret_jax.training.profiler import Profiler
from sret_jax.training.progress import ProgressLine, Window, duration
from sret_jax.training.state import TrainState
from sret_jax.training.step import make_train_step

RESULT_FILE = "result.json"
ARCHITECTURE = ("name", "image_size", "blocks", "loops", "groups", "heads", "dim", "permutation")


def train(config: ConfigDict, workdir: epath.Path) -> dict[str, Any]:
    """Trains to the end, resuming from the newest checkpoint in `workdir`.

    Writes checkpoints, config.json, class_names.json, metrics.jsonl, tensorboard/, curves.png and
    result.json there.

    Args:
      config: as configs/common.py makes it.
      workdir: local or remote folder.

    Returns:
      What result.json holds: {"step", "eval": {"top1", "top5", "loss"}, "eval_ema": {...},
      "train_seconds", "images_per_second"}.

    Raises:
      UserError: a bad config, data set or checkpoint, before any compilation; later, a label
        outside the classes, a hundred unreadable images in a row, or a loss that is not finite.
    """
    with agreed():
        experiment = open_experiment(config, workdir)
    with contextlib.closing(Run(experiment)) as run:
        run.train()
        return run.finish()


class Run:
    """A started training run: its state, its data and where it reports."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        self._progress = ProgressLine(
            experiment.total_steps, experiment.steps_per_epoch, enabled=is_leader()
        )
        self._resources = contextlib.ExitStack()
        config = experiment.config
        self._checkpoints = Checkpoints(
            experiment.workdir,
            keep_latest=config.checkpoint.keep_latest,
            keep_best=config.checkpoint.keep_best,
            keep_every=experiment.keep_every,
        )
        self._resources.callback(self._checkpoints.close)
        self.state = self._restore() or experiment.init_state()
        self.step = int(self.state.step)
        self._describe()
        self._writer = self._make_writer()
        self._resources.callback(self._writer.close)
        self._window = Window(self._seconds_before())
        self._evaluator = Evaluator(
            experiment.model,
            config,
            experiment.eval_source,
            experiment.mesh,
            experiment.shardings.variables,
        )
        self._resources.callback(self._evaluator.loader.close)
        self._bad_images = {
            name: BadImages(source, config.data.max_bad_fraction, self._progress.say)
            for name, source in (
                ("train", experiment.train_source),
                ("eval", experiment.eval_source),
            )
        }
        self._results: Results = {}
        self._evaluated_at: int | None = None

    def train(self) -> None:
        """Takes the steps that are left."""
        experiment, config = self.experiment, self.experiment.config
        if self.step >= experiment.last_step:
            self._progress.say(f"Training is complete at step {self.step:,}.")
            return
        train_step = self._compile_step()
        loader = train_loader(
            experiment.train_source,
            config,
            experiment.model.image_size,
            config.batch_size,
            batch_sharding(experiment.mesh),
            start_step=self.step,
        )
        self._resources.callback(loader.close)
        profiler = Profiler(config.profile, experiment.workdir)
        self._resources.callback(profiler.close)
        self._window.restart()
        while self.step < experiment.last_step:
            profiler.before(self.step + 1)
            with self._window.waiting():
                batch = next(loader)
            self.state, metrics = train_step(self.state, batch)
            self._window.add(metrics)
            self.step += 1
            profiler.after(self.step, metrics)

            last = self.step == experiment.last_step
            if last or self.step % config.log_every_steps == 0:
                self._report(loader)
            save = last or self.step % experiment.save_every == 0
            with self._window.paused():
                # Before every save, for the best checkpoint is known by its evaluation.
                if save or self.step % experiment.eval_every == 0:
                    self._evaluate()
                if save:
                    self._save()

    def finish(self) -> dict[str, Any]:
        """Evaluates if the last step was not yet, and writes and prints the result."""
        if self._evaluated_at != self.step:
            self._evaluate()
        self.close()
        experiment, seconds = self.experiment, self._window.seconds
        images = self.step * experiment.config.batch_size
        result = {
            "step": self.step,
            **self._results,
            "train_seconds": seconds,
            "images_per_second": images / seconds if seconds else 0.0,
        }
        if is_leader():
            workdir = experiment.workdir
            write_json(workdir / RESULT_FILE, result)
            draw_curves(workdir)
            self._progress.say(
                f"\nTest accuracy {percent(self._results['eval']['top1'])} at step {self.step:,} "
                f"after {duration(seconds)} of training "
                f"(EMA {percent(self._results['eval_ema']['top1'])}).\n"
                f"Results: {workdir / RESULT_FILE}, {workdir / 'curves.png'}, "
                f"{workdir / 'metrics.jsonl'}"
            )
        return result

    def close(self) -> None:
        """Waits for the last checkpoint and ends the loader's workers."""
        self._resources.close()

    def _restore(self) -> TrainState | None:
        target = with_shardings(self.experiment.abstract_state, self.experiment.shardings)
        restored = self._checkpoints.restore_newest(_to_items(target))
        if restored is None:
            return None
        step, items = restored
        self._progress.say(f"Resuming {self.experiment.workdir} at step {step:,}.")
        self._compare_config()
        return _from_items(items)

    def _compare_config(self) -> None:
        """Says what the config changes; another architecture of the same shapes is refused."""
        with agreed():
            changed = {}
            if is_leader():
                changed = changed_settings(self.experiment.config, self.experiment.workdir)
            model = {k: v for k, v in changed.items() if k.removeprefix("model.") in ARCHITECTURE}
            if "data.synthetic" in changed:
                raise UserError(
                    f"{self.experiment.workdir} was not trained with "
                    f"config.data.synthetic={self.experiment.config.data.synthetic}; give another "
                    "--workdir"
                )
            if model:
                raise UserError(
                    f"{self.experiment.workdir} was trained with another model ({_listed(model)}); "
                    "use its own config or another --workdir"
                )
        if changed:
            self._progress.say(f"The config has changed since: {_listed(changed)}.")

    def _describe(self) -> None:
        if not is_leader():
            return
        experiment = self.experiment
        save_description(experiment)
        abstract = experiment.abstract_state.variables["params"]
        overview = parameter_overview.get_parameter_overview(abstract, include_stats=False)
        self._progress.say(overview)
        self._progress.say(
            f"{experiment.config.model.name}: {model_macs(experiment.model) / 1e9:.3f} GMACs per "
            f"{experiment.model.image_size}x{experiment.model.image_size} image; "
            f"{len(experiment.train_source):,} training and {len(experiment.eval_source):,} test "
            f"images in {len(experiment.eval_source.class_names):,} classes; "
            f"{experiment.total_steps:,} steps of {experiment.config.batch_size:,} on "
            f"{experiment.mesh.size} {jax.devices()[0].platform} devices "
            f"({jax.process_count()} hosts); results in {experiment.workdir}"
        )

    def _make_writer(self) -> metric_writers.MetricWriter:
        if not is_leader():
            return metric_writers.MultiWriter([])
        workdir = self.experiment.workdir
        return metric_writers.MultiWriter(
            [
                metric_writers.SummaryWriter(str(workdir / "tensorboard")),
                JsonlWriter(workdir, last_step=self.step),
            ]
        )

    def _seconds_before(self) -> float:
        """Training time up to the step at which this run resumes."""
        lines = read_metrics(self.experiment.workdir)
        return max(
            (x["train_seconds"] for x in lines if "train_seconds" in x and x["step"] <= self.step),
            default=0.0,
        )

    def _compile_step(self) -> jax.stages.Compiled:
        experiment, config = self.experiment, self.experiment.config
        start = time.perf_counter()
        self._progress.say("Compiling the train step...")
        train_step = make_train_step(
            experiment.model,
            experiment.optimizer,
            experiment.mesh,
            experiment.shardings,
            seed=config.seed,
            mixing=experiment.mixing,
            ema_decay=config.ema_decay,
            grad_accum=config.grad_accum,
        )
        batch = abstract_batch(config.batch_size, experiment.model.image_size)
        compiled = train_step.lower(experiment.abstract_state, batch).compile()
        self._progress.say(f"Compiled in {duration(time.perf_counter() - start)}.")
        return compiled

    def _report(self, loader: Loader | SyntheticLoader) -> None:
        config = self.experiment.config
        report = self._window.close(config.batch_size)
        report["lr"] = float(self.experiment.schedule(self.step - 1))
        report["train_seconds"] = self._window.seconds
        self._check_finite(report["loss"])
        left = (self.experiment.last_step - self.step) * config.batch_size
        self._writer.write_scalars(self.step, report)
        self._writer.flush()
        self._progress.show(self.step, report, left / report["images_per_second"])
        self._bad_images["train"].check(loader)

    def _evaluate(self) -> None:
        weights = {"eval": self.state.variables, "eval_ema": self.state.ema}
        self._results = self._evaluator.evaluate(weights)
        self._bad_images["eval"].check(self._evaluator.loader)
        self._check_finite(self._results["eval"]["loss"])  # before anything is saved
        scalars = {f"{n}/{key}": v for n, r in self._results.items() for key, v in r.items()}
        self._writer.write_scalars(self.step, scalars)
        self._writer.flush()
        epoch = self.step / self.experiment.steps_per_epoch
        raw, ema = self._results["eval"], self._results["eval_ema"]
        self._progress.say(
            f"evaluation at step {self.step:,} (epoch {epoch:.1f}): "
            f"top-1 {percent(raw['top1'])}, top-5 {percent(raw['top5'])}, loss {raw['loss']:.4f}; "
            f"EMA top-1 {percent(ema['top1'])}"
        )
        self._evaluated_at = self.step

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} by step {self.step}; start again from the last checkpoint "
                "with a lower config.optim.lr_per_512, or clip with config.optim.clip_norm"
            )

    def _save(self) -> None:
        self._checkpoints.save(self.step, _to_items(self.state), self._results["eval"])


def abstract_batch(batch_size: int, image_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch, for compiling ahead of the data."""
    shapes = {
        "image": ((batch_size, image_size, image_size, 3), jnp.uint8),
        "label": ((batch_size,), jnp.int32),
        "bad": ((batch_size,), jnp.bool_),
        "real": ((batch_size,), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct(*spec) for name, spec in shapes.items()}


def _listed(changed: dict[str, str]) -> str:
    return "; ".join(f"{name}: {change}" for name, change in changed.items())


def _to_items(state: TrainState) -> dict[str, Any]:
    train = {"step": state.step, "opt_state": state.opt_state}
    return {"model": state.variables, "ema": state.ema, "train": train}


def _from_items(items: dict[str, Any]) -> TrainState:
    return TrainState(variables=items["model"], ema=items["ema"], **items["train"])
