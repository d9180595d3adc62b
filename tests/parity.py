"""Makes the table of docs/models.md that compares each family with its published implementation.

python -m tests.parity

The differences are those that tests in tests/models assert to be small, of small models with random
weights. Parameters and GMACs are those of the published models.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from unittest import mock

import numpy as np

from sret_jax.models.flops import model_macs
from sret_jax.models.registry import create_model, family_of, variant
from sret_jax.text import markdown_table
from tests import golden, timm_models
from tests.models import test_golden
from tests.models.families import test_deit, test_mixer, test_pit, test_swin

TESTS: dict[str, Callable[[], None]] = {
    "deit_tiny": functools.partial(test_deit.test_a_tiny_deit_is_that_of_timm, "deit_tiny"),
    "deit_tiny_distilled": functools.partial(
        test_deit.test_a_tiny_deit_is_that_of_timm, "deit_tiny_distilled"
    ),
    "pit_ti_distilled": test_pit.test_a_tiny_distilled_pit_is_that_of_timm,
    "swin_tiny": test_swin.test_a_tiny_swin_is_that_of_timm,
    "mixer_s16": test_mixer.test_the_untied_form_is_timms_function,
}
HEADINGS = (
    *("model", "family", "reference", "logits, float32", "logits, float64"),
    *("gradients, float64", "parameters", "GMACs: ours, the reference's", "to torch and back"),
)


class Differences:
    """The largest differences that comparisons have found, relative to each largest entry."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], float] = defaultdict(float)

    def record(self, ours, published, what, least=0.0) -> None:
        """Records what `assert_close` would assert to be small."""
        kind = "logits" if what.startswith("logits") else "gradients"
        scale = max(np.abs(published).max(), least)
        difference = float(np.abs(np.asarray(ours) - published).max() / scale)
        key = kind, str(published.dtype)
        self._found[key] = max(self._found[key], difference)

    def cells(self) -> tuple[str, ...]:
        """The differences of logits in both dtypes, and of gradients in float64."""
        kinds = (("logits", "float32"), ("logits", "float64"), ("gradients", "float64"))
        return tuple(f"{self._found[kind]:.0e}" for kind in kinds)


def main() -> None:
    """Prints the table."""
    rows = [of_golden(), *(of_timm(name, test) for name, test in TESTS.items())]
    print(markdown_table(HEADINGS, rows))


def of_timm(name: str, test: Callable[[], None]) -> tuple[str, ...]:
    """The row of a model whose reference is timm's; the test calls `check_parity`."""
    found = Differences()
    with mock.patch.object(timm_models, "assert_close", found.record):
        test()
    theirs = variant(name).timm or variant(name).hub.partition(".")[0]
    parameters = sum(p.numel() for p in timm_models.import_timm().create_model(theirs).parameters())
    return row(name, f"timm's `{theirs}`", found, parameters, timm_models.macs(theirs) / 1e9)


def of_golden() -> tuple[str, ...]:
    """SReT's row: the numbers of the published implementation in tests/data."""
    found = Differences()

    def record(ours, published, dtype, err_msg="logits"):
        del dtype
        if not err_msg.startswith("after/"):  # statistics of BatchNorm
            found.record(ours, np.asarray(published), err_msg.partition("/")[2] or err_msg)

    with mock.patch.object(test_golden, "assert_close", record):
        test_golden.check_logits("tiny_sliced", "float32", golden.ARRAYS)
        test_golden.test_logits_in_float64_are_the_published_ones("tiny_sliced")
        test_golden.test_training_mode_logits_gradients_and_statistics_are_the_published_ones(
            "tiny_sliced", "float64"
        )
    parameters = golden.MODELS["sret_t"]["num_params"]
    return row("sret_t", "github.com/szq0214/SReT", found, parameters, 1.112)


def row(name: str, reference: str, found: Differences, parameters: int, gmacs: float):
    """A row of the table, given the figures of the reference."""
    model = create_model(name)
    ours = timm_models.parameters(model)
    same = f"{ours:,}" if ours == parameters else f"{ours:,} instead of {parameters:,}"
    counted = f"{model_macs(model) / 1e9:.3f}, {gmacs:.3f}"
    return name, family_of(name).__name__, reference, *found.cells(), same, counted, "equal"


if __name__ == "__main__":
    main()
