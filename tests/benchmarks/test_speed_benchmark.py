"""The step benchmarks run the actual steps, and their shares follow from the times measured."""

import json

import pytest
from etils import epath

from configs import quickstart
from sret_jax.benchmarks import speed_benchmark
from sret_jax.benchmarks.compiled_bytes import benchmark_bytes
from sret_jax.benchmarks.label_benchmark import benchmark_labels
from sret_jax.benchmarks.remat_benchmark import benchmark_remat, print_table
from sret_jax.benchmarks.report_plot import plot_reports
from sret_jax.benchmarks.slicing_benchmark import benchmark_slicing
from sret_jax.benchmarks.speed_benchmark import (
    MatrixProduct,
    Timing,
    benchmark_step,
    figures,
    open_step,
)
from sret_jax.benchmarks.trace_benchmark import benchmark_trace
from sret_jax.data.sources.splits import IMAGENET_CLASSES
from sret_jax.errors import UserError
from sret_jax.models.flops import model_macs
from sret_jax.models.recursion import REMAT
from sret_jax.planning.compilation import DoesNotFit
from sret_jax.settings.config_model import create_from_config
from tests.conftest import make_synthetic_config, run_commands


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    """Smaller products: the real ones take seconds on the fake devices of the tests."""
    monkeypatch.setattr(speed_benchmark, "CPU_SIDE", 64)
    monkeypatch.setattr(speed_benchmark, "BURST_SECONDS", 0.0)


@pytest.fixture
def config():
    config = quickstart.get_config()
    config.model.update(image_size=16, groups=((2, 2), (1, 1)), heads=(2, 4), dim=8)
    config.batch_size = 16
    return config


def test_the_train_step_is_timed_and_its_share_of_the_peak_printed(tmp_path, capsys):
    file, plot = epath.Path(tmp_path) / "figures.json", epath.Path(tmp_path) / "shares.png"
    config = make_synthetic_config()
    report = benchmark_step(config, train=True, rounds=2, steps=1, json_file=file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    (ours,) = report["shares"].values()
    share = ours["share_of_peak"]
    assert 0 < share["least"] <= share["median"] <= share["largest"]
    assert ours["cpu_seconds"]["median"] > 0
    printed = capsys.readouterr().out
    assert f"{share['median']:.3f}" in printed and "2 * 3 * " in printed
    plot_reports([file, file], plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    file.write_text("{}")
    with pytest.raises(UserError, match="figures.json is not a report of"):
        plot_reports([file], plot)


@pytest.mark.slow  # compiles in PyTorch
@pytest.mark.parametrize("train", [True, False])
def test_the_twin_takes_its_turn_eager_and_compiled(config, capsys, train):
    pytest.importorskip("torch", reason="its twin is written in torch")
    report = benchmark_step(config, train=train, rounds=1, steps=1, against="torch", json_file=None)
    names = ["ours", "torch eager", "torch.compile"]
    assert list(report["shares"]) == names
    peak = 1e9 * report["peak_gflops"]["median"]
    for taken in report["shares"].values():  # of the one round
        rate = taken["images_per_second"]["median"]
        assert rate == pytest.approx(16 / taken["step_seconds"]["median"])
        flops = 2e9 * (3 if train else 1) * report["gmacs_per_image"]
        assert taken["share_of_peak"]["median"] == pytest.approx(flops * rate / peak)
    printed = capsys.readouterr().out
    assert all(f"\n{name} " in printed for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(dtype="bfloat16"), "float32 on CPUs, and the step in bfloat16"),
        (dict(nll_every=2), "has no module for this model: a model with nll_every=2"),
    ],
)
def test_a_step_that_pytorch_s_module_does_not_do_is_not_compared_with_it(config, change, message):
    if "nll_every" in change:
        pytest.importorskip("torch")
    config.model.update(change)
    with pytest.raises(UserError, match=message):
        benchmark_step(config, train=False, rounds=1, steps=1, against="torch", json_file=None)


