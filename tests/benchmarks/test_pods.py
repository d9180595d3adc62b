"""The table of docs/planning.md, made from existing plans."""

import json

from sret_jax.benchmarks.pods import CONFIGS, SLICES, main

PLAN = {
    "chips": 256,
    "batch_size": 1024,
    "memory_needed": 2**30,
    "memory_available": 2**34,
    "fits": True,
    "bytes_accessed_per_image": 5.3e8,
    "collectives": [{"kind": "all-reduce", "count": 3, "bytes": 19_000_000}],
    "estimate": {"step_seconds": 0.0031, "images_per_second_per_chip": 1290.3, "hours": 0.32},
}


def test_plans_that_are_there_are_not_made_again(tmp_path, capsys):
    for config in CONFIGS:
        for name in SLICES:
            plan = PLAN | ({"fits": False} if (config, name) == ("sret_s", "v4-32") else {})
            (tmp_path / f"{config}_{name}.json").write_text(json.dumps(plan))
    main([f"--folder={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 12
    assert len({line.count("|") for line in lines}) == 1
    assert lines[3] == (
        "| sret_t | v5e-256 | 256 | 4 | 1.00 of 16.00 GiB | 0.53 GB | 19 MB | 3.10 ms | 1,290 | "
        "0.32 h |"
    )
    assert "does not fit" in lines[10]
