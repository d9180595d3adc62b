"""The devices to plan for: those of a TPU slice that is not there, or of this machine."""

import dataclasses
import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from sret_jax.errors import UserError
from sret_jax.planning.chips import CHIPS, Chip, find_slice

LOCAL = "local"
# libtpu asks the cloud which TPU it is on, and fails elsewhere, unless it is told.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened, so several plans can be made at once
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices, and what is known of their chips.

    Attributes:
      name: as in v5e:16x16, or local.
      devices: to make a mesh of and compile for.
      chip: None where its published numbers are unknown.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None

    @property
    def chips(self) -> int:
        """A chip of v2, v3 or tpu7x is two devices."""
        return len(self.devices) // self.chip.devices if self.chip else len(self.devices)

    @property
    def hosts(self) -> int:
        """How many processes drive the devices."""
        return len({device.process_index for device in self.devices})


def open_topology(name: str) -> Topology:
    """The devices of "local", or of a slice, see `find_slice`, which need not be there.

    The devices of a slice can be compiled for, but run nothing.

    Raises:
      UserError: an unknown name, or no libtpu.
    """
    if name.strip().lower() == LOCAL:
        return Topology(LOCAL, jax.devices(), _chip_of(jax.devices()[0]))
    wanted = find_slice(name)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={name} needs libtpu, the compiler for TPUs, which is not installed; "
            "pip install -r requirements-tpu.txt, or give --topology=local"
        )
    for variable, value in NO_TPU_HERE.items():
        os.environ.setdefault(variable, value)
    settings: dict[str, Any] = {}
    if wanted.chip.config:
        settings["chip_config_name"] = wanted.chip.config
    if wanted.chips == 1:
        settings["chips_per_host_bounds"] = (1, 1, 1)
    description = topologies.get_topology_desc(
        platform="tpu", topology_name=wanted.name, **settings
    )
    return Topology(wanted.name, description.devices, wanted.chip)


def _chip_of(device: jax.Device) -> Chip | None:
    """What JAX calls "TPU v5 lite" is a v5e."""
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
    name = kinds.get(device.device_kind, device.device_kind.removeprefix("TPU "))
    return CHIPS.get(name)
