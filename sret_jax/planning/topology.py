"""The devices to plan for: those of a TPU slice that need not exist here, or of this machine."""

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
# libtpu asks the cloud which TPU it is on, and fails elsewhere unless these variables are set.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # no TPU is opened, so several plans can run at once
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices, and their chips' published figures.

    Attributes:
      name: name of the topology, such as v5e:16x16 or local.
      devices: devices to build a mesh of and to compile for.
      chip: the published figures; None if they are unknown.
    """

    name: str
    devices: Sequence[jax.Device]
    chip: Chip | None

    @property
    def chips(self) -> int:
        """The number of chips; a chip of v2, v3 or tpu7x is two devices."""
        return len(self.devices) // self.chip.devices if self.chip else len(self.devices)

    @property
    def hosts(self) -> int:
        """The number of processes that drive the devices."""
        return len({device.process_index for device in self.devices})


def open_topology(name: str) -> Topology:
    """The devices of "local", or of a slice (see `find_slice`) that need not exist here.

    Programs can be compiled for the devices of such a slice, but not run.

    Raises:
      UserError: the name is unknown, or libtpu is missing.
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
    """The chip of a device, which JAX may name differently: "TPU v5 lite" is a v5e."""
    kinds = {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e", "TPU7x": "tpu7x"}
    name = kinds.get(device.device_kind, device.device_kind.removeprefix("TPU "))
    return CHIPS.get(name)
