"""What every command line shares: bad input ends in one clear sentence and exit status 2."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import NoReturn

from absl import flags, logging

from sret_jax.errors import UserError

# TensorFlow only prepares data and writes event files here; its start-up messages help nobody.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def quiet_libraries() -> None:
    """Leaves only the errors of what the libraries log."""
    logging.set_verbosity(logging.ERROR)


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
    sys.exit(2)


def parse_flags(define_flags: Callable[[], None], argv: list[str]) -> list[str]:
    """Defines and parses absl flags and the config they name; a mistake exits with status 2."""
    try:
        define_flags()  # already reads the default config and its overrides
        rest = flags.FLAGS(argv)
        flags.FLAGS.config.to_dict()
    except flags.Error as e:
        fail(f"{_cause(e)} (python main.py --help lists the flags)")
    except (AttributeError, KeyError) as e:
        fail(_unknown_field(str(e)))
    except OSError:
        (file,) = [a.partition("=")[2] for a in argv if a.startswith("--config=")][-1:] or [""]
        fail(f"there is no config file {file.partition(':')[0]!r}; give one of configs/*.py")
    except (ValueError, TypeError) as e:
        fail(f"the config cannot be read: {_cause(e)}")
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; settings are given as --config.NAME=VALUE")
    return rest


def _cause(error: Exception) -> str:
    """The last line of a message, which may hold a config file's whole traceback."""
    lines = str(error).strip().splitlines()
    return re.sub(r"^\w+Error: ", "", lines[-1]) if lines else repr(error)


def _unknown_field(message: str) -> str:
    quoted = re.findall(r"""["']([\w.]+)\\?["']""", message)
    if len(quoted) < 2:
        return f"unknown config field: {' '.join(message.split())}"
    return f"unknown config field {quoted[0]!r}; did you mean {quoted[1]!r}?"
