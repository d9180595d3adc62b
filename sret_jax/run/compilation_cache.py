"""Compiled programs kept in the workdir, so that the next start compiles nothing."""

import jax
from etils import epath

COMPILED_FOLDER = "compilation_cache"


def keep_compiled(workdir: epath.Path) -> None:
    """Makes JAX keep every program it compiles in workdir/compilation_cache, and look there first.

    JAX tells programs apart by their text, its version, the devices and, for CPUs, their
    instruction sets. Process 0 writes, all read, and what cannot be written is a warning. A folder
    that the user gave JAX (JAX_COMPILATION_CACHE_DIR) stays the one that is used.

    The entries are machine code, and are run.

    Args:
      workdir: of the run, local or in a bucket; it need not exist yet.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    jax.config.update("jax_compilation_cache_dir", str(workdir / COMPILED_FOLDER))
    # By default JAX leaves out what compiles in under a second; a run has but a few such programs.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
