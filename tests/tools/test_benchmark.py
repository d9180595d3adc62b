"""The command that starts all benchmarks."""

import inspect
import pkgutil

import pytest

from sret_jax.tools import benchmark
from sret_jax.tools.benchmark import BENCHMARKS
from tests.conftest import refusal


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_options_of_a_benchmark_are_the_arguments_of_its_function(name):
    chosen = BENCHMARKS[name]
    function = pkgutil.resolve_name(f"sret_jax.benchmarks.{chosen.function}")
    options = [s.get("dest", flag.lstrip("-")) for flag, s in chosen.options]
    config = ["config"] if chosen.takes_config else []
    assert list(inspect.signature(function).parameters)[: len(config)] == config
    inspect.signature(function).bind(*config, **dict.fromkeys(options), **chosen.arguments)


def test_a_benchmark_without_a_config_takes_no_settings(capsys):
    sentence = refusal(capsys, benchmark.main, "input", "--config.seed=1")
    assert "unknown flag '--config.seed'" in sentence and "--samples" in sentence
