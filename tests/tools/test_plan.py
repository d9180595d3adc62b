"""Plans for this machine, for TPU slices that do not exist here, and for impossible requests."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from etils import epath

from configs import common
from sret_jax.errors import UserError
from sret_jax.models.flops import model_macs
from sret_jax.parallel.host import machine_memory
from sret_jax.planning import topology
from sret_jax.planning.chips import CHIPS, GIB
from sret_jax.planning.compilation import _memory_of_error, available_memory, compile_step
from sret_jax.planning.plan import Planner, plan
from sret_jax.planning.plan_report import print_report
from sret_jax.planning.roofline import roofline
from sret_jax.planning.topology import open_topology
from sret_jax.planning.traffic import Collective
from sret_jax.training.experiment import open_experiment
from tests.conftest import make_synthetic_config, needs_libtpu, run_python

FLOAT = 4


@pytest.fixture
def config():
    return make_synthetic_config()


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """A planner that has compiled, its report, and its compilations."""
    planner = Planner(make_synthetic_config(), open_topology("local"))
    return planner, planner.plan(), planner._compilations[64, 2]


def test_the_plan_is_of_the_very_step_that_training_compiles(config, planned, tmp_path):
    planner, _, _ = planned
    experiment = open_experiment(config, epath.Path(tmp_path))
    lowered = [c.trace_train_step().lower() for c in (experiment, planner._computation(64))]
    assert lowered[0].as_text() == lowered[1].as_text()


def test_the_plan_of_this_machine_counts_what_is_known_by_hand(planned, capsys):
    planner, report, _ = planned
    params = jax.tree.leaves(planner._computation(64).abstract_state.variables["params"])
    size = sum(x.size for x in params)
    assert report["parameters"] == size
    assert (report["chips"], report["hosts"], report["mesh"]) == (8, 1, {"data": 8, "fsdp": 1})
    forward = report["gmacs_per_image"] * 2e9 * 64
    assert 2.5 < report["flops_per_step"] / forward <= 3
    # All gradients are reduced (on CPUs, a block's gradients in each of its two loops), and besides
    # them only BatchNorm's sums and the metrics.
    reduced = sum(c["bytes"] for c in report["collectives"] if c["kind"] == "all-reduce")
    assert size * FLOAT <= reduced <= 2 * size * FLOAT + 4_000
    assert sum(c["bytes"] for c in report["collectives"]) - reduced < 4_000
    assert (report["fits"], report["memory_available"]) == (True, machine_memory() // 8)
    assert "estimate" not in report
    json.dumps(report)
    print_report(report)
    assert "A batch of 64 fits (1 compilation)" in capsys.readouterr().out


def test_the_memory_of_a_machine_is_what_its_container_may_use(tmp_path):
    total = int(pathlib.Path("/proc/meminfo").read_text().split()[1]) * 1024  # MemTotal, in kB
    limit = tmp_path / "memory.max"
    assert machine_memory(limit) == pytest.approx(total, rel=0.01)
    for written, available in (("max\n", total), ("1000000\n", 10**6)):
        limit.write_text(written)
        assert machine_memory(limit) == pytest.approx(available, rel=0.01)


def test_a_step_is_as_many_forward_passes_as_its_products_say(planned):
    planner, report, found = planned
    forward = 64 * model_macs(planner._computation(64).model)
    assert found.forward_passes == pytest.approx(report["flops_per_step"] / 2 / forward)


def test_a_plan_of_steps_with_different_loops_shows_their_mean_and_the_most(config, capsys):
    config.recursion.train_loops = "1@0.25,2"
    planner = Planner(config, open_topology("local"))
    report = planner.plan()
    one, two = (planner._compilations[64, loops] for loops in (1, 2))
    loops, model = report["train_loops"], planner._computation(64).model
    steps = report["steps"]
    assert loops["steps"] == {1: round(steps / 4), 2: steps - round(steps / 4)}
    weights = list(loops["steps"].values())
    gmacs = [model_macs(model.clone(loops=n)) / 1e9 for n in (1, 2)]
    assert loops["mean_gmacs_per_image"] == pytest.approx(np.average(gmacs, weights=weights))
    assert loops["most_gmacs_per_image"] == gmacs[1]
    flops = np.average([2 * one.macs, 2 * two.macs], weights=weights)
    assert loops["mean_flops_per_step"] == pytest.approx(flops)
    assert report["memory"] == dataclasses.asdict(two.memory) | {"total": two.memory.total}
    assert one.macs < two.macs and one.memory.total < two.memory.total
    json.dumps(report)
    print_report(report)
    assert "Training steps have 1 to 2 loops (1@0.25,2)" in capsys.readouterr().out
    with pytest.raises(UserError, match="train_loops=1@0.25,2 training steps differ"):
        compile_step(planner._computation(64))


def test_where_nobody_knows_the_memory_neither_does_the_report(planned, capsys):
    _, report, _ = planned
    print_report({**report, "memory_available": None, "fits": None})
    printed = capsys.readouterr().out
    assert "of a memory whose size is unknown" in printed
    assert "Whether it fits is unknown" in printed


@pytest.mark.parametrize(("fsdp", "advice"), [(2, "raise --config.fsdp"), (8, "give a larger")])
def test_where_no_batch_fits_the_mend_is_one_that_is_left(planned, capsys, fsdp, advice):
    _, report, _ = planned
    mesh = {"data": 8 // fsdp, "fsdp": fsdp}
    print_report({**report, "mesh": mesh, "memory_available": 1, "fits": False, "largest_batch": 0})
    assert f"no batch fits; {advice}" in capsys.readouterr().out


def test_the_command_refuses_an_unknown_topology_in_one_sentence():
    done = run_python("-m", "sret_jax.tools.plan", "--topology=v5e:3x5")
    assert done.returncode == 2
    assert done.stderr.startswith("Error: unknown topology 'v5e:3x5'; did you mean 'v5e:4x4'?")
    assert done.stderr.count("\n") == 1


def test_a_batch_that_does_not_divide_is_refused_with_the_devices_of_the_topology(config):
    config.batch_size = 100
    with pytest.raises(UserError, match="batch_size=100 is not divisible by the 8 devices"):
        Planner(config, open_topology("local"))


def test_the_largest_batch_needs_to_know_the_memory(config):
    planner = Planner(config, open_topology("local"))
    planner._available = None  # as for a device that does not report its memory
    with pytest.raises(UserError, match="--find-batch needs the memory of a device"):
        planner.find_batch()


def test_without_libtpu_a_slice_is_refused_with_the_fix(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install -r requirements-tpu.txt"):
        open_topology("v5e:2x2")


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "devices", "hosts"),
    [
        ("v2:2x2", 4, 8, 1),
        ("v3-32", 16, 32, 4),
        ("v4-32", 16, 16, 4),
        ("v5e:1x1", 1, 1, 1),
        ("v5e-256", 256, 256, 64),
        ("v5p-64", 32, 32, 8),
        ("v6e-256", 256, 256, 64),
        ("tpu7x:2x2x1", 4, 8, 1),
    ],
)
def test_a_slice_has_its_chips_devices_and_hosts(name, chips, devices, hosts):
    found = open_topology(name)
    assert (found.chips, len(found.devices), found.hosts) == (chips, devices, hosts)


@needs_libtpu
@pytest.mark.parametrize("name", ["v2:2x2", "v3:2x2", "v4:2x2x1", "v5e:2x2", "v5p:2x2x1"])
def test_a_device_can_use_about_its_share_of_the_published_memory(name):
    found = open_topology(name)
    share = found.chip.hbm_bytes / found.chip.devices
    assert 0.9 * share < available_memory(found.devices[0]) < 1.01 * share


@needs_libtpu
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.slow
def test_the_plan_of_sret_t_on_a_tpu_slice_that_is_not_there(tmp_path):
    config = common.get_variant("sret_t", "")
    config.batch_size = 512
    report = plan(config, "v5e:2x2", find_batch=False, json_file=epath.Path(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text()) == report
    assert report["fits"]
    assert (report["chips"], report["hosts"], report["images_per_device"]) == (4, 1, 128)
    assert report["parameters"] == 4_755_979
    assert report["gmacs_per_image"] == pytest.approx(1.112, abs=1e-3)
    assert report["steps"] == round(300 * 1_281_167 / 512)

    memory = report["memory"]
    state = 4 * report["parameters"] * FLOAT  # weights, their average, and AdamW's two moments
    images = 128 * 224 * 224 * 3
    assert state + images < memory["arguments"] < 1.3 * (state + images)
    assert memory["arguments"] < memory["total"] < 16 * GIB

    assert report["loops_counted_once"] <= 8  # of mixup's Beta distribution, two nested in each
    # One reduction of the gradients, some of them in bfloat16, and nothing of the images' size.
    assert {c["kind"] for c in report["collectives"]} == {"all-reduce"}
    gradients = report["parameters"] * FLOAT
    assert 0.4 * gradients < sum(c["bytes"] for c in report["collectives"]) < 1.1 * gradients

    estimate, peaks = report["estimate"], report["peaks"]
    assert estimate["compute"] == pytest.approx(report["flops_per_step"] / (4 * peaks["flops"]))
    assert estimate["step_seconds"] == pytest.approx(
        max(estimate["compute"], estimate["memory"]) + estimate["communication"]
    )
    # Less than a plain ViT of the same FLOPs, at three forward passes and a tenth at most.
    assert 0 < report["hbm_bytes_per_image"] <= report["bytes_accessed_per_image"] <= 0.28e9
    assert report["flops_per_step"] <= 1.1 * 3 * 2e9 * report["gmacs_per_image"] * 512


@needs_libtpu
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.slow
def test_on_a_tpu_slice_fsdp_divides_the_state_and_gathers_weights_only():
    config = common.get_variant("sret_t", "")
    config.update(batch_size=512, fsdp=2)
    report = plan(config, "v5e:2x2", find_batch=False, json_file=None)
    assert report["mesh"] == {"data": 2, "fsdp": 2}
    weights, images = report["parameters"] * FLOAT, 128 * 224 * 224 * 3
    assert 2 * weights + images < report["memory"]["arguments"] < 2.4 * weights + 1.3 * images

    moved = {(c["kind"], c["devices"]): c["bytes"] for c in report["collectives"]}
    gathered = moved.pop(("all-gather", 2))  # most in bfloat16, once
    assert 0.4 * weights < gathered < 0.8 * weights
    assert {kind for kind, _ in moved} == {"all-reduce", "reduce-scatter"}
    assert 0.4 * weights < sum(moved.values()) < 1.1 * weights


@pytest.mark.slow
def test_a_batch_that_does_not_fit_names_the_nearest_that_does(config, planned, capsys):
    _, report, _ = planned
    config.batch_size = 1024
    planner = Planner(config, open_topology("local"))
    planner._available = 2 * report["memory_needed"]  # that of a smaller device
    report = planner.plan()
    assert not report["fits"]
    best = report["largest_batch"]
    assert 64 < best < 1024
    assert best % 16 == 0
    assert planner._needed(best) <= planner._available < 1.2 * planner._needed(best)
    print_report(report)
    said = capsys.readouterr().out
    assert "A batch of 1,024 does not fit: a device needs" in said
    assert f"a batch of {best:,} fits ({report['compilations']} compilations)" in said


@pytest.mark.parametrize(
    ("text", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (33.50G) exceeds available HBM (15.75G).",
            33.5,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.",
            20.25,
        ),
        ("INTERNAL: something else", None),
    ],
)
def test_what_the_compiler_says_of_memory_is_understood(text, needed):
    expected = needed and (needed * GIB, 15.75 * GIB)
    assert _memory_of_error(text) == expected


def test_the_roofline_is_that_of_its_formula(planned):
    _, _, found = planned
    chip = CHIPS["v3"]  # two devices a chip
    collectives = [Collective("all-reduce", None, 3, 8_000), Collective("all-gather", 2, 1, 6_000)]
    line = roofline(dataclasses.replace(found, collectives=collectives), chip)
    assert line.compute == pytest.approx(2 * found.macs / (4 * 123e12))
    assert line.memory == pytest.approx(2 * found.hbm_bytes / 900e9)
    assert line.communication == pytest.approx(2 * (2 * 7 / 8 * 8_000 + 6_000 / 2) / 328e9)
    assert line.step == max(line.compute, line.memory) + line.communication
