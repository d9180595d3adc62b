"""What every command line shares: bad input ends in one clear sentence and exit status 2."""

import contextlib
import re
import sys
from collections.abc import Iterator
from typing import NoReturn

from absl import flags

from sret_jax.errors import UserError


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


def parse_flags(argv: list[str]) -> list[str]:
    """Parses absl flags and the config they name; a mistake exits with status 2."""
    try:
        rest = flags.FLAGS(argv)
        missing = f"no config file {flags.FLAGS['config'].value!r}"
        flags.FLAGS.config.to_dict()
    except flags.Error as e:
        fail(f"{e} (python main.py --help lists the flags)")
    except FileNotFoundError as e:
        fail(f"{e}; give --config=configs/NAME.py")
    except (AttributeError, KeyError) as e:
        fail(_unknown_field(str(e)))
    except (ValueError, TypeError) as e:
        fail(f"the config cannot be read: {e}")
    del missing
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; settings are given as --config.NAME=VALUE")
    return rest


def _unknown_field(message: str) -> str:
    quoted = re.findall(r"""["']([\w.]+)\\?["']""", message)
    if len(quoted) < 2:
        return f"unknown config field: {' '.join(message.split())}"
    return f"unknown config field {quoted[0]!r}; did you mean {quoted[1]!r}?"
