"""Measures the cost of stored soft labels: train step and loader with and without them."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sret_jax.benchmarks.photographs import Photographs, make_photographs
from sret_jax.benchmarks.speed_benchmark import check_counts, measure, spread
from sret_jax.data.loader import Loader, train_transform
from sret_jax.data.sources.source import Source
from sret_jax.data.views.crops import draw_views
from sret_jax.distillation.label_manifest import Manifest, TeacherFacts
from sret_jax.distillation.label_writing import most_probable, pack, write_store
from sret_jax.distillation.stored_labels import UNCHANGED, crop_law, data_facts, stored_labels
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.models.registry import title
from sret_jax.parallel.host import available_cores
from sret_jax.parallel.mesh import batch_sharding, make_mesh
from sret_jax.settings.config_model import create_from_config
from sret_jax.terminal import Progress
from sret_jax.text import table
from sret_jax.training.batches import train_loader
from sret_jax.training.checks import check_numbers
from sret_jax.training.experiment import build_computation

CLASSES, CROPS, KEEP = 1000, 8, "topk5"
LABELS = "stored labels"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A way to train on the same crops: with hard labels, or stored ones of m crops per image."""

    title: str
    config: ConfigDict


def benchmark_labels(
    config: ConfigDict, *, rounds: int, steps: int, samples: int, json_file: epath.Path | None
) -> dict[str, Any]:
    """Measures steps and loaders of all variants in turn, and prints ratios to hard labels.

    Args:
      config: from configs/common.py. Its model, crops and batch are used, with 1,000 generated
        photographs and random labels.
      rounds: number of rounds; medians are reported.
      steps: steps per round.
      samples: images per loader and round.
      json_file: file that the figures are also written to.

    Raises:
      UserError: a number is out of range, or training would refuse the config.
    """
    check_counts(rounds=rounds, steps=steps, samples=samples)
    check_numbers(config)
    source = Photographs(make_photographs(), classes=CLASSES)
    with tempfile.TemporaryDirectory() as folder:
        store = epath.Path(folder) / "labels"
        variants = list(make_variants(config, store))
        write_random_labels(variants[0].config, store, source)
        timings = measure([TrainStep(v, source) for v in variants], rounds, steps)
        rates = loader_rates(variants, source, rounds, samples)
    step_seconds = [[taken.seconds for taken in of_variant] for of_variant in timings]
    report = {
        "model": title(create_from_config(config, CLASSES), config.model.name),
        "image_size": config.model.image_size,
        "batch_size": config.batch_size,
        "devices": f"{jax.device_count()} {jax.devices()[0].device_kind}",
        "cores": available_cores(),
        "rounds": rounds,
        "variants": {
            variant.title: {
                "step_seconds": spread(seconds),
                "step_ratio": median_ratio(seconds, step_seconds[0]),
                "images_per_second": spread(rate),
                "loader_ratio": median_ratio(rate, rates[0]),
            }
            for variant, seconds, rate in zip(variants, step_seconds, rates, strict=True)
        },
    }
    print_report(report)
    if json_file:
        write_json(json_file, report)
    return report


def make_variants(config: ConfigDict, store: epath.Path) -> Iterator[Variant]:
    """Hard labels; hard labels again, to show noise; stored labels of one and of several crops."""
    config = config.copy_and_resolve_references()
    config.augment.update(UNCHANGED, repeats=1)
    config.distill.required = False
    config.teacher = ""
    several = max(config.data.crops_per_image, 2)
    if several > CROPS:
        raise UserError(f"config.data.crops_per_image={several} must be at most {CROPS} here")
    for number, crops in enumerate((0, 0, 1, several)):
        changed = config.copy_and_resolve_references()
        changed.data.update(soft_labels=str(store) if crops else "", crops_per_image=max(crops, 1))
        hard = "hard labels, again" if number else "hard labels"
        yield Variant(f"{LABELS}, {crops} of an image" if crops else hard, changed)


def write_random_labels(config: ConfigDict, store: epath.Path, source: Source) -> None:
    """Writes a store of CROPS crops of every image with random probabilities."""
    transform = train_transform(config.augment, config.model.image_size)
    manifest = Manifest(
        data=data_facts(config, source),
        teacher=TeacherFacts("drawn at random", None, None),
        law=crop_law(config),
        temperature=config.distill.temperature,
        keep=KEEP,
        crops=CROPS,
    )

    def records(numbers: range) -> Iterator[bytes]:
        for number in numbers:
            data = source[number]["image"]
            crops, _ = draw_views(data, transform, CROPS, seed=config.seed, record=number)
            drawn = np.random.default_rng(number).dirichlet(np.full(CLASSES, 0.01), CROPS)
            yield pack(manifest, crops, *most_probable(manifest, drawn))

    write_store(store, manifest, records, hosts=1, host=0)


class TrainStep:
    """The train step of a variant, applied repeatedly to one batch on the devices."""

    def __init__(self, variant: Variant, source: Source):
        config, mesh = variant.config, make_mesh(variant.config.fsdp)
        computation = build_computation(
            config, mesh, images=len(source), train_classes=CLASSES, classes=CLASSES
        )
        loader = open_loader(config, source)
        self._batch = next(loader)
        loader.close()
        self._state = computation.init_state()
        self._step: Callable = computation.compile_train_step()

    def __call__(self) -> None:
        self._state, _ = self._step(self._state, self._batch)
        jax.block_until_ready(self._state)


def loader_rates(
    variants: list[Variant], source: Source, rounds: int, samples: int
) -> list[list[float]]:
    """Images per second of each variant's loader in each round, up to batches on the devices."""
    rates: list[list[float]] = [[] for _ in variants]
    with Progress("Measuring the loader", rounds * len(variants), "measurements") as progress:
        for variant, results in progress.counted(rounds * list(zip(variants, rates, strict=True))):
            results.append(loader_rate(variant.config, source, samples))
    return rates


def loader_rate(config: ConfigDict, source: Source, samples: int) -> float:
    """Images per second after the batches that were read ahead are used up."""
    loader = open_loader(config, source)
    for _ in range(config.data.prefetch + 1):
        next(loader)
    batches = -(-samples // config.batch_size)
    start = time.perf_counter()
    for _ in range(batches):
        jax.block_until_ready(next(loader))
    rate = batches * config.batch_size / (time.perf_counter() - start)
    loader.close()
    return rate


def open_loader(config: ConfigDict, source: Source) -> Loader:
    """The training batches of a config from the first."""
    sharding = batch_sharding(make_mesh(config.fsdp))
    size = config.model.image_size
    labels = stored_labels(config)
    loader = train_loader(
        source, config, size, config.batch_size, sharding, start_step=0, soft_labels=labels
    )
    assert isinstance(loader, Loader)
    return loader


def median_ratio(values: list[float], reference: list[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(v / r for v, r in zip(values, reference, strict=True))


def print_report(report: dict[str, Any]) -> None:
    """Prints the table."""
    print(
        f"{report['model']}, {report['image_size']} pixels, batch {report['batch_size']}; "
        f"{report['devices']} devices, {report['cores']} cores; medians of {report['rounds']} "
        "rounds"
    )
    rows = [
        (
            name,
            f"{row['step_seconds']['median']:.4f} s",
            f"{row['step_ratio']:.3f}x",
            f"{row['images_per_second']['median']:,.0f}",
            f"{row['loader_ratio']:.2f}x",
        )
        for name, row in report["variants"].items()
    ]
    print(table(("", "train step", "ratio", "loader, images/s", "ratio"), rows))
