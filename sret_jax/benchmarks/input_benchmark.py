"""Measures speed, memory and quality of the input pipeline, beside a pipeline of Pillow alone."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
import simplejpeg
from etils import epath
from PIL import Image

from sret_jax.benchmarks.photographs import Photographs, make_photographs, read_jpegs
from sret_jax.benchmarks.pillow_view import PillowTransform
from sret_jax.data import order
from sret_jax.data.read_ahead import LARGEST_CHUNK, ReadAhead
from sret_jax.data.sources.reencode import Shrinking
from sret_jax.data.views.images import decode, decode_crop
from sret_jax.data.views.jpeg import Box
from sret_jax.data.views.training_view import TrainTransform, resize
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.parallel.host import available_cores
from sret_jax.terminal import Progress
from sret_jax.text import table

BATCH, PREFETCH = 256, 2
CROP = ((0.08, 1.0), (3 / 4, 4 / 3))  # fraction of the area, width / height
RAND_AUGMENT = "rand-m9-mstd0.5-inc1"
SMALLER = Shrinking(max_side=400, quality=90)
EXAMINED = 200  # number of images for quality and stages


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A row of the table: a transform, its images, and who reads them."""

    title: str
    transform: order.Transform
    images: list[bytes]
    plan: ReadAhead
    read: Callable[[grain.MapDataset], grain.IterDataset]


@dataclasses.dataclass(frozen=True)
class Timing:
    """The measurements of one pipeline in one round.

    Attributes:
      images_per_second: speed after the start.
      start_up: seconds to the first images, including the start of the workers.
      megabytes: memory of this process and its workers; shared pages count once.
      grown: growth in megabytes from the first third to the end.
    """

    images_per_second: float
    start_up: float
    megabytes: float
    grown: float


@dataclasses.dataclass(frozen=True)
class DecodeAlone:
    """Decodes the whole image and discards it."""

    size: int

    def __call__(self, data: bytes, rng: np.random.Generator) -> np.ndarray:
        simplejpeg.decode_jpeg(data)
        return np.zeros((self.size, self.size, 3), np.uint8)


MEGABYTE = 1 << 20


def benchmark_input(
    *,
    folder: pathlib.Path | None,
    samples: int,
    rounds: int,
    size: int,
    json_file: epath.Path | None,
) -> dict[str, Any]:
    """Measures all pipelines in turn, `rounds` times, and prints a table of medians.

    Args:
      folder: folder of JPEGs, including its subfolders; None: makes 1,000 of 500x375 pixels.
      samples: images per pipeline and round.
      rounds: number of rounds.
      size: side of the views in pixels.
      json_file: file that the figures are also written to.

    Raises:
      UserError: the folder has no JPEGs, or a number is out of range.
    """
    for name, value, least in (
        ("samples", samples, 4 * BATCH),
        ("rounds", rounds, 1),
        ("size", size, 8),
    ):
        if value < least:
            raise UserError(f"--{name}={value} must be at least {least}")
    images = read_jpegs(folder) if folder else make_photographs()
    pipelines = all_pipelines(images, size)
    timings: dict[str, list[Timing]] = {pipeline.title: [] for pipeline in pipelines}
    with Progress("Measuring", rounds * len(pipelines), "measurements") as progress:
        for pipeline in progress.counted(rounds * pipelines):
            timings[pipeline.title].append(run(pipeline, samples, size))
    report = {
        "cores": available_cores(),
        "images": len(images),
        "kilobytes_per_image": statistics.mean(map(len, images)) / 1000,
        "samples": samples,
        "pipelines": {title: medians(of) for title, of in timings.items()},
        "stages": stage_shares(images[:EXAMINED], size),
        "psnr": quality(images[:EXAMINED], size),
    }
    print_report(report)
    if json_file:
        write_json(json_file, report)
    return report


def all_pipelines(images: list[bytes], size: int) -> list[Pipeline]:
    """The pipelines to compare."""
    small = [SMALLER(image) or image for image in images]
    plain = TrainTransform(size, *CROP, flip=0.5)
    full = dataclasses.replace(plain, policy=RAND_AUGMENT)
    pillow = PillowTransform(size, *CROP, flip=0.5)
    pillow_full = dataclasses.replace(pillow, policy=RAND_AUGMENT)
    workers = ReadAhead.plan(BATCH, PREFETCH * BATCH, workers=-1)
    threads = ReadAhead.plan(BATCH, PREFETCH * BATCH, workers=0)
    ours = functools.partial(Pipeline, plan=workers, read=workers.read)
    plainly = functools.partial(Pipeline, plan=workers, read=read_plainly)
    return [
        ours("decoding alone", DecodeAlone(size), images),
        ours("sret_jax, crop and flip", plain, images),
        plainly("Pillow, crop and flip", pillow, images),
        ours("sret_jax, RandAugment", full, images),
        plainly("Pillow, RandAugment", pillow_full, images),
        Pipeline("sret_jax, RandAugment, threads", full, images, threads, threads.read),
        ours("sret_jax, RandAugment, smaller copy", full, small),
    ]


def read_plainly(chunks: grain.MapDataset) -> grain.IterDataset:
    """Reads with one worker per core, two chunks ahead, like PyTorch's DataLoader."""
    options = grain.MultiprocessingOptions(available_cores(), per_worker_buffer_size=PREFETCH)
    return chunks.to_iter_dataset(grain.ReadOptions(0, 0)).mp_prefetch(options)