def test_a_step_that_does_not_fit_says_by_how_much():
    error = DoesNotFit(needed=20 << 30, available=16 << 30, batch_size=4096)
    assert str(error) == (
        "a batch of 4,096 does not fit: a device needs 20.00 GiB, 4.00 GiB more than the 16.00 GiB "
        "there are; give a smaller --config.batch_size"
    )


def test_a_share_is_the_step_s_flops_over_those_of_matrix_products_in_its_time(config, tmp_path):
    step = open_step(config, epath.Path(tmp_path), train=False)
    product = MatrixProduct(step.experiment.mesh, "float32")
    assert step.flops == 2 * model_macs(step.experiment.model) * 16
    assert product.flops == 2 * step.experiment.mesh.size * 64**3
    step_timings, peak = [Timing(0.5, 1.0), Timing(0.25, 0.5)], [Timing(1, 2), Timing(2, 4)]
    report = figures(step, step_timings, product, peak)
    ratio = step.flops / product.flops
    assert report["share_of_peak"]["least"] == pytest.approx(ratio * 2)
    assert report["share_of_peak"]["largest"] == pytest.approx(ratio * 8)
    assert report["images_per_second"]["largest"] == 64
    assert report["cpu_seconds"]["median"] == 0.75


@pytest.mark.slow  # compiles three steps and decodes thousands of photographs
def test_stored_labels_are_compared_with_hard_ones(config, tmp_path, capsys):
    file = epath.Path(tmp_path) / "figures.json"
    config.data.crops_per_image = 4
    config.batch_size = 32
    report = benchmark_labels(config, rounds=2, steps=1, samples=64, json_file=file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    hard, _, one, four = report["variants"].values()
    assert hard["step_ratio"] == hard["loader_ratio"] == 1
    assert one["step_ratio"] > 0 and four["loader_ratio"] > 0
    assert "stored labels, 4 of an image" in capsys.readouterr().out


@pytest.mark.slow  # compiles four steps
def test_slicing_is_compared_with_the_unsliced_twin(config, capsys):
    (row,) = benchmark_slicing(
        config, models=["sret_t"], rounds=1, steps=1, topology=None, json_file=None
    )
    sliced = model_macs(create_from_config(config, IMAGENET_CLASSES)) / 1e9
    config.model.groups = ((1,), (1,))
    unsliced = model_macs(create_from_config(config, IMAGENET_CLASSES)) / 1e9
    counted = row["gmacs_per_image"], row["unsliced_gmacs_per_image"]
    assert counted == pytest.approx((sliced, unsliced))
    assert row["macs_saved"] == pytest.approx(1 - sliced / unsliced)
    printed = capsys.readouterr().out
    for mode in ("train", "infer"):
        least, largest = row[f"{mode}_time_saved_range"]
        assert least == row[f"{mode}_time_saved"] == largest < 1  # of the one round
        assert f"{least:.1%} ({least:.1%} to {largest:.1%})" in printed


@pytest.mark.slow  # compiles two train steps
def test_slicing_is_compared_as_it_is_compiled(config):
    (row,) = benchmark_slicing(
        config, models=["sret_t"], rounds=1, steps=1, topology="local", json_file=None
    )
    saved = row["unsliced_gigabytes_per_image"] - row["gigabytes_per_image"]
    assert row["bytes_saved"] == pytest.approx(saved / row["unsliced_gigabytes_per_image"])
    assert 0 < row["macs_saved"] < 1


def test_only_reports_that_say_what_runs_as_kernels_become_bars_of_bytes(tmp_path):
    files = [epath.Path(tmp_path) / f"{kernels}.json" for kernels in ("all", "no")]
    for file in files:
        size = {"gigabytes_per_image": 0.4, "goal_gigabytes_per_image": 0.5}
        report = {"model": "sret_s", "topology": "v5e:1x1", "kernels": file.stem, **size}
        file.write_text(json.dumps(report))
    plot = epath.Path(tmp_path) / "bytes.png"
    plot_reports(files, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    files[1].write_text(json.dumps(size))  # no report, or an earlier one that does not say it
    with pytest.raises(UserError, match="is not a report of `benchmark train`"):
        plot_reports(files, plot)


@pytest.mark.slow  # compiles two train steps
def test_the_bytes_of_compiled_steps_are_drawn_and_not_beside_shares(config, tmp_path):
    files = [epath.Path(tmp_path) / name for name in ("auto.json", "xla.json", "infer.json")]
    for file in files[:2]:
        config.model.mlp = file.stem
        benchmark_bytes(config, "local", json_file=file)
    plot = epath.Path(tmp_path) / "bytes.png"
    plot_reports(files[:2], plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    benchmark_step(config, train=False, rounds=1, steps=1, json_file=files[2])
    with pytest.raises(UserError, match="plot those with --topology and those without apart"):
        plot_reports(files, plot)


@pytest.mark.slow  # compiles four train steps
def test_remat_choices_trade_temporaries_for_flops(config, tmp_path, capsys):
    plot = epath.Path(tmp_path) / "remat.png"
    config.model.update(loops=4, blocks=(1, 1))
    rows = {
        row["remat"]: row for row in benchmark_remat(config, "local", json_file=None, plot=plot)
    }
    assert list(rows) == list(REMAT)
    flops = [row["flops_per_image"] for row in rows.values()]
    assert flops[0] < min(flops[1:])
    assert plot.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(f"\n{choice} " in printed for choice in REMAT)


def test_a_remat_choice_that_does_not_fit_says_so_beside_those_that_do(capsys):
    same = dict(model="sret_t", topology="v5e:1x1")
    none = same | dict(remat="none", does_not_fit="a device needs 20.00 GiB")
    block, full = (
        same | dict(remat=choice, temporary_bytes_per_image=size * 1e6, flops_per_image=flops * 1e9)
        for choice, size, flops in (("block", 6, 8), ("full", 3, 10))
    )
    print_table([none, block, full], 4096)
    lines = capsys.readouterr().out.splitlines()
    assert "of block" in lines[1]
    assert lines[3].split() == "full 3.00 MB 0.50 10.00 1.25".split()  # noqa: SIM905
    assert lines[4] == "none does not fit: a device needs 20.00 GiB"


@pytest.mark.slow  # takes seconds to trace
def test_tracing_many_loops_is_compared_with_tracing_few(config, tmp_path, capsys):
    file = epath.Path(tmp_path) / "figures.json"
    rows = benchmark_trace(config, loops=[10, 1000], rounds=1, json_file=file)
    assert json.loads(file.read_text()) == rows
    assert [row["applications"] for row in rows] == [20, 2000]
    ten, thousand = (row["characters"] for row in rows)
    assert 0 < thousand <= 1.3 * ten
    assert f"{thousand / ten:.2f}\n" in capsys.readouterr().out


def test_bad_input_is_one_sentence(tmp_path):
    mistakes = {
        "train --rounds=0": "--rounds=0 must be at least 1",
        "infer --config.batch_size=7": "config.batch_size=7 is not divisible by the 8",
        "train --topology=v9": "v9",
        "trace --loops=ten": "'ten' is not numbers separated by commas",
        "trace --loops=0,10": "loops=0 must be a whole number of at least 1",
        "slicing --models=sret_x": "unknown --models 'sret_x'; did you mean 'sret_",
    }
    commands = [["sret_jax.tools.benchmark", *flags.split()] for flags in mistakes]
    for done, sentence in zip(
        run_commands(commands, tmp_path, devices=8), mistakes.values(), strict=True
    ):
        assert done.returncode == 2 and sentence in done.stderr, done.stderr
