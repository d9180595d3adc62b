"""Stores compiled programs in the workdir, so that the next start compiles nothing."""

import jax
from etils import epath

COMPILED_FOLDER = "compilation_cache"


def keep_compiled(workdir: epath.Path) -> None:
    """Makes JAX store every program it compiles in workdir/compilation_cache, and look there first.

    JAX identifies programs by their text, its version, the devices and, for CPUs, their
    instruction sets. Process 0 writes, all processes read; a failed write is a warning. If the
    user gave JAX a folder (JAX_COMPILATION_CACHE_DIR), that folder is used instead.

    The entries are machine code that will be executed.

    Args:
      workdir: folder of the run, local or in a bucket; it need not exist yet.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir / COMPILED_FOLDER))
    # By default JAX omits programs that compile in under a second; a run has only a few of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
