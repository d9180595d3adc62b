"""What a step freed serves the next one."""

import sys

import pytest

from tests.conftest import run_python

STEPS = """
import resource, sys
import jax, jax.numpy as jnp
from sret_jax.parallel.freed_memory import keep_temporaries
if sys.argv[1] == "keep":
    keep_temporaries()
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


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries have no such options")
def test_steps_find_the_temporaries_of_the_last_one():
    (least, *_), kept = page_faults("leave"), page_faults("keep")
    assert kept[len(kept) // 2] < least / 10  # the first steps still cut up what was freed
