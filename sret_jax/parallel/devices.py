"""The devices of a run, and a warning if the machine has an accelerator that JAX cannot use."""

import contextlib
import importlib.util
import logging
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator

import jax

from sret_jax.errors import UserError
from sret_jax.parallel.distributed import say
from sret_jax.parallel.freed_memory import keep_temporaries

JAX_LOGGER = "jax._src.xla_bridge"  # logs a warning if a platform does not start
LEAST_DRIVER_OF_CUDA_13 = 580
GOOGLE = "0x1ae0"  # Google's vendor number of PCI devices

ROOT = pathlib.Path("/")


def start_devices(*, keep_freed_memory: bool = False) -> None:
    """Starts JAX's backend and prints what it found. Call it after the processes have joined.

    Args:
      keep_freed_memory: see `keep_temporaries`; only for a process that does nothing but this run.

    Raises:
      UserError: JAX cannot start the platform that JAX_PLATFORMS names.
    """
    with _complaints() as complaints:
        try:
            if keep_freed_memory:
                keep_temporaries()
            devices = jax.devices()
        except RuntimeError as e:
            raise UserError(f"JAX finds no devices: {' '.join(str(e).split())}") from e
    kinds = Counter(device.device_kind for device in devices)
    listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.items())
    say(f"Devices: {listed}, jax {jax.__version__}.")
    chosen = jax.config.jax_platforms  # type: ignore[attr-defined]
    if jax.default_backend() == "cpu" and not chosen:
        for sentence in unusable_accelerators(complaints):
            print(sentence, flush=True)


def unusable_accelerators(complaints: list[str], root: pathlib.Path = ROOT) -> list[str]:
    """One sentence, with a remedy, for each kind of accelerator that JAX cannot use here.

    Args:
      complaints: what JAX logged when it started without them.
      root: root of the file system to look at.
    """
    sentences = []
    if _has_nvidia_driver(root) and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        if not _has_nvidia_device(root):
            remedy = "give a container access to it, e.g. with docker run --gpus=all"
        else:
            installed = [f"jax_cuda{version}_plugin" for version in (12, 13)]
            remedy = _remedy(_cuda_extra(root), installed, complaints)
        sentences.append(_sentence(f"an NVIDIA GPU{_nvidia_model(root)}", remedy))
    if _has_tpu(root):
        sentences.append(_sentence("a TPU", _remedy("tpu", ["libtpu"], complaints)))
    return sentences


def _sentence(accelerator: str, remedy: str) -> str:
    return (
        f"Warning: this machine has {accelerator} that JAX cannot use, so the run is on the CPU; "
        f"{remedy}, or set JAX_PLATFORMS=cpu to use the CPU."
    )


def _remedy(extra: str, modules: list[str], complaints: list[str]) -> str:
    install = f'pip install "jax[{extra}]=={jax.__version__}"'
    if not any(importlib.util.find_spec(module) for module in modules):
        return install
    reason = f" ({complaints[0]})" if complaints else ""
    return f"what it needs is installed but does not start{reason}; reinstall it with {install}"


def _has_nvidia_driver(root: pathlib.Path) -> bool:
    return (
        _has_nvidia_device(root)
        or (root / "proc/driver/nvidia/version").exists()
        or (root / "usr/lib/wsl/lib/nvidia-smi").exists()  # Linux on Windows (WSL)
    )


def _has_nvidia_device(root: pathlib.Path) -> bool:
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev/dxg").exists()


def _nvidia_model(root: pathlib.Path) -> str:
    """The name of the first GPU, in brackets, if the driver reports it."""
    for file in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
        if match := re.search(r"Model:\s*(.+)", _text(file)):
            return f" ({match[1].strip()})"
    return ""


def _cuda_extra(root: pathlib.Path) -> str:
    """The build of JAX that the driver supports."""
    match = re.search(r"Kernel Module\D*(\d+)\.", _text(root / "proc/driver/nvidia/version"))
    return "cuda13" if match and int(match[1]) >= LEAST_DRIVER_OF_CUDA_13 else "cuda12"


def _has_tpu(root: pathlib.Path) -> bool:
    if any((root / "dev").glob("accel[0-9]*")):
        return True
    vendors = (root / "sys/bus/pci/devices").glob("*/vendor")
    passed_through = any((root / "dev/vfio").glob("[0-9]*"))
    return passed_through and any(_text(vendor).strip() == GOOGLE for vendor in vendors)


def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """Collects the first line of each warning from JAX, even if libraries are silenced."""
    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            with contextlib.suppress(Exception):  # JAX formats one of its own messages wrongly
                lines.append(record.getMessage().splitlines()[0])

    listener, logger = Listener(logging.WARNING), logging.getLogger(JAX_LOGGER)
    level, propagate = logger.level, logger.propagate
    logger.addHandler(listener)
    if not logger.isEnabledFor(logging.WARNING):  # `quiet_libraries` was called
        logger.setLevel(logging.WARNING)
        logger.propagate = False
    try:
        yield lines
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
        logger.propagate = propagate


@contextlib.contextmanager
def fits_memory(otherwise: str) -> Iterator[None]:
    """Raises UserError(otherwise) if the enclosed code runs out of memory."""
    try:
        yield
    except MemoryError as e:
        raise UserError(otherwise) from e
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(otherwise) from e
