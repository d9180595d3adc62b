"""Times the train steps of the arms of a study, those of a claim in turn."""

import os
import tempfile
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from sret_jax.benchmarks.speed_benchmark import measure, open_step, spread
from sret_jax.parallel.host import available_cores
from sret_jax.terminal import Progress

ROUNDS, STEPS = 5, 5


def time_arms(configs: Mapping[str, ConfigDict], classes: int) -> dict[str, Any]:
    """Times a train step of each config on synthetic images.

    The steps are taken in turn, so that other programs on the machine disturb all of them alike:
    ratios hold better than seconds.

    Args:
      configs: configs by name; the first is the baseline.
      classes: number of classes.

    Returns:
      {"devices": "1 x cpu", "cores": number of this process's cores, "load": load average,
       "arms": {name: {"seconds": {"median", "least", "largest"}, "relative": the same of the ratio
       to the baseline in the same round, "settings": of the config, those that the time depends
       on}}}.

    Raises:
      UserError: training would refuse a config.
    """
    settings = {
        name: {"batch_size": config.batch_size, "model": config.model.to_dict()}
        for name, config in configs.items()
    }
    for config in configs.values():
        config.model.num_classes = classes
    compiling = Progress("Compiling", len(configs), "arms")
    with tempfile.TemporaryDirectory() as folder, compiling:
        workdir = epath.Path(folder)
        steps = [
            open_step(config, workdir, train=True) for config in compiling.counted(configs.values())
        ]
    baseline, *others = measure(steps, ROUNDS, STEPS)
    arms = {
        name: {
            "settings": settings[name],
            "seconds": spread([timing.seconds for timing in timings]),
            "relative": spread(
                [t.seconds / first.seconds for t, first in zip(timings, baseline, strict=True)]
            ),
        }
        for name, timings in zip(configs, (baseline, *others), strict=True)
    }
    return {
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "cores": available_cores(),
        "load": round(os.getloadavg()[1], 1),
        "arms": arms,
    }
