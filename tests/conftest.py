"""Shared by all tests: eight fake devices, strict JAX, and small real data."""

import importlib.metadata
import importlib.util
import os
import pathlib

ROOT = pathlib.Path(__file__).parent.parent

# Programs run for moments here but compile for seconds, so LLVM's optimizations are skipped.
FAST_COMPILE = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"  # the older ones take half the time
EIGHT_DEVICES = "--xla_force_host_platform_device_count=8"

# Flags of the caller are kept, e.g. XLA_FLAGS=--xla_cpu_max_isa=AVX2 python -m pytest.
FAST_COMPILE = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILE}".strip()

# These must be set before jax is imported anywhere.
os.environ["XLA_FLAGS"] = f"{FAST_COMPILE} {EIGHT_DEVICES}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
os.environ["TF_ENABLE_ONEDNN_OPTS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"  # what is not in a cache that a test lays out is missing

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from etils import epath
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from configs import common, quickstart
from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.cli import define_config
from sret_jax.data.sources.source import prepare_embedded
from sret_jax.run.launch import chosen_config
from sret_jax.settings.config_model import create_from_config
from sret_jax.settings.saved_config import Start

# `pytest --hypothesis-profile=long` searches far longer, with other random examples each time.
settings.register_profile("default", derandomize=True, deadline=None, database=None)
settings.register_profile(
    "long", settings.get_profile("default"), derandomize=False, max_examples=20_000
)
settings.load_profile("default")


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs libtpu: pip install -r requirements-tpu.txt",
)


@pytest.fixture
def no_compilation_cache():
    """No cache for programs compiled for devices that do not exist here: JAX cannot reload them."""

    def use(cache):
        jax.config.update("jax_enable_compilation_cache", cache)
        compilation_cache.reset_cache()  # which remembers whether there is one

    use(False)
    yield
    use(True)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory) -> epath.Path:
    """The digits, prepared by TFDS."""
    folder = epath.Path(tmp_path_factory.mktemp("tfds"))
    prepare_embedded("digits", folder)
    return folder


@pytest.fixture
def tiny_config(digits_dir):
    """The quickstart with a model that compiles in seconds, for runs of a few steps."""
    return make_tiny_config(digits_dir)


def make_tiny_config(digits_dir: epath.Path) -> ConfigDict:
    """The config of the fixture `tiny_config`."""
    config = quickstart.get_config()
    config.model.update(image_size=16, blocks=(1,), groups=((2, 2),), heads=(4,), dim=8)
    config.epochs = 1.0
    config.batch_size = 64
    config.log_every_steps = 1
    config.augment.update(common.DEIT_AUGMENT)
    config.data.data_dir = str(digits_dir)
    return config


def make_synthetic_config() -> ConfigDict:
    """`tiny_config` without data; its compiled programs are the same."""
    config = make_tiny_config(epath.Path("unused"))
    config.model.num_classes = 10
    config.data.synthetic = True
    return config


@pytest.fixture
def float64() -> Iterator[None]:
    """Enables float64 in a test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def saved_run(tmp_path_factory) -> epath.Path:
    """A workdir that looks like a run's: initial weights, and half of each as moving average."""
    config = quickstart.get_config()
    config.model.update(image_size=16, groups=((2, 2), (1, 1)), heads=(2, 4), dim=8)
    config.data.test_crop = 0.8
    workdir = epath.Path(tmp_path_factory.mktemp("saved"))
    model = create_from_config(config, num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    average = jax.tree.map(lambda x: x / 2, variables)
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        save_evaluated(checkpoints, 7, {"model": variables, "ema": average}, 0.5)
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "class_names.json").write_text(json.dumps([f"digit {i}" for i in range(10)]))
    return workdir


def save_evaluated(checkpoints: Checkpoints, step: int, items: dict, top1: float) -> None:
    """Saves a checkpoint and then records its accuracy, as a run does."""
    checkpoints.save(step, items)
    checkpoints.record_metrics(step, {"top1": top1})


TINY_FLAGS = (
    "--config.model.image_size=16",
    "--config.model.blocks=(1,)",
    "--config.model.groups=((2,2),)",
    "--config.model.heads=(4,)",
    "--config.model.dim=8",
    "--config.log_every_steps=1",
    *(f"--config.augment.{name}={value}" for name, value in common.DEIT_AUGMENT.items()),
)


def refusal(capsys, main: Callable[[list[str]], None], *args: object) -> str:
    """The one sentence with which a command ends, with exit status 2."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in args])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("Error: ") and "\n" not in error
    return error


def config_given(workdir: epath.Path, *argv: str) -> tuple[ConfigDict, Start | None]:
    """The config that a command line of training names, and how its run starts."""
    values = flags.FlagValues()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *argv])  # which ml_collections reads
        define_config(values)
        values(sys.argv)
    return chosen_config(values["config"], workdir)


def read_metrics(workdir, name="loss"):
    """A metric of a run by step, up to the run's last report."""
    if not (workdir / "metrics.jsonl").exists():
        return {}
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


# Only the preparation of data needs TensorFlow; other commands run as if it were not installed.
WITHOUT_TENSORFLOW = ROOT / "tests" / "without_tensorflow"


def run_python(
    *args: str, devices: int = 1, timeout: float = 600, tensorflow: bool = False, **kwargs
) -> subprocess.CompletedProcess[str]:
    """Runs a command of the project in its own process, on fake devices.

    Args:
      args: arguments of python.
      devices: number of fake devices.
      timeout: seconds.
      tensorflow: whether the command can import TensorFlow.
      kwargs: further arguments of subprocess.run.
    """
    path = [ROOT] if tensorflow else [WITHOUT_TENSORFLOW, ROOT]
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{FAST_COMPILE} --xla_force_host_platform_device_count={devices}",
        "PYTHONPATH": os.pathsep.join(map(str, path)),
    }
    return subprocess.run(
        [sys.executable, *args],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
        **kwargs,
    )


FORKS = """
import json, os, runpy, sys
import configs.quickstart, sret_jax.run.launch
statuses = []
for number, command in enumerate(json.load(sys.stdin)):
    if not os.fork():
        break
    statuses.append(os.waitstatus_to_exitcode(os.wait()[1]))
else:
    print(json.dumps(statuses))
    sys.exit()
for descriptor, name in ((1, "out"), (2, "err")):
    os.dup2(os.open(f"{sys.argv[1]}/{number}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
sys.argv = command
run = runpy.run_path if command[0].endswith(".py") else runpy.run_module
run(command[0], run_name="__main__")
"""


def run_commands(
    commands: Sequence[Sequence[str]], folder: pathlib.Path, devices: int = 1
) -> list[subprocess.CompletedProcess[str]]:
    """Runs commands one after another, each in a process forked from one that has imported JAX.

    Args:
      commands: each a script or module, and its arguments.
      folder: an empty folder for their output.
      devices: number of fake devices.
    """
    text = json.dumps(commands)
    done = run_python("-c", FORKS, str(folder), devices=devices, input=text)
    assert done.returncode == 0, done.stderr
    return [
        subprocess.CompletedProcess(
            command, status, *((folder / f"{i}.{name}").read_text() for name in ("out", "err"))
        )
        for i, (command, status) in enumerate(zip(commands, json.loads(done.stdout), strict=True))
    ]
