"""Reports a crash in WORKDIR/crash/step-N.process-I.json."""

import importlib.metadata
import platform
import traceback
from datetime import datetime
from typing import Any

import jax
from etils import epath

from sret_jax.files import write_json

CRASH_DIR = "crash"
PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "tensorflow-datasets",
    "numpy",
)


def write_crash_report(workdir: epath.Path, error: Exception, facts: dict[str, Any]) -> epath.Path:
    """Writes error, traceback, `facts`, versions and devices of this process.

    Args:
      workdir: folder of the run.
      error: the error that ended the run.
      facts: {"step", "losses" of the last steps, "batches": ids of the last samples, "config"}.

    Returns:
      The path of the file.
    """
    folder = workdir / CRASH_DIR
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{facts['step']}.process-{jax.process_index()}.json"
    report = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "error": f"{type(error).__name__}: {error}",
        **facts,
        "versions": {"python": platform.python_version(), **_versions()},
        "processes": jax.process_count(),
        "devices": [str(device) for device in jax.local_devices()],
        "traceback": "".join(traceback.format_exception(error)).splitlines(),
    }
    write_json(path, report)
    return path


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}
