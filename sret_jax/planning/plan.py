"""Plans a run from a config and a topology: sizes, memory, traffic, and an estimate of the time.

If training steps differ in their loops, the figures of a step are those of the most loops; those of
all steps together are under "train_loops".
"""

import copy
import dataclasses
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from sret_jax.data.loader import batch_unit
from sret_jax.data.sources.splits import IMAGENET_CLASSES, IMAGENET_IMAGES, open_split
from sret_jax.errors import UserError
from sret_jax.files import write_json
from sret_jax.models.adapter_costs import adapter_costs
from sret_jax.models.flops import model_macs
from sret_jax.parallel.mesh import make_mesh
from sret_jax.planning.chips import Chip
from sret_jax.planning.compilation import (
    Compilation,
    DoesNotFit,
    available_memory,
    compile_step,
    state_bytes,
)
from sret_jax.planning.fitting import largest_batch
from sret_jax.planning.plan_report import print_report
from sret_jax.planning.roofline import FORMULA, roofline
from sret_jax.planning.topology import Topology, open_topology
from sret_jax.terminal import Progress
from sret_jax.training.checks import check_numbers
from sret_jax.training.experiment import Computation, build_computation, check_settings


def plan(
    config: ConfigDict, topology: str, *, find_batch: bool, json_file: epath.Path | None
) -> dict[str, Any]:
    """Plans a run and prints the plan.

    Args:
      config: from configs/common.py.
      topology: a name that `open_topology` takes.
      find_batch: plans for the largest batch that fits instead of the config's.
      json_file: file that the figures are also written to.

    Returns:
      The figures. "fits" is whether the run fits; None if that is unknown.

    Raises:
      UserError: training would refuse the config, the topology is unknown, or libtpu is missing.
    """
    planner = Planner(config, open_topology(topology))
    report = planner.find_batch() if find_batch else planner.plan()
    print_report(report)
    if json_file:
        write_json(json_file, report)
    return report


class Planner:
    """Plans one config on one topology, for any number of batch sizes."""

    def __init__(self, config: ConfigDict, topology: Topology):
        check_numbers(config)
        self._config = config
        self._topology = topology
        self._mesh = make_mesh(config.fsdp, topology.devices)
        check_settings(config, self._mesh)
        self._sizes = data_sizes(config)
        self._available = available_memory(topology.devices[0])
        self._compilations: dict[tuple[int, int], Compilation | DoesNotFit] = {}

    def plan(self) -> dict[str, Any]:
        """The plan for the config's batch, and the nearest batch that fits if it does not."""
        batch = self._config.batch_size
        report = self._report(batch)
        if report["fits"] is False:
            report |= self._search()
        return report

    def find_batch(self) -> dict[str, Any]:
        """The plan for the largest batch that fits.

        Raises:
          UserError: the memory of a device is unknown.
        """
        if self._available is None:
            raise UserError(
                f"--find-batch needs the memory of a device, which {self._topology.devices[0]} "
                "does not report; give another --topology"
            )
        found = self._search()
        return self._report(found["largest_batch"] or self._config.batch_size) | found

    def _search(self) -> dict[str, int]:
        batch, _ = largest_batch(
            self._needed,
            self._available or 0,
            unit=self._unit,
            first=self._config.batch_size,
            fixed=state_bytes(self._computation(self._config.batch_size)),
        )
        return {"largest_batch": batch, "compilations": len(self._compilations)}

    @property
    def _unit(self) -> int:
        config = self._config
        mixing = self._computation(config.batch_size).mixing
        return batch_unit(
            self._mesh.size,
            config.grad_accum,
            crops=config.data.crops_per_image,
            in_pairs=mixing.in_pairs,
        )

    def _computation(self, batch: int) -> Computation:
        config = copy.deepcopy(self._config)
        config.batch_size = batch
        return build_computation(config, self._mesh, **self._sizes)

    def _compile(self, batch: int, loops: int | None = None) -> Compilation | DoesNotFit:
        """Compiles the step of so many images and loops; default: the most loops of any step."""
        loops = loops or int(self._computation(batch).loops_of_steps.max())
        if (batch, loops) not in self._compilations:
            with Progress(f"Compiling the train step of {batch:,} images for {self._where}"):
                try:
                    found: Compilation | DoesNotFit = compile_step(self._computation(batch), loops)
                except DoesNotFit as error:
                    found = error
                self._compilations[batch, loops] = found
        return self._compilations[batch, loops]

    def _needed(self, batch: int) -> int:
        found = self._compile(batch)
        return found.needed if isinstance(found, DoesNotFit) else found.memory.total

    @property
    def _where(self) -> str:
        return f"{self._topology.name} ({self._mesh.size} devices)"

    def _report(self, batch: int) -> dict[str, Any]:
        found = self._compile(batch)
        computation, topology = self._computation(batch), self._topology
        params = jax.tree.leaves(computation.abstract_state.variables["params"])
        needed = self._needed(batch)
        report: dict[str, Any] = {
            "model": computation.model_title,
            "image_size": computation.model.image_size,
            "topology": topology.name,
            "device_kind": topology.devices[0].device_kind,
            "chips": topology.chips,
            "devices": self._mesh.size,
            "hosts": topology.hosts,
            "mesh": dict(self._mesh.shape),
            "parameters": sum(x.size for x in params),
            "gmacs_per_image": model_macs(computation.model) / 1e9,
            "lost_gradients": computation.lost_gradients,
            **({"adapters": adapters} if (adapters := adapter_costs(computation.model)) else {}),
            "kernels": [dataclasses.asdict(use) for use in computation.kernel_uses],
            "batch_size": batch,
            "images_per_device": batch // self._mesh.size,
            "images": self._sizes["images"],
            "epochs": self._config.epochs,
            "steps": computation.last_step,
            "compilations": len(self._compilations),
            "memory_needed": needed,
            "memory_available": self._available,
            "fits": None if self._available is None else needed <= self._available,
        }
        if isinstance(found, Compilation):
            report |= counted(found)
            if topology.chip:
                report |= estimated(found, topology.chip, computation.last_step)
            if loops := computation.loops_figures():
                report["train_loops"] = loops | self._of_all_steps(computation)
                report["compilations"] = len(self._compilations)
        return report

    def _of_all_steps(self, computation: Computation) -> dict[str, Any]:
        """Figures of all steps of a run, which differ in their loops."""
        counts, steps = np.unique(computation.loops_of_steps, return_counts=True)
        batch, chip = computation.config.batch_size, self._topology.chip
        found = [self._compile(batch, loops) for loops in counts.tolist()]
        fitting = [step for step in found if isinstance(step, Compilation)]
        figures = {
            "steps": dict(zip(counts.tolist(), steps.tolist(), strict=True)),
            "mean_flops_per_step": np.average([2.0 * x.macs for x in fitting], weights=steps),
        }
        if chip:
            seconds = [roofline(x, chip).step for x in fitting]
            figures |= {"hours": np.dot(seconds, steps) / 3600}
        return figures


