"""Makes the table of docs/recursion.md: what recursion costs in each family.

python -m sret_jax.benchmarks.recursion_costs --folder=DIR

Each form of a model is planned for one v5e chip and timed on this machine's CPUs. The figures are
JSON files in the folder and are made once, so an interrupted command continues where it was. The
table so far is printed after each of them. All take about an hour.
"""

import copy
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from etils import epath

from sret_jax.benchmarks.speed_benchmark import measure, open_step, spread
from sret_jax.cli import Parser
from sret_jax.config_files import get_config
from sret_jax.files import write_json
from sret_jax.models.registry import variant
from sret_jax.parallel.freed_memory import keep_temporaries
from sret_jax.text import markdown_table

CONFIG = "sret_t"  # the recipe; its model's name and settings are replaced
TOPOLOGY, TPU_BATCH = "v5e:1x1", 128
CPU_BATCH, ROUNDS, STEPS = 16, 5, 1
# Published models, and the group counts of successive loops in each stage if they can be sliced:
# as in SReT, about 90 tokens a slice in the first loop of a stage, and no slices of 49 tokens.
MODELS: dict[str, tuple[tuple[int, ...], ...]] = {
    "deit_tiny": ((4, 1),),
    "pit_ti": ((9, 3), (4, 1), (1, 1)),
    "swin_tiny": (),
    "mixer_s16": (),
}
COLUMNS = (
    "model",
    "settings",
    "parameters",
    "GMACs",
    "TPU: bytes an image",
    "CPU: time of a step",
)

Settings = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser(prog="python -m sret_jax.benchmarks.recursion_costs", description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="folder for the figures")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        for form, settings in forms(model).items():
            path = folder / f"{model}_{form}.json"
            if not path.exists():
                make_plan(model, settings, path)
                print(cost_table(folder), flush=True)
        times = folder / f"{model}_cpu.json"
        if not times.exists():
            write_json(epath.Path(times), time_forms(model))
            print(cost_table(folder), flush=True)
    print(cost_table(folder))


def forms(model: str) -> dict[str, Settings]:
    """The forms of a published model that the table compares, by name: settings that replace its.

    "once" is the published model. "twice" has the same blocks and so equal parameters, "half_twice"
    has half of the blocks and so equal FLOPs.
    """
    half = tuple(count // 2 for count in variant(model).settings["blocks"])
    found: dict[str, Settings] = {
        "once": {},
        "twice": {"loops": 2},
        "half_twice": {"blocks": half, "loops": 2},
    }
    if groups := MODELS[model]:
        found["twice_sliced"] = {"loops": 2, "groups": groups}
    return found


def make_plan(model: str, settings: Settings, path: pathlib.Path) -> None:
    """Plans a form for the TPU in a new process."""
    replaced = {"name": model, **settings}
    command = [
        *(sys.executable, "-m", "sret_jax.tools.plan", f"--config={CONFIG}"),
        *(f"--config.model.{key}={value}" for key, value in replaced.items()),
        *(f"--topology={TOPOLOGY}", f"--batch={TPU_BATCH}", f"--json={path}"),
    ]
    status = subprocess.run(command, check=False).returncode
    if not path.exists():
        raise SystemExit(status)


def time_forms(model: str) -> dict[str, dict[str, dict[str, float]]]:
    """Times a train step of each form on CPUs in turn: seconds, and relative to "once"."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    keep_temporaries()
    steps = []
    with tempfile.TemporaryDirectory() as folder:
        for settings in forms(model).values():
            config = copy.deepcopy(get_config(CONFIG))
            config.batch_size = CPU_BATCH
            config.model.update(name=model, dtype="float32", **settings)
            steps.append(open_step(config, epath.Path(folder), train=True))
    once, *others = measure(steps, ROUNDS, STEPS)
    found = {}
    for form, timings in zip(forms(model), (once, *others), strict=True):
        pairs = list(zip(timings, once, strict=True))
        found[form] = {
            "seconds": spread([timing.seconds for timing in timings]),
            "relative": spread([timing.seconds / first.seconds for timing, first in pairs]),
        }
    return found


def cost_table(folder: pathlib.Path) -> str:
    """Formats the figures in a folder as a Markdown table."""
    rows = []
    for model in MODELS:
        times = _read(folder / f"{model}_cpu.json")
        for form, settings in forms(model).items():
            if plan := _read(folder / f"{model}_{form}.json"):
                rows.append((*describe(model, settings), *figures(plan), _time(times, form)))
    return markdown_table(COLUMNS, rows)


def describe(model: str, settings: Settings) -> tuple[str, str]:
    """The name of a form, and the arguments of `create_model` that make it."""
    if not settings:
        return model, "as published"
    which = "half of the blocks, each" if "blocks" in settings else "each block"
    name = f"{model}, {which} twice{', sliced' if 'groups' in settings else ''} (ours)"
    return name, ", ".join(f"`{key}={value}`" for key, value in settings.items())


def figures(plan: dict[str, Any]) -> tuple[str, ...]:
    """The table cells of one plan."""
    return (
        f"{plan['parameters'] / 1e6:.2f} M",
        f"{plan['gmacs_per_image']:.2f}",
        f"{plan['bytes_accessed_per_image'] / 1e9:.3f} GB",
    )


def _time(times: dict[str, Any], form: str) -> str:
    if form not in times:
        return ""
    seconds, relative = times[form]["seconds"]["median"], times[form]["relative"]
    if form == "once":
        return f"{seconds:.2f} s"
    least, largest = relative["least"], relative["largest"]
    return f"{relative['median']:.2f} times ({least:.2f} to {largest:.2f})"


def _read(path: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


if __name__ == "__main__":
    main()
