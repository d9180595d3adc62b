"""Memory that a step freed is used by the next step."""

import sys

import pytest

from tests.conftest import run_python

STEPS = """
import contextlib, resource, sys
import jax, jax.numpy as jnp
from sret_jax.parallel.freed_memory import keep_temporaries
from sret_jax.tools import benchmark
if sys.argv[1] == "keep":
    keep_temporaries()
elif sys.argv[1] != "leave":
    with contextlib.suppress(SystemExit):  # of no rounds it complains after it has set memory up
        benchmark.main([sys.argv[1], "--config=configs/quickstart.py", "--rounds=0"])
step = jax.jit(lambda x: jnp.exp(x @ x.T) @ x)  # 64 MB of temporaries: 16,384 pages
x = jnp.ones((4096, 8))
for _ in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    step(x).block_until_ready()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(choice):
    done = run_python("-c", STEPS, choice, devices=1)
    assert done.returncode == 0, done.stderr
    return sorted(map(int, done.stdout.split()))


@pytest.fixture(scope="module")
def faults_of_left_memory():
    return page_faults("leave")[0]


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such options")
@pytest.mark.parametrize(
    "choice",
    ["keep", "train", *(pytest.param(c, marks=pytest.mark.slow) for c in ("products", "slicing"))],
)
def test_steps_find_the_temporaries_of_the_last_one(choice, faults_of_left_memory):
    def keeps():
        faults = page_faults(choice)  # the first steps still cut up what was freed
        return faults[len(faults) // 2] < faults_of_left_memory / 10

    # If another thread holds the heap at the wrong moment, glibc allocates elsewhere.
    assert any(keeps() for _ in range(3))
