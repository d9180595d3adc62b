"""Shared by all command lines: bad input ends in one clear sentence and exit status 2."""

import argparse
import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, NoReturn

from absl import app, flags, logging
from etils import epath

from sret_jax import exit_status
from sret_jax.errors import UserError, did_you_mean
from sret_jax.files import absolute, is_name, is_on_hub
from sret_jax.terminal import outlast_readers

# TensorFlow only prepares data here; nobody needs its start-up messages.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


DEFAULT_CONFIG = "quickstart"
PROGRAM = "sret-jax"
CONFIG_FLAGS = (
    "--config=NAME and --config.SETTING=VALUE are those of training: python main.py --help"
)
flags.disclaim_key_flags()  # flags defined here belong to the command that defines them


def program(name: str) -> str:
    """How the user started this command, for its help and messages.

    Args:
      name: name of the command's module in sret_jax.tools.
    """
    started = sys.argv[0]
    if started.startswith(f"{PROGRAM} "):
        return started
    if pathlib.Path(started).name == "main.py":
        return "python main.py"
    return f"python -m sret_jax.tools.{name}"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence and exit status 2."""

    def __init__(self, **settings: Any):
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **settings
        )

    @classmethod
    def of(cls, name: str, doc: str | None, **settings: Any) -> "Parser":
        """The parser of a command.

        Args:
          name: name of the command's module in sret_jax.tools.
          doc: docstring of the module.
          **settings: further arguments of argparse.ArgumentParser.
        """
        return cls(prog=program(name), description=doc, **settings)

    def print_help(self, file: Any = None) -> None:
        if file:
            super().print_help(file)
        else:
            print(self.format_help().rstrip("\n"))

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        outlast_readers()  # `parse_args` calls this, so every command of a parser does
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        return as_started(super().format_help())

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (-?[^\s=]*)", message)
        if unknown and unknown[1].startswith("-"):
            known = re.findall(r"--[\w-]+", self.format_usage())
            fail(f"{self.prog}: {did_you_mean('flag', unknown[1], known)}")
        fail(f"{message} ({self.prog} --help says more)")


def as_started(text: str) -> str:
    """A text in which commands read as the user has started this one."""
    if not sys.argv[0].startswith(f"{PROGRAM} "):
        return text
    text = text.replace("python -m sret_jax.tools.", f"{PROGRAM} ")
    text = text.replace("python main.py", f"{PROGRAM} train").replace("main.py", "train")
    return re.sub(r"pip install -r\s+requirements-(\w+)\.txt", r"pip install 'sret_jax[\1]'", text)


def path_argument(text: str) -> epath.Path:
    """The absolute path that an argument names; the command ends if its bucket is out of reach."""
    with clear_errors():  # argparse would replace the sentence by its own
        return absolute(text)


def weights_argument(text: str) -> epath.Path:
    """What an argument names that `sret_jax.load` reads: a path, or a name here or on the hub."""
    return epath.Path(text) if is_on_hub(text) or is_name(text) else path_argument(text)


def quiet_libraries() -> None:
    """Silences the logs of libraries; their errors contain the same."""
    logging.set_verbosity(logging.FATAL)


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """Turns a UserError into its sentence on stderr and exit status 2."""
    try:
        yield
    except UserError as e:
        fail(str(e))


def fail(sentence: str) -> NoReturn:
    """Prints the sentence on stderr and exits with status 2."""
    print(f"Error: {as_started(sentence)}", file=sys.stderr, flush=True)
    sys.exit(exit_status.BAD_INPUT)


def define_config(values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines --config and its settings."""
    from ml_collections import config_flags

    from sret_jax.config_files import ConfigParser

    holder = config_flags.DEFINE_config_file(
        "config", None, "A config of this package, or the path of one.", flag_values=values
    )
    values["config"].parser = ConfigParser("config")
    flags.set_default(holder, DEFAULT_CONFIG)


def run_app(
    main: Callable[[list[str]], None], define_flags: Callable[[], None], name: str, doc: str
) -> None:
    """Runs a command that uses absl's flags.

    Args:
      main: called after the flags are parsed.
      define_flags: defines the flags.
      name: name of the command's module in sret_jax.tools.
      doc: text that --help prints before the flags.
    """
    outlast_readers()
    if {"--help", "-h"} & set(sys.argv[1:]):  # absl's own --help exits with status 1
        sys.argv[1:] = []
        define_flags()
        print("\n".join([as_started(doc), *_flag_lines()]))
        return
    app.run(main, flags_parser=lambda argv: parse_flags(define_flags, [program(name), *argv[1:]]))


def _flag_lines() -> Iterator[str]:
    """One line for each flag of the command that runs."""
    for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
        default = " Default: " + flag.default_as_str.strip("'") + "." if flag.default_as_str else ""
        yield f"  --{flag.name}: {flag.help}{default}"


def parse_flags(define_flags: Callable[[], None], argv: list[str]) -> list[str]:
    """Defines and parses absl flags and the config that they name; an error exits with status 2.

    Args:
      define_flags: defines the flags.
      argv: the command as the user started it, and its arguments.
    """
    from sret_jax.config_files import cause, config_file

    try:
        config_file(_config_given(argv).partition(":")[0])
        define_flags()  # this already reads the default config and its overrides
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()
    except flags.Error as e:
        fail(f"{cause(e)} ({argv[0]} --help lists the flags)")
    except UserError as e:
        fail(str(e))
    except (AttributeError, KeyError, ValueError, TypeError) as e:
        fail(_unknown_setting(argv) or f"the config cannot be read: {cause(e)}")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; settings are given as --config.NAME=VALUE")
    return rest


def _config_given(argv: list[str]) -> str:
    """The config on a command line with its arguments, or the default config."""
    given = DEFAULT_CONFIG
    for arg, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            given = value if equals else following
    return given


def _unknown_setting(argv: list[str]) -> str | None:
    """A sentence about the first --config.NAME that the config does not have."""
    from sret_jax.config_files import get_config

    try:
        settings = get_config(_config_given(argv)).to_dict()
    except Exception:  # the error is in the config itself
        return None
    known = [".".join(path) for path in _paths(settings)]
    for arg in argv:
        match = re.match(r"--?(?:no)?config\.([\w.]+)", arg)
        if match and match[1] not in known:
            return did_you_mean("config field", match[1], known)
    return None


def _paths(settings: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, value in settings.items():
        yield (name,)
        if isinstance(value, dict):
            yield from ((name, *rest) for rest in _paths(value))
