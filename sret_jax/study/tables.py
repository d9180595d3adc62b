"""The tables of a study, drawn from the evidence of its runs alone: nothing is trained."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from etils import epath

from sret_jax.errors import few
from sret_jax.study.design import Claim, Study
from sret_jax.study.records import Record, Records, Times, deviations, read_records, read_times
from sret_jax.text import markdown_table

CONFIDENCE = 0.95
NO_PICTURES: Mapping[str, str] = MappingProxyType({})
HEADINGS = (
    *("arm", "parameters", "MMACs", "train step", "runs", "top-1 (%)"),
    *("difference (95% interval)", "verdict"),
)
MISSING = "-"
RULES = """\
- **top-1** is that of the moving average (EMA) of the weights after the last step, never of the
  best step: mean ± standard deviation over seeds, in percent of the test images.
- **Difference**: to the baseline, which is the last arm in bold above. Runs with the same seed are
  subtracted; the table has the mean of these differences, its 95% interval by the paired t-test,
  and the number n of seeds that both arms have.
- **Verdict**: *better* or *worse* if that interval excludes 0, else *no difference seen*. It is not
  corrected for the number of comparisons.
- **train step**: time of a step on a batch of synthetic images, measured apart from the runs: that
  of the baseline, and those of others as a multiple of it (least to largest of the rounds, in which
  the arms take turns)."""


class Difference(NamedTuple):
    """The paired difference of two arms in percentage points.

    Attributes:
      mean: mean over the seeds that both have; nan: they share none.
      low, high: its 95% interval; nan with fewer than two seeds.
      seeds: number of seeds that both have.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def verdict(self) -> str:
        """Better or worse if the interval excludes 0."""
        if math.isnan(self.low):
            return MISSING
        if self.low > 0 or self.high < 0:
            return "better" if self.mean > 0 else "worse"
        return "no difference seen"


def compare(records: Mapping[int, Record], baseline: Mapping[int, Record]) -> Difference:
    """Compares the runs of two arms with the same seeds by a paired t-test."""
    from scipy import stats  # imported here, because it takes a second

    seeds = sorted(records.keys() & baseline.keys())
    if not seeds:
        return Difference(math.nan, math.nan, math.nan, 0)
    ours, theirs = ([runs[seed].top1 for seed in seeds] for runs in (records, baseline))
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    mean = statistics.mean(differences)
    if len(seeds) < 2:
        return Difference(mean, math.nan, math.nan, 1)
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(seeds) - 1) * stats.sem(differences)
    return Difference(mean, mean - half, mean + half, len(seeds))


def claim_table(claim: Claim, records: Records, times: Times) -> str:
    """The table of a claim in Markdown: its title, what is published, a row for each arm."""
    rows = [_row(arm, records, times, group[0]) for group in claim.groups for arm in group]
    return "\n\n".join(
        [
            f"### {claim.title}",
            f"{miniature(records, claim.arms)} The paper: {claim.published}.",
            markdown_table(HEADINGS, rows),
        ]
    )


def miniature(records: Records, arms: Iterable[str]) -> str:
    """The sentence that stands over every table: the images and the size of the models."""
    runs = [run for arm in arms for run in records[arm].values()]
    if not runs:
        return "Not trained yet."
    data = sorted({run.result["data"] for run in runs})
    pixels = sorted({run.config["model"]["image_size"] for run in runs})
    size = " and ".join(map(str, pixels))
    return f"**Miniature: {' and '.join(data)}, {size} pixels, small models.**"


def _row(arm: str, records: Records, times: Times, baseline: str) -> list[str]:
    """A row of the table; the baseline is in bold and compared with nothing."""
    runs = records.get(arm, {})
    name = f"**`{arm}`**" if arm == baseline else f"`{arm}`"
    if not runs:
        return [name, *[MISSING] * (len(HEADINGS) - 2), "not trained"]
    first = next(iter(runs.values())).result
    cells = [
        name,
        f"{first['parameters']:,}",
        f"{first['macs'] / 1e6:.2f}",
        _time(times.get(baseline, {}).get("arms", {}), arm, baseline),
        str(len(runs)),
        spread([run.top1 for run in runs.values()]),
    ]
    if arm == baseline:
        return [*cells, "", ""]
    difference = compare(runs, records.get(baseline, {}))
    return [*cells, _in_words(difference), difference.verdict]


