"""Groups of runs are compared by their means and spreads over seeds."""

import json

import pytest

from sret_jax.tools.compare import main


@pytest.fixture
def runs(tmp_path):
    """The files that two runs of each of two groups leave."""
    for name, accuracies in {"hard": (0.90, 0.92), "soft": (0.95, 0.95)}.items():
        for seed, top1 in enumerate(accuracies):
            workdir = tmp_path / f"{name}-{seed}"
            workdir.mkdir()
            result = {"eval": {"top1": top1}, "eval_ema": {"top1": top1 - 0.1}}
            (workdir / "result.json").write_text(json.dumps(result))
            lines = [{"step": 1, "loss": 2.0}, *({"step": s, "eval/top1": top1} for s in (1, 2))]
            (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    return tmp_path


def test_a_table_gives_mean_and_spread_of_each_kind_and_a_picture_its_curves(runs, capsys):
    arguments = []
    for name in ("hard", "soft"):
        arguments += ["--runs", name, *(str(runs / f"{name}-{seed}") for seed in (0, 1))]
    main([*arguments, f"--picture={runs / 'curves.png'}"])
    printed = capsys.readouterr().out
    assert "| hard | 2 | 91.00 ± 1.41 | 90.00 to 92.00 | 81.00 ± 1.41 |" in printed
    assert "| soft | 2 | 95.00 ± 0.00 | 95.00 to 95.00 | 85.00 ± 0.00 |" in printed
    assert (runs / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_not_there_or_not_finished_are_named(runs, capsys):
    (runs / "soft-1" / "result.json").unlink()
    for arguments, sentence in (
        (["soft", str(runs / "soft-1")], "soft-1 holds no finished run"),
        (["soft"], "--runs soft names no workdir; write --runs NAME WORKDIR..."),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["--runs", *arguments])
        assert stopped.value.code == 2 and sentence in capsys.readouterr().err
