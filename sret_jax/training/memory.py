"""Memory that does not suffice, as a sentence."""

import contextlib
from collections.abc import Iterator

import jax

from sret_jax.errors import UserError


@contextlib.contextmanager
def fits_memory(otherwise: str) -> Iterator[None]:
    """Raises UserError(otherwise) where the enclosed code asks for more memory than there is."""
    try:
        yield
    except MemoryError as e:
        raise UserError(otherwise) from e
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        raise UserError(otherwise) from e