def _time(arms: Mapping[str, Any], arm: str, baseline: str) -> str:
    """The time of an arm's step, as the table has it."""
    if arm not in arms:
        return MISSING
    if arm == baseline:
        return f"{1000 * arms[arm]['seconds']['median']:.0f} ms"
    ratio = arms[arm]["relative"]
    return f"{ratio['median']:.2f} times ({ratio['least']:.2f} to {ratio['largest']:.2f})"


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation, the latter of at least two values."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def _in_words(difference: Difference) -> str:
    if not difference.seeds:
        return MISSING
    if difference.seeds == 1:
        return f"{difference.mean:+.2f} (one seed)"
    mean, low, high, seeds = difference
    return f"{mean:+.2f} ({low:+.2f} to {high:+.2f}, n = {seeds})"


def conditions(records: Records) -> list[str]:
    """Sentences on the images, the machine and the time of all runs."""
    runs = [run for by_seed in records.values() for run in by_seed.values()]
    if not runs:
        return ["No run has finished yet."]
    images = {
        f"{run.result['images']['train']['images']:,} training and "
        f"{run.result['images']['eval']['images']:,} test images"
        for run in runs
        if run.result["images"]
    }
    machines = {_machine(run.result) for run in runs if run.result["machine"]}
    hours = sum(run.result["wall_seconds"] or 0 for run in runs) / 3600
    return [
        f"{miniature(records, records)} There are {'; '.join(sorted(images))}. What holds for "
        "other images or larger models is not shown here.",
        f"{len(runs)} runs, {hours:.1f} hours in all: {'; '.join(sorted(machines))}.",
    ]


def _machine(result: Mapping[str, Any]) -> str:
    """The machine of a run, from its result.json."""
    machine, devices = result["machine"], result.get("devices") or "cpu"
    cores, at_once = machine["cores"], machine["runs_at_once"]
    each = f"on {cores} core{'' if cores == 1 else 's'} of {machine['processor']}"
    if not devices.endswith("cpu"):
        each = f"on {devices}"
    runs = f"one run at a time {each}" if at_once == 1 else f"{at_once} runs at once, each {each}"
    return f"{runs}, jax {machine['jax']}"


def _timed(times: Times) -> list[str]:
    """A sentence on the machine that the times are of."""
    machines = {
        f"{group['processor'] if group['devices'].endswith('cpu') else group['devices']} "
        f"({group['cores']} core{'' if group['cores'] == 1 else 's'}, load {group['load']})"
        for group in times.values()
    }
    return [f"Train steps were timed on {'; '.join(sorted(machines))}."] if machines else []


def report(study: Study, results: epath.Path, pictures: Mapping[str, str] = NO_PICTURES) -> str:
    """All tables of a study in Markdown.

    Args:
      study: the study.
      results: folder of the evidence.
      pictures: paths of pictures, by the claim under whose table they stand.

    Raises:
      UserError: evidence is damaged.
    """
    records, times = read_records(results, study.arms), read_times(study, results)
    warnings = []
    if differing := deviations(study, records):
        warnings = [
            f"**{len(differing)} runs have other settings than {study.config} has now**, so their "
            f"figures may not be comparable: {few(differing)}."
        ]
    return "\n\n".join(
        [
            *conditions(records),
            *_timed(times),
            *warnings,
            RULES,
            *(
                claim_table(claim, records, times)
                + (f"\n\n![{claim.title}]({pictures[name]})" if name in pictures else "")
                for name, claim in study.claims.items()
            ),
        ]
    )
