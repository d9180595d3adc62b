import json
import math

import pytest
from etils import epath

from sret_jax.checkpoints.manager import Checkpoints
from sret_jax.evaluation.checkpoint_evaluation import evaluate_checkpoint
from sret_jax.files import write_json
from sret_jax.settings.saved_config import CONFIG_FILE
from sret_jax.tools import depth
from sret_jax.training.experiment import open_experiment


@pytest.mark.slow  # trains, and compiles its gradient twice more
def test_a_run_is_measured_application_by_application_and_drawn(tiny_config, tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    tiny_config.model.update(blocks=(1, 2), heads=(2, 4), groups=(), loops=3, nll_every=2)
    experiment = open_experiment(tiny_config, workdir)
    write_json(workdir / CONFIG_FILE, tiny_config.to_dict())
    checkpoints = Checkpoints(workdir)
    checkpoints.save(7, {"model": experiment.init_state().variables})
    checkpoints.close()

    depth.main([f"--workdir={workdir}", f"--attention={workdir / 'maps.png'}"])
    figures = json.loads((workdir / "depth.json").read_text())
    assert figures["step"] == 7
    for norms in figures["gradient_norm"].values():
        assert len(norms) == 3 * 3
        assert all(math.isfinite(norm) and norm > 0 for norm in norms)
    assert figures["coefficients"]["attention, skip"] == [1.0] * 9
    assert figures["coefficients"]["NLL, branch"] == [None, 1.0, None] * 3
    assert {number: len(of["top1"]) for number, of in figures["exits"].items()} == {"3": 3, "6": 6}
    evaluated = evaluate_checkpoint(tiny_config, workdir)["eval"]
    assert figures["exits"]["3"]["top1"][-1] == pytest.approx(evaluated["top1"])
    assert all(0 < entropy < math.log(10) for entropy in figures["exits"]["6"]["entropy"])
    for number, changes in figures["dynamics"].items():
        assert len(changes["relative_change"]) == 3 * int(number)
        assert [value is None for value in changes["cosine"][:2]] == [True, False]
        assert len(changes["contraction_rate"]) == 3
    for picture in ("depth.png", "maps.png"):
        assert (workdir / picture).read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "3 (trained)" in said and "Written:" in said
