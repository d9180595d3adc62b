"""What every command line shares: bad input ends in one clear sentence and exit status 2."""

import contextlib
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterator
from itertools import zip_longest
from typing import Any, NoReturn

from absl import flags, logging

from sret_jax import exit_status
from sret_jax.errors import UserError, did_you_mean

# TensorFlow only prepares data here; its start-up messages help nobody.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


DEFAULT_CONFIG = "configs/quickstart.py"


def quiet_libraries() -> None:
    """Silences what the libraries log; what they raise says it too."""
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
    print(f"Error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(exit_status.BAD_INPUT)


def parse_flags(define_flags: Callable[[], None], argv: list[str]) -> list[str]:
    """Defines and parses absl flags and the config they name; a mistake exits with status 2."""
    try:
        define_flags()  # already reads the default config and its overrides
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()
    except flags.Error as e:
        fail(f"{_cause(e)} (python main.py --help lists the flags)")
    except OSError:
        fail(f"there is no config file {_config_file(argv)[0]!r}; give one of configs/*.py")
    except (AttributeError, KeyError, ValueError, TypeError) as e:
        fail(_unknown_setting(argv) or f"the config cannot be read: {_cause(e)}")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; settings are given as --config.NAME=VALUE")
    return rest


def _cause(error: Exception) -> str:
    """The last line of a message, which may hold a config file's whole traceback."""
    lines = str(error).strip().splitlines()
    cause = re.sub(r"^\w+Error: ", "", lines[-1]) if lines else repr(error)
    if "get_config() takes" in cause:
        return "this config takes no arguments after a colon"
    return cause


def _config_file(argv: list[str]) -> list[str]:
    """File and arguments of the config on a command line, or of the default one."""
    given = DEFAULT_CONFIG
    for arg, following in zip_longest(argv, argv[1:], fillvalue=""):
        name, equals, value = arg.partition("=")
        if name in ("-config", "--config"):
            given = value if equals else following
    return given.split(":", 1)


def _unknown_setting(argv: list[str]) -> str | None:
    """The sentence on the first --config.NAME that the config does not have."""
    file, *args = _config_file(argv)
    try:
        settings = runpy.run_path(file)["get_config"](*args).to_dict()
    except Exception:  # the config itself is at fault
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
