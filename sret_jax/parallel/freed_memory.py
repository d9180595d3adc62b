"""Tells glibc not to return freed memory to the kernel.

Otherwise the kernel must fault in and zero every page when the process allocates it again.
"""

import ctypes
import sys

import jax

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
NEVER = -1
LARGEST_BUFFER = 32 << 20  # bytes; no buffer from which a batch is built is larger


def keep_buffers() -> None:
    """Keeps freed blocks of up to LARGEST_BUFFER bytes, such as those that images are decoded into.

    Without it, page faults take a tenth of the input pipeline's time.
    """
    _set_malloc({M_MMAP_THRESHOLD: LARGEST_BUFFER, M_TRIM_THRESHOLD: NEVER})


def keep_temporaries() -> None:
    """Keeps freed blocks of any size if steps run on CPUs, for the next step's temporaries.

    XLA allocates a step's temporaries as one block (130 MB per image in training sret_t), and frees
    it after the step. With this the process always occupies its peak memory, and up to a few such
    blocks more if small allocations lie between them.

    Call it before JAX has started its backend; later calls do not affect the temporaries.
    """
    # In threads with their own arenas glibc always asks the kernel for large blocks.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if jax.default_backend() == "cpu":
        _set_malloc({M_MMAP_MAX: 0, M_TRIM_THRESHOLD: NEVER})


def _set_malloc(options: dict[int, int]) -> None:
    """Sets options of glibc's malloc for the whole process; does nothing in other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, value in options.items():
            mallopt(option, value)