def computation_for(config: ConfigDict, devices: Sequence[jax.Device]) -> Computation:
    """The computation of the config's run on those devices; no data are opened.

    Raises:
      UserError: training would refuse the config.
    """
    config = copy.deepcopy(config)
    config.data.synthetic = True
    check_numbers(config)
    mesh = make_mesh(config.fsdp, devices)
    check_settings(config, mesh)
    return build_computation(config, mesh, **data_sizes(config))


def data_sizes(config: ConfigDict) -> dict[str, int]:
    """The number of images and classes: ImageNet's for its configs, otherwise those of the data."""
    if config.data.synthetic or config.data.name.startswith("imagenet2012"):
        classes = config.model.num_classes or IMAGENET_CLASSES
        return {"images": IMAGENET_IMAGES, "train_classes": classes, "classes": classes}
    with tempfile.TemporaryDirectory() as folder:
        train = open_split(config, epath.Path(folder), config.data.train_split)
        open_split(config, epath.Path(folder), config.data.eval_split, train.class_names)
        return {
            "images": len(train),
            "train_classes": len(train.classes_here),
            "classes": len(train.class_names),
        }


def counted(found: Compilation) -> dict[str, Any]:
    """Figures counted in the compiled step."""
    return {
        "flops_per_step": 2 * found.macs,
        "memory": dataclasses.asdict(found.memory) | {"total": found.memory.total},
        "bytes_accessed_per_image": found.bytes_per_image,
        "hbm_bytes_per_image": found.hbm_bytes / found.images_per_device,
        "collectives": [dataclasses.asdict(c) for c in found.collectives],
        "loops_counted_once": found.loops_counted_once,
        "compile_seconds": found.seconds,
    }


def estimated(found: Compilation, chip: Chip, steps: int) -> dict[str, Any]:
    """Figures estimated from the chip's published peak speeds."""
    line = roofline(found, chip)
    peaks = dataclasses.asdict(chip)
    return {
        "peaks": {k: peaks[k] for k in ("hbm_bytes", "flops", "hbm_bandwidth", "ici_bandwidth")},
        "estimate": {
            "formula": FORMULA,
            **dataclasses.asdict(line),
            "step_seconds": line.step,
            "bound": line.bound,
            "images_per_second_per_chip": found.images_per_device * chip.devices / line.step,
            "hours": steps * line.step / 3600,
        },
    }
