"""Which room may import which: imports run one way, without circles."""

import ast
import graphlib
import pathlib
import re
from xml.etree import ElementTree

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "sret_jax"

# Each room, and the rooms that it may import. Every room may import the files of TOP.
# Rooms stand below those that import them.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "parallel": (),
    "models": (),
    "data": ("parallel",),
    "settings": ("models",),
    "checkpoints": ("parallel",),
    "weights": ("models", "settings", "checkpoints", "parallel", "data"),
    "distillation": ("models", "data", "settings", "checkpoints", "weights", "parallel"),
    "training": (
        "models",
        "data",
        "settings",
        "checkpoints",
        "weights",
        "distillation",
        "parallel",
    ),
    "evaluation": ("models", "data", "settings", "checkpoints", "weights", "training", "parallel"),
    "run": (
        *("models", "data", "settings", "checkpoints", "weights", "distillation"),
        *("training", "evaluation", "parallel"),
    ),
    "planning": ("models", "data", "settings", "training", "parallel"),
    "benchmarks": (
        *("models", "data", "settings", "checkpoints", "weights", "distillation"),
        *("training", "evaluation", "run", "planning", "parallel"),
    ),
    "study": ("models", "settings", "run"),
    "tools": (
        *("models", "data", "settings", "checkpoints", "weights", "distillation"),
        *("training", "evaluation", "run", "planning", "benchmarks", "study", "parallel"),
    ),
}
TOP = {"errors", "exit_status", "files", "picture", "terminal", "text"}
COMMAND_LINE = {"cli", "config_files"}  # for the files that read arguments


def imported(file: pathlib.Path) -> set[str]:
    """The rooms and top-level files that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("sret_jax.")}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_what_its_row_of_the_table_allows(room):
    allowed = {*MAY_IMPORT[room], room, *TOP}
    if room in ("tools", "benchmarks", "study"):
        allowed |= COMMAND_LINE
    for file in sorted((PACKAGE / room).rglob("*.py")):
        assert imported(file) <= allowed, file


def test_the_table_has_every_room_and_no_circle():
    folders = {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()}
    assert set(MAY_IMPORT) == folders
    list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())  # raises at a circle


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_readme_of_a_room_says_what_it_may_import(room):
    (line,) = re.findall("^May import: (.*)$", (PACKAGE / room / "README.md").read_text(), re.M)
    assert re.findall("`([a-z]+)`", line) == list(MAY_IMPORT[room])


def test_files_at_the_top_import_no_room():
    for name in TOP | COMMAND_LINE:
        assert imported(PACKAGE / f"{name}.py") <= TOP | COMMAND_LINE, name


def test_the_picture_draws_each_room_above_those_that_it_may_import():
    picture = ElementTree.parse(ROOT / "docs/rooms.svg")
    boxes = {box.get("id"): box for box in picture.iter("{http://www.w3.org/2000/svg}rect")}
    for room, below in MAY_IMPORT.items():
        bottom = float(boxes[room].get("y")) + float(boxes[room].get("height"))
        assert all(float(boxes[other].get("y")) >= bottom for other in below), room