def run(pipeline: Pipeline, samples: int, size: int) -> Timing:
    """Runs one pipeline once, on all cores, up to batches in this process's memory."""
    stream = order.shuffled(Photographs(pipeline.images), seed=0)
    views = order.Samples(stream, pipeline.transform, size, seed=0, replace=True)
    chunk = pipeline.plan.chunk
    start = time.perf_counter()
    iterator = iter(pipeline.read(views.batch(chunk)))
    next(iterator)
    start_up = time.perf_counter() - start
    chunks = samples // chunk
    warm_up = chunks // 3
    for _ in range(warm_up):
        next(iterator)
    before = resident_megabytes()
    start = time.perf_counter()
    for _ in range(chunks - warm_up):
        next(iterator)
    seconds = time.perf_counter() - start
    after = resident_megabytes()
    iterator.close()
    rate = (chunks - warm_up) * chunk / seconds
    return Timing(rate, start_up, after, after - before)


def medians(timings: list[Timing]) -> dict[str, float]:
    """The median of each figure over the rounds."""
    names = (field.name for field in dataclasses.fields(Timing))
    return {name: statistics.median(getattr(t, name) for t in timings) for name in names}


def stage_shares(images: list[bytes], size: int) -> dict[str, float]:
    """The fraction of one core's time that each stage of our pipeline takes."""
    transform = TrainTransform(size, *CROP, flip=0.5, policy=RAND_AUGMENT)
    seconds: dict[str, float] = defaultdict(float)
    views = []
    for i, data in enumerate(images):
        rng = np.random.default_rng([0, i])
        with timed(seconds, "decode and crop"):
            part = decode_crop(data, functools.partial(transform.sample_box, rng=rng), size)
        with timed(seconds, "resize"):
            view = resize(part, size)
        with timed(seconds, "augment"):
            views.append(transform.augment(view, rng))
        if len(views) == LARGEST_CHUNK:
            with timed(seconds, "batch"):
                np.stack(views)
            views.clear()
    return {stage: spent / sum(seconds.values()) for stage, spent in seconds.items()}


@contextlib.contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Adds the time of the enclosed code to the seconds of a stage."""
    start = time.perf_counter()
    yield
    seconds[stage] += time.perf_counter() - start


def quality(images: list[bytes], size: int) -> dict[str, float]:
    """Median PSNR of crops against exact decoding and Pillow's bicubic, in dB."""
    transform = TrainTransform(size, *CROP)
    ours, small = [], []
    for i, data in enumerate(images):
        image, smaller = decode(data), decode(SMALLER(data) or data)
        box = transform.sample_box(*image.size, np.random.default_rng(i))
        exact = exact_view(image, box, size)
        ours.append(psnr(transform.view(data, np.random.default_rng(i)), exact))
        small.append(psnr(exact_view(smaller, box, size, image.size), exact))
    return {"pipeline": statistics.median(ours), "smaller copy": statistics.median(small)}


def exact_view(
    image: Image.Image, box: Box, size: int, original: tuple[int, int] | None = None
) -> np.ndarray:
    """Resizes a box by Pillow's bicubic; a smaller image stands for one of `original` size.

    Shapes: -> (size, size, 3) uint8.
    """
    x, y = np.divide(image.size, original or image.size)
    left, top, right, bottom = box
    scaled = (left * x, top * y, min(right * x, image.width), min(bottom * y, image.height))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=scaled))


def psnr(picture: np.ndarray, exact: np.ndarray) -> float:
    """Peak signal-to-noise ratio, 20 log10(255 / rms error), in dB; 99 for no error."""
    error = np.sqrt(np.mean((picture.astype(float) - exact) ** 2))
    return 20 * np.log10(255 / error) if error else 99.0


def print_report(report: dict[str, Any]) -> None:
    """Prints the table and its explanation."""
    rows = report["pipelines"]
    cores = report["cores"]
    print(
        f"{report['images']:,} JPEGs of {report['kilobytes_per_image']:.0f} kB, {cores} cores, "
        f"{report['samples']:,} images per pipeline and round"
    )
    cells = []
    for title, row in rows.items():
        baseline = "Pillow, RandAugment" if "RandAugment" in title else "Pillow, crop and flip"
        ratio = row["images_per_second"] / rows[baseline]["images_per_second"]
        cells.append(
            (
                title,
                f"{row['images_per_second']:,.0f}",
                f"{row['images_per_second'] / cores:,.0f}",
                f"{ratio:.2f}x",
                f"{row['start_up']:.1f} s",
                f"{row['megabytes']:,.0f} MB",
                f"{row['grown']:,.0f} MB",
            )
        )
    print(table(("", "images/s", "per core", "ratio", "start", "memory", "growth"), cells))
    stages = ", ".join(f"{name} {share:.0%}" for name, share in report["stages"].items())
    print(f"Time of sret_jax with RandAugment: {stages}")
    pipeline, smaller = report["psnr"]["pipeline"], report["psnr"]["smaller copy"]
    print(
        f"Median PSNR against exact decoding and Pillow's bicubic: {pipeline:.1f} dB; of a copy "
        f"made with --max_side={SMALLER.max_side} --quality={SMALLER.quality}: {smaller:.1f} dB"
    )


def resident_megabytes() -> float:
    """The memory of this process and its children; shared pages are divided among their users."""
    return sum(map(_proportional_bytes, _process_tree())) / MEGABYTE


def _process_tree() -> Iterator[int]:
    """This process and its children."""
    yield os.getpid()
    for children in pathlib.Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        yield from map(int, children.read_text().split())


def _proportional_bytes(process: int) -> int:
    rollup = pathlib.Path(f"/proc/{process}/smaps_rollup")
    with contextlib.suppress(OSError):  # a worker may have just ended
        for line in rollup.read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0
