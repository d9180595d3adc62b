"""The evidence of a finished run: small files, without paths of this machine, to be kept in git."""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
from typing import Any

import jax
from etils import epath

from sret_jax.errors import UserError
from sret_jax.files import write_json, write_text
from sret_jax.models.flops import model_macs
from sret_jax.models.variables import abstract_variables
from sret_jax.run.data_record import load_record
from sret_jax.run.metrics_file import read_metrics
from sret_jax.run.report import RESULT_FILE
from sret_jax.settings.config_model import create_from_config
from sret_jax.settings.saved_config import CLASSES_FILE, CONFIG_FILE, load_config
from sret_jax.study.design import CONFIG, METRICS, RESULT, Place, Study, flattened
from sret_jax.study.tasks import Ended

STARTS_FILE = "starts.json"  # in the workdir: time, cores and machine of each start
KEPT_METRICS = (
    *("loss", "top1", "lr", "grad_norm", "images_per_second", "train_seconds"),
    *("eval/top1", "eval/loss", "eval_ema/top1", "eval_ema/loss"),
)
MOST_LINES = 40  # training lines that are kept of metrics.jsonl
DIGITS = 6


def is_finished(workdir: epath.Path) -> bool:
    """Whether a run has ended with a result."""
    return (workdir / RESULT_FILE).exists()


def record_start(workdir: epath.Path, ended: Ended, at_once: int, commit: str | None) -> None:
    """Adds a start of a run to starts.json in its workdir.

    Args:
      workdir: folder of the run.
      ended: its process.
      at_once: how many processes ran at once.
      commit: what `commit` returned when it started.
    """
    start = {
        "status": ended.status,
        "wall_seconds": round(ended.seconds, 1),
        "processor": processor(),
        "cores": len(ended.cores) or os.cpu_count(),
        "runs_at_once": at_once,
        "load": round(os.getloadavg()[2], 1),
        "jax": importlib.metadata.version("jax"),
        "python": platform.python_version(),
        "commit": commit,
    }
    write_json(workdir / STARTS_FILE, [*_starts(workdir), start])


def write_evidence(study: Study, place: Place, arm: str, seed: int, results: epath.Path) -> None:
    """Writes RESULTS/ARM/SEED/ with config.json, result.json and a thinned metrics.jsonl.

    Paths of images, teacher and labels are replaced by those of the config file.

    Args:
      study: the study.
      place: where the run is.
      arm: the run's arm.
      seed: the run's seed.
      results: folder of the evidence.

    Raises:
      UserError: the run is damaged, or the files cannot be written.
    """
    workdir = epath.Path(place.workdir(arm, seed))
    config = load_config(workdir)
    if config is None:
        raise UserError(f"{workdir} holds no {CONFIG_FILE}; remove the folder to train it again")
    given, own = config.data.name, study.settings(arm, seed)
    for name in place.overrides(study, arm, seed):
        config.update_from_flattened_dict({name: flattened(own.to_dict())[name]})
    classes = json.loads((workdir / CLASSES_FILE).read_text())
    model = create_from_config(config, len(classes))
    result = json.loads((workdir / RESULT_FILE).read_text())
    metrics = read_metrics(workdir)
    starts = _starts(workdir)
    parameters = jax.tree.leaves(abstract_variables(model)["params"])
    folder = results / arm / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, config.to_dict())
    write_text(folder / METRICS, "".join(f"{json.dumps(x)}\n" for x in thinned(metrics)))
    write_json(
        folder / RESULT,
        {
            "arm": arm,
            "seed": seed,
            "step": result["step"],
            "eval": result["eval"],
            "eval_ema": result["eval_ema"],
            "parameters": sum(x.size for x in parameters),
            "macs": model_macs(model),
            "step_seconds": step_seconds(metrics, config.batch_size),
            "train_seconds": result["train_seconds"],
            "compile_seconds": result.get("compile_seconds"),
            "wall_seconds": max(result["train_seconds"], sum(x["wall_seconds"] for x in starts)),
            "devices": result.get("devices"),
            "starts": len(starts) or None,
            "machine": starts[-1] if starts else None,
            "data": own.data.name + (" in a class folder" if given != own.data.name else ""),
            "images": load_record(workdir),
        },
    )


def step_seconds(metrics: list[dict[str, float]], batch_size: int) -> float | None:
    """The median over the reports of a run of the mean seconds of a training step."""
    rates = [line["images_per_second"] for line in metrics if "images_per_second" in line]
    return statistics.median(batch_size / rate for rate in rates) if rates else None


def thinned(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """The evaluations, and every n-th training report so that few remain, in fewer digits."""
    training = [line for line in metrics if "loss" in line]
    every = -(-len(training) // MOST_LINES)
    kept = {id(line) for line in training[::-1][:: every or 1]}  # the last one always
    return [
        {"step": line["step"], **{k: _rounded(line[k]) for k in KEPT_METRICS if k in line}}
        for line in metrics
        if "loss" not in line or id(line) in kept
    ]


def processor() -> str:
    """The name of this machine's processor."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this code, followed by -dirty if files differ; None if it is no git clone."""
    clone = pathlib.Path(__file__).parents[2]
    if not (clone / ".git").exists():
        return None
    command = ["git", "-C", str(clone), "describe", "--always", "--dirty", "--abbrev=12"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return None


def _starts(workdir: epath.Path) -> list[dict[str, Any]]:
    file = workdir / STARTS_FILE
    return json.loads(file.read_text()) if file.exists() else []


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
