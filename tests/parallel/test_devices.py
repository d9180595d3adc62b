"""Warnings about accelerators that JAX cannot use, recognised by their drivers' files."""

import jax
import pytest

from sret_jax.parallel.devices import unusable_accelerators

MACHINES = {
    "none": ({}, None),
    "network card of a cloud": (
        {"sys/bus/pci/devices/0/vendor": "0x1ae0\n"},
        None,
    ),
    "other device passed through": ({"dev/vfio/17": ""}, None),
    "new driver": (
        {
            "dev/nvidia0": "",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA Kernel Module  580.65.06  Sun",
            "proc/driver/nvidia/gpus/0000:00:04.0/information": "Model: \t NVIDIA H100\nIRQ: 1",
        },
        "has an NVIDIA GPU (NVIDIA H100) that JAX cannot use, so the run is on the CPU; "
        f'pip install "jax[cuda13]=={jax.__version__}", or set JAX_PLATFORMS=cpu',
    ),
    "old driver": (
        {
            "dev/nvidia3": "",
            "proc/driver/nvidia/version": "NVRM version: NVIDIA Kernel Module for x86_64  535.1.2",
        },
        f'has an NVIDIA GPU that JAX cannot use, so the run is on the CPU; pip install "jax[cuda12]'
        f"=={jax.__version__}",
    ),
    "container without its GPU": (
        {"proc/driver/nvidia/version": "NVRM version: NVIDIA Kernel Module  580.65.06"},
        "docker run --gpus=all",
    ),
    "TPU": ({"dev/accel0": ""}, "has a TPU that JAX cannot use, so the run is on the CPU; "),
    "TPU passed through": (
        {"dev/vfio/0": "", "sys/bus/pci/devices/0/vendor": "0x1ae0\n"},
        "has a TPU that JAX cannot use",
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_an_accelerator_that_jax_cannot_use_is_a_sentence_with_the_install_line(machine, tmp_path):
    files, expected = MACHINES[machine]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    said = unusable_accelerators([], tmp_path)
    assert len(said) == (expected is not None)
    assert all(expected in sentence for sentence in said)


def test_gpus_that_were_hidden_are_not_missed(monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert not unusable_accelerators([], tmp_path)


def test_a_plugin_that_does_not_start_is_named_with_what_jax_says(monkeypatch, tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    (tmp_path / "jax_cuda12_plugin.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    (said,) = unusable_accelerators(["CUDA backend failed to initialize: no memory"], tmp_path)
    assert "installed but does not start (CUDA backend failed to initialize: no memory)" in said
    assert f'reinstall it with pip install "jax[cuda12]=={jax.__version__}"' in said
