"""The input benchmark runs, compares equal work, and finds that memory does not grow."""

import json

import numpy as np
import pytest

from sret_jax.benchmarks import input_benchmark
from sret_jax.benchmarks.input_benchmark import CROP, RAND_AUGMENT, Pipeline, psnr, run
from sret_jax.benchmarks.photographs import make_photographs
from sret_jax.benchmarks.pillow_view import PillowTransform
from sret_jax.data.views.training_view import TrainTransform
from sret_jax.tools import benchmark
from tests.archives import encode, photographs
from tests.conftest import refusal, run_python


def test_the_pillow_pipeline_shows_the_same_views():
    settings = (224, *CROP, 0.5, RAND_AUGMENT)
    ours, theirs = TrainTransform(*settings), PillowTransform(*settings)
    ratios = []
    for i, photo in enumerate(photographs(40, seed=3)):
        data = encode(photo)
        view, other = (t(data, np.random.default_rng(i)) for t in (ours, theirs))
        ratios.append(psnr(view, other.transpose(1, 2, 0)))
    assert np.median(ratios) > 40


@pytest.mark.slow  # seven pipelines, most of which start processes
def test_the_table_and_the_figures_are_written(tmp_path):
    for i, photo in enumerate(photographs(8, seed=1)):
        (tmp_path / f"{i}.jpg").write_bytes(encode(photo))
    done = run_python(
        "-m",
        "sret_jax.tools.benchmark",
        "input",
        f"--images={tmp_path}",
        "--samples=1024",
        "--rounds=1",
        "--size=32",
        f"--json={tmp_path / 'figures.json'}",
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert len(figures["pipelines"]) == 7
    for title, row in figures["pipelines"].items():
        assert title in done.stdout
        assert row["images_per_second"] > 0 and row["start_up"] > 0 and row["megabytes"] > 0
    assert sum(figures["stages"].values()) == pytest.approx(1)
    assert figures["psnr"]["pipeline"] > 25  # crops are rounded to whole pixels of an eighth
    assert "ratio" in done.stdout and "PSNR" in done.stdout


def test_folders_and_numbers_that_will_not_do_are_named(tmp_path, capsys):
    def sentence(*flags):
        return refusal(capsys, benchmark.main, "input", *flags)

    images = f"--images={tmp_path}"
    assert f"Error: {images} holds no .jpg or .jpeg files" in sentence(images)
    (tmp_path / "a.jpg").write_bytes(b"no image")
    assert f"{tmp_path / 'a.jpg'} cannot be read (" in sentence(images)
    assert "--size=0 must be at least 8" in sentence("--size=0")


@pytest.mark.slow  # 50,000 images take a minute in each mode
@pytest.mark.parametrize("workers", [0, 2])
def test_memory_is_flat_over_fifty_thousand_samples(workers):
    transform = TrainTransform(224, *CROP, flip=0.5, policy=RAND_AUGMENT)
    plan = input_benchmark.ReadAhead.plan(256, 512, workers)
    timing = run(Pipeline("ours", transform, make_photographs(), plan, plan.read), 50_000, 224)
    assert abs(timing.grown) < 100  # megabytes, of 5,000 that pass through
