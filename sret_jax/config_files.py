"""The configs of this package, and how NAME[:ARGUMENTS] or PATH[:ARGUMENTS] selects one."""

import ast
import importlib.resources
import os
import pathlib
import re

from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from sret_jax.errors import UserError, did_you_mean

COMMON = "common"  # shared by all configs, not an experiment itself
NONE = "no arguments"


class ConfigParser(config_flags.ConfigFileFlagParser):
    """Parses the value of --config: the name of a config of this package, or a file's path."""

    def parse(self, config: str) -> ConfigDict:
        file, colon, arguments = config.partition(":")
        return super().parse(f"{config_file(file)}{colon}{arguments}")


def get_config(config: str) -> ConfigDict:
    """The settings that --config=CONFIG selects.

    Args:
      config: name of a config of this package, or path of a file with a function `get_config`;
        arguments follow a colon: "quickstart", "finetune:sliced", "./mine.py:res=384".

    Raises:
      UserError: there is no such config, or it does not take these arguments.
    """
    config_file(config.partition(":")[0])  # raises a clear error if there is no such config
    try:
        return ConfigParser("config").parse(config)
    except (TypeError, ValueError) as e:
        raise UserError(f"the config {config!r} cannot be read: {cause(e)}") from e


def config_file(name: str) -> str:
    """Finds the file of a config.

    Args:
      name: name of a config of this package; with a slash or the ending .py, the path of a file.

    Raises:
      UserError: there is no such file.
    """
    if os.sep not in name and not name.endswith(".py"):
        if name not in config_names():
            raise UserError(
                f"{did_you_mean('config', name, config_names())}; or give a file's path"
            )
        return str(_folder() / f"{name}.py")
    if pathlib.Path(name).is_file():
        return name
    stem = pathlib.Path(name).stem
    ours = f"--config={stem}" if stem in config_names() else f"one of {', '.join(config_names())}"
    raise UserError(f"there is no config file {name!r}; sret_jax has {ours}")


def config_names() -> list[str]:
    """The names of the configs of this package."""
    return sorted(file.stem for file in _folder().glob("*.py") if file.stem != COMMON)


def configs_help() -> str:
    """Help on --config: each config with its arguments, and where the settings are listed."""
    names: dict[str, list[str]] = {}
    for name in config_names():
        names.setdefault(_arguments(_folder() / f"{name}.py"), []).append(name)
    lines = [f"  {', '.join(group)}: {arguments}" for arguments, group in names.items()]
    common = (_folder() / f"{COMMON}.py").resolve()
    here = pathlib.Path.cwd()
    return "\n".join(
        [
            "--config=NAME:ARGUMENTS takes one of these, its arguments separated by commas:",
            *lines,
            "or the path of a file of your own. --config.SETTING=VALUE changes one of the settings",
            f"of {common.relative_to(here) if common.is_relative_to(here) else common}.",
        ]
    )


def cause(error: Exception) -> str:
    """The last line of a message, which may contain the whole traceback of a config file."""
    lines = str(error).strip().splitlines()
    last = re.sub(r"^\w+Error: ", "", lines[-1]) if lines else repr(error)
    if "get_config() takes" in last:
        return "this config takes no arguments after a colon"
    return last


def _folder() -> pathlib.Path:
    return pathlib.Path(str(importlib.resources.files("sret_jax"))) / "configs"


def _arguments(file: pathlib.Path) -> str:
    """The text on arguments in the docstring of a file's `get_config`; the file is not run."""
    for function in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(function, ast.FunctionDef) and function.name == "get_config":
            line = (ast.get_docstring(function) or "").splitlines()[0]
            return re.sub(r"^Arguments?: |\.$", "", line) if line.startswith("Argument") else NONE
    return NONE
