"""A run's compiled programs are loaded at the next start."""

import jax
import pytest
from etils import epath

from sret_jax.run.compilation_cache import COMPILED_FOLDER, keep_compiled
from tests.conftest import TINY_FLAGS, run_python

EVENTS = """
import sys
import jax
from etils import epath
from sret_jax.run.compilation_cache import keep_compiled
jax.monitoring.register_event_listener(lambda event, **_: print(event))
keep_compiled(epath.Path(sys.argv[1]))
jax.jit(lambda x: x + 1)(1)
"""


@pytest.fixture
def no_given_folder(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")


def test_a_small_program_is_kept_too(tmp_path, no_given_folder):
    first, second = (run_python("-c", EVENTS, str(tmp_path)).stdout for _ in range(2))
    assert "cache_misses" in first and "cache_hits" not in first
    assert "cache_hits" in second and "cache_misses" not in second


@pytest.mark.slow  # three whole runs
def test_a_second_start_and_an_evaluation_compile_nothing(
    tmp_path, digits_dir, no_given_folder, monkeypatch
):
    monkeypatch.setenv("JAX_DEBUG_LOG_MODULES", "jax._src.compiler")
    flags = (f"--workdir={tmp_path}", f"--config.data.data_dir={digits_dir}", *TINY_FLAGS)

    def programs(*more):
        done = run_python("main.py", *flags, *more)
        assert done.returncode == 0, done.stderr
        return done.stderr, {path.name for path in (tmp_path / COMPILED_FOLDER).iterdir()}

    log, compiled = programs("--config.stop_at_step=1")
    assert "CACHE MISS for 'jit_train_step'" in log
    for again in (["--config.stop_at_step=2"], ["--mode=eval"]):
        log, now = programs(*again)
        assert "cache hit for 'jit_eval_step'" in log and "CACHE MISS" not in log
        assert now == compiled


def test_a_folder_the_user_gave_jax_stays():
    given = jax.config.jax_compilation_cache_dir
    assert given
    keep_compiled(epath.Path("elsewhere"))
    assert jax.config.jax_compilation_cache_dir == given
