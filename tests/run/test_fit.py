"""Training from Python."""

import json

import jax
import pytest
from etils import epath

import sret_jax


def test_fit_trains_tells_its_callbacks_and_resumes(tiny_config, tmp_path, capsys):
    seen = []
    tiny_config.stop_at_step = 2
    report = sret_jax.fit(
        tiny_config, tmp_path, [lambda step, figures: seen.append((step, figures))]
    )
    assert report["step"] == 2
    assert capsys.readouterr().out.startswith(f"Devices: 8 x cpu, jax {jax.__version__}.\n")
    assert [step for step, figures in seen if "loss" in figures] == [1, 2]
    assert [step for step, figures in seen if "eval_ema/top1" in figures] == [2]
    assert json.loads((tmp_path / "result.json").read_text())["eval"] == report["eval"]

    def stop(step, figures):
        raise StopIteration(f"seen {step}")

    tiny_config.stop_at_step = 3
    with pytest.raises(StopIteration, match="seen 3"):
        sret_jax.fit(tiny_config, tmp_path, [stop])
    assert sret_jax.load(epath.Path(tmp_path) / "checkpoints" / "2")[0].num_classes == 10
