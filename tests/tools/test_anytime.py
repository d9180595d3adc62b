"""The table of accuracy over loops, for a real checkpoint."""

import contextlib
import json

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.models.flops import exit_macs, model_macs
from sret_jax.settings.config_model import create_from_config
from sret_jax.tools import anytime


def test_each_number_of_loops_is_a_row_of_its_cost_and_accuracy(tiny_config, tmp_path, capsys):
    tiny_config.model.update(blocks=(1,), groups=((1,),), heads=(2,))
    tiny_config.data.train_split = "train[:80%]"
    model = create_from_config(tiny_config, num_classes=10)
    weights = jax.jit(model.init)(jax.random.key(1), jnp.zeros((1, 16, 16, 3)))
    workdirs = [tmp_path / "mixed-0", tmp_path / "mixed-1"]
    for workdir in workdirs:
        with contextlib.closing(Checkpoints(epath.Path(workdir))) as checkpoints:
            checkpoints.save(1, {"model": weights})
        (workdir / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    figures, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    exits = ["--exit=entropy,stable", "--choose_on=train[80%:]", "--lose=100"]
    files = [f"--json={figures}", f"--picture={picture}"]
    anytime.main([*map(str, workdirs), "--loops=3,1", *exits, *files])
    *rows, by_entropy, stable = json.loads(figures.read_text())
    assert [(row["run"], row["loops"]) for row in rows] == [("mixed", 1), ("mixed", 3)]
    tiny_config.model.loops = 3
    top1 = evaluate_checkpoint(tiny_config, epath.Path(workdirs[0]))["eval"]["top1"]
    assert rows[1]["top1"] == [top1, top1] != rows[0]["top1"]
    assert rows[1]["gmacs"] == model_macs(model.clone(loops=3)) / 1e9
    assert [(row["run"], row["exit"]) for row in (by_entropy, stable)] == [
        ("mixed", "entropy"),
        ("mixed", "stable"),
    ]
    (run, again), macs = by_entropy["runs"], exit_macs(model)
    assert run == again and run["all_loops"]["gmacs"] == model_macs(model) / 1e9
    assert run["chosen"]["gmacs"] == pytest.approx(
        (macs[0] + (run["chosen"]["loops"] - 1) * (macs[1] - macs[0])) / 1e9
    )
    costs = [entry["gmacs"] for entry in run["curve"]]
    assert costs == sorted(costs, reverse=True) and costs[0] > costs[-1]
    assert [entry["rule"] for entry in stable["runs"][0]["curve"]] == ["stable"]
    assert stable["runs"][0]["chosen"]["loops"] == 2  # as many as it has
    assert picture.stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert f"{1000 * rows[1]['gmacs']:.3g}  {100 * top1:.2f}% +- 0.00" in printed
    assert "  MMACs" in printed
    assert printed.count("Evaluating with 1 loop instead of ") == 1  # for both runs


@pytest.mark.parametrize(
    ("runs", "rows", "remark"),
    [
        ({"w-0": {}, "w-1": {"seed": 1}, "x": {}}, ["w", "w", "x"], ""),
        ({"w80": {"epochs": 80}, "w32": {}}, ["w80", "w32"], ""),
        ({"w-80": {"epochs": 80}, "w-32": {}}, ["w-80", "w-32"], "w-80, w-32 differ in epochs"),
        ({"a/w": {}, "b/w": {}}, ["{}/a/w", "{}/b/w"], ""),
        ({"w-5": {}, "-1": {}}, ["w-5", "-1"], ""),
    ],
)
def test_only_runs_that_differ_in_their_seed_share_a_row(
    runs, rows, remark, tiny_config, tmp_path, capsys
):
    configs = {}
    for name, changes in runs.items():
        config = configs[epath.Path(tmp_path / name)] = tiny_config.copy_and_resolve_references()
        config.update(changes)
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(json.dumps(config.to_dict()))
    names = list(anytime.group_names(configs).values())
    assert names == [row.format(tmp_path) for row in rows]
    said = capsys.readouterr().out
    assert remark in said and bool(remark) == bool(said)


@pytest.mark.parametrize("loops", ["", "0", "1,,2", "two"])
def test_loops_that_do_not_read_are_refused(loops, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        anytime.main([str(tmp_path), f"--loops={loops}"])
    assert stopped.value.code == 2
    assert f"--loops={loops} should read like --loops=1,2,3" in capsys.readouterr().err


def test_thresholds_are_chosen_on_images_that_training_and_evaluation_do_not_see(
    tiny_config, tmp_path, capsys
):
    tiny_config.data.train_split = "train[:80%]"
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_dict()))
    for choose_on, message in (
        ("train[70%:]", "shares 143 of its 431 images with 'train[:80%]', which"),
        ("test", "with 'test', which"),
    ):
        with pytest.raises(SystemExit):
            anytime.main([str(tmp_path), "--loops=1", "--exit=entropy", f"--choose_on={choose_on}"])
        assert message in capsys.readouterr().err
    for flags, message in (
        (["--exit=entropi", "--choose_on=test"], "unknown rule in --exit 'entropi'; did you mean"),
        (["--exit=entropy"], "--exit and --choose_on belong together"),
    ):
        with pytest.raises(SystemExit):
            anytime.main([str(tmp_path), "--loops=1", *flags])
        assert message in capsys.readouterr().err
