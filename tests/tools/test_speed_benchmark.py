"""The benchmarks of steps run the actual steps, and their shares follow from what they time."""

import json

import pytest
from etils import epath

from configs import quickstart
from sret_jax.models.recursion import REMAT
from sret_jax.tools.label_benchmark import benchmark_labels
from sret_jax.tools.remat_benchmark import benchmark_remat
from sret_jax.tools.slicing_benchmark import benchmark_slicing
from sret_jax.tools.speed_benchmark import MatrixProduct, benchmark_step, figures, open_step
from sret_jax.training.flops import model_macs
from tests.conftest import run_python


@pytest.fixture
def config():
    config = quickstart.get_config()
    config.model.update(image_size=16, groups=((2, 2), (1, 1)), heads=(2, 4), dim=8)
    config.batch_size = 16
    return config


def test_the_train_step_is_timed_and_its_share_of_the_peak_printed(config, tmp_path, capsys):
    file = epath.Path(tmp_path) / "figures.json"
    report = benchmark_step(config, train=True, rounds=2, steps=1, json_file=file)
    assert json.loads(file.read_text()) == json.loads(json.dumps(report))
    share = report["share_of_peak"]
    assert 0 < share["least"] <= share["median"] <= share["largest"]
    printed = capsys.readouterr().out
    assert f"{share['median']:.3f}" in printed and "2 * 3 * " in printed
    assert "PyTorch eager 0.44, torch.compile 0.61" in printed


def test_a_share_is_the_step_s_flops_over_those_of_matrix_products_in_its_time(config, tmp_path):
    step = open_step(config, epath.Path(tmp_path), train=False)
    product = MatrixProduct(step.experiment.mesh, "float32")
    assert step.flops == 2 * model_macs(step.experiment.model) * 16
    assert product.flops == 2 * step.experiment.mesh.size * 2048**3
    seconds = {"step": [0.5, 0.25], "product": [1.0, 2.0]}
    report = figures(step, seconds["step"], product, seconds["product"])
    ratio = step.flops / product.flops
    assert report["share_of_peak"]["least"] == pytest.approx(ratio * 2)
    assert report["share_of_peak"]["largest"] == pytest.approx(ratio * 8)
    assert report["images_per_second"]["largest"] == 64


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
    assert 0 < row["macs_saved"] < 1
    assert row["train_time_saved"] < 1 and row["infer_time_saved"] < 1
    assert f"{row['macs_saved']:.1%}" in capsys.readouterr().out


@pytest.mark.slow  # compiles two train steps
def test_slicing_is_compared_as_it_is_compiled(config):
    (row,) = benchmark_slicing(
        config, models=["sret_t"], rounds=1, steps=1, topology="local", json_file=None
    )
    saved = row["unsliced_gigabytes_per_image"] - row["gigabytes_per_image"]
    assert row["bytes_saved"] == pytest.approx(saved / row["unsliced_gigabytes_per_image"])
    assert 0 < row["macs_saved"] < 1


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


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["train", "--rounds=0"], "--rounds=0 must be at least 1"),
        (["infer", "--config.batch_size=7"], "config.batch_size=7 is not divisible by the 8"),
        (["train", "--topology=v9"], "v9"),
        (["slicing", "--models=sret_x"], "unknown --models 'sret_x'; did you mean 'sret_"),
    ],
)
def test_bad_input_is_one_sentence(flags, sentence):
    done = run_python("-m", "sret_jax.tools.benchmark", *flags, devices=8)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
