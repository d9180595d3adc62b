"""The commands of this package: sret-jax COMMAND ..., or python -m sret_jax COMMAND ..."""

import ast
import importlib.resources
import pathlib
import runpy
import sys

from sret_jax import __version__
from sret_jax.cli import PROGRAM, fail
from sret_jax.errors import did_you_mean
from sret_jax.terminal import outlast_readers

EVAL = "eval"  # runs training with --mode=eval
EVAL_LINE = "Evaluates the checkpoint of a run, or converted weights."
# In the order of their use. Except for `eval`, each is a module of sret_jax.tools.
COMMANDS = (
    "train",
    EVAL,
    "predict",
    "export",
    "models",
    "prepare",
    "convert",
    "recur",
    "unroll",
    "show_batch",
    "soft_labels",
    "plan",
    "launch",
    "benchmark",
    "compare",
    "study",
    "anytime",
    "depth",
    "landscape",
)


def main() -> None:
    """Runs the command named first, with the arguments that follow."""
    outlast_readers()
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(commands_help())
    elif name == "--version":
        print(f"{PROGRAM} {__version__}")
    elif name not in COMMANDS:
        fail(did_you_mean("command", name, COMMANDS))
    else:
        # Commands read sys.argv; its first word is their name in help and messages.
        mode = ["--mode=eval"] if name == EVAL else []
        sys.argv = [f"{PROGRAM} {name}", *mode, *arguments]
        sys.path.append(str(pathlib.Path.cwd()))  # modules of the user's own, as with python -m
        runpy.run_module(f"sret_jax.tools.{module(name)}", run_name="__main__")


def module(command: str) -> str:
    """The module of sret_jax.tools that runs a command."""
    return "train" if command == EVAL else command


def commands_help() -> str:
    """Lists the commands with one line each, the first line of the module's docstring."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {_line(name)}" for name in COMMANDS]
    return "\n".join(
        [
            f"{PROGRAM} COMMAND ARGUMENTS, where COMMAND is one of:",
            *lines,
            f"{PROGRAM} COMMAND --help lists its arguments, {PROGRAM} --version says the version.",
        ]
    )


def _line(command: str) -> str:
    """The first line about a command. Its module is not imported, which would take seconds."""
    if command == EVAL:
        return EVAL_LINE
    file = importlib.resources.files("sret_jax") / "tools" / f"{command}.py"
    doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    return (doc or "").partition("\n")[0]


if __name__ == "__main__":
    main()
