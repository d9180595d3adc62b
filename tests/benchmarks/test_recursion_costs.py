"""The table of docs/recursion.md, made from existing figures."""

import json

from sret_jax.benchmarks.recursion_costs import MODELS, forms, main

PLAN = {"parameters": 5_717_416, "gmacs_per_image": 1.2537, "bytes_accessed_per_image": 2.9e8}
TIME = {
    "seconds": {"median": 2.0},
    "relative": {"median": 1.9, "least": 1.85, "largest": 1.95},
}


def test_figures_that_are_there_are_not_made_again(tmp_path, capsys):
    for model in MODELS:
        for form in forms(model):
            (tmp_path / f"{model}_{form}.json").write_text(json.dumps(PLAN))
        times = dict.fromkeys(forms(model), TIME)
        (tmp_path / f"{model}_cpu.json").write_text(json.dumps(times))
    main([f"--folder={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + sum(len(forms(model)) for model in MODELS)
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2] == "| deit_tiny | as published | 5.72 M | 1.25 | 0.290 GB | 2.00 s |"
    assert lines[4] == (
        "| deit_tiny, half of the blocks, each twice (ours) | `blocks=(6,)`, `loops=2` | 5.72 M | "
        "1.25 | 0.290 GB | 1.90 times (1.85 to 1.95) |"
    )
