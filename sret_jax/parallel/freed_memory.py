"""Memory that a process frees and soon asks for again: glibc can keep it.

Else it goes back to the kernel, and every page of it must be faulted in, zeroed, the next time.
"""

import ctypes
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
NEVER = -1
LARGEST_BUFFER = 32 << 20  # bytes of what a batch in the making consists of


def keep_buffers() -> None:
    """Keeps freed blocks of up to LARGEST_BUFFER bytes, such as images are decoded into.

    Faulting them in again costs a tenth of the input pipeline's time.
    """
    _set_malloc({M_MMAP_THRESHOLD: LARGEST_BUFFER, M_TRIM_THRESHOLD: NEVER})


def keep_temporaries() -> None:
    """Keeps freed blocks of any size where steps run on CPUs, for the temporaries of the next one.

    XLA allocates a step's temporaries as one block, 130 MB an image in training sret_t, and frees
    it at the end. The process then holds at all times what it held at its peak, and up to a few
    such blocks where small ones have settled between them.

    Call it before JAX has started its backend; later it does not reach the temporaries.
    """
    # Of the threads' own arenas glibc takes large blocks from the kernel in any case.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu":
        _set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER})


def _set_malloc(options: dict[int, int]) -> None:
    """Sets options of glibc's malloc for the whole process; other C libraries know none."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)
