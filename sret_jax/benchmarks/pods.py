"""Makes the table of docs/planning.md: the published models on commonly rented slices.

python -m sret_jax.benchmarks.pods --folder=DIR

Each plan is a JSON file in the folder and is made once, so an interrupted command continues where
it was. The table so far is printed after each plan. Twelve compilations take about an hour.
"""

import json
import pathlib
import subprocess
import sys
from typing import Any

from sret_jax.cli import Parser
from sret_jax.text import markdown_table

CONFIGS = ("sret_t", "sret_lt", "sret_s")
SLICES = ("v4-32", "v5e-256", "v5p-64", "v6e-256")
COLUMNS = (
    "model",
    "slice",
    "chips",
    "images a chip",
    "memory a chip",
    "bytes an image",
    "reduced a step",
    "step",
    "images/s a chip",
    "300 epochs at peak",
)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    parser = Parser(prog="python -m sret_jax.benchmarks.pods", description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="folder for the plans")
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    for config in CONFIGS:
        for slice_name in SLICES:
            path = folder / f"{config}_{slice_name}.json"
            if not path.exists():
                make_plan(config, slice_name, path)
                print(plan_table(folder), flush=True)
    print(plan_table(folder))


def make_plan(config: str, slice_name: str, path: pathlib.Path) -> None:
    """Makes a plan in a new process; status 1 (it does not fit) is a result too."""
    command = [
        *(sys.executable, "-m", "sret_jax.tools.plan", f"--config={config}"),
        *(f"--topology={slice_name}", f"--json={path}"),
    ]
    status = subprocess.run(command, check=False).returncode
    if not path.exists():
        raise SystemExit(status)


def plan_table(folder: pathlib.Path) -> str:
    """Formats the plans in a folder as a Markdown table."""
    rows = []
    for config in CONFIGS:
        for slice_name in SLICES:
            path = folder / f"{config}_{slice_name}.json"
            if path.exists():
                report = json.loads(path.read_text(encoding="utf-8"))
                rows.append((config, slice_name, *figures(report)))
    return markdown_table(COLUMNS, rows)


def figures(report: dict[str, Any]) -> tuple[str, ...]:
    """The table cells of one plan."""
    chips = report["chips"]
    images = f"{report['batch_size'] // chips:,}"
    memory = (
        f"{report['memory_needed'] / 2**30:.2f} of {report['memory_available'] / 2**30:.2f} GiB"
    )
    if not report["fits"]:
        return (f"{chips:,}", images, f"{memory}: does not fit", *"-----")
    estimate = report["estimate"]
    reduced = sum(collective["bytes"] for collective in report["collectives"])
    return (
        f"{chips:,}",
        images,
        memory,
        f"{report['bytes_accessed_per_image'] / 1e9:.2f} GB",
        f"{reduced / 1e6:.0f} MB",
        f"{1000 * estimate['step_seconds']:.2f} ms",
        f"{estimate['images_per_second_per_chip']:,.0f}",
        f"{estimate['hours']:.2f} h",
    )


if __name__ == "__main__":
    main()
