"""Prints a plan for people."""

from collections.abc import Iterator
from typing import Any

from sret_jax.models import adapter_costs
from sret_jax.models.kernel_use import Use, in_words
from sret_jax.planning.compilation import gib, shortage
from sret_jax.training.train_loops import loops_in_words

MEMORY = ("arguments", "results", "temporaries", "code")


def print_report(report: dict[str, Any]) -> None:
    """Prints the figures of `planning.plan`, what they mean and whether the run fits."""
    lines = [*_sizes(report)]
    if "memory" in report:
        lines += _traffic(report)
    if "estimate" in report:
        lines += _estimate(report)
    for name, text in lines:
        print(f"{name:18}{text}")
    print(_verdict(report))


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _sizes(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    mesh = report["mesh"]
    yield (
        "topology",
        f"{report['topology']}: {_many(report['chips'], report['device_kind'] + ' chip')}, "
        f"{_many(report['devices'], 'device')}, {_many(report['hosts'], 'host')}; mesh data "
        f"{mesh['data']} x fsdp {mesh['fsdp']}",
    )
    yield (
        "model",
        f"{report['model']}: {report['parameters']:,} parameters, "
        f"{report['gmacs_per_image']:.3f} GMACs per {report['image_size']}-pixel image",
    )
    if adapters := adapter_costs.in_words(report.get("adapters", {})):
        yield "adapters", adapters
    if loops := report.get("train_loops"):
        yield (
            "loops",
            f"{loops_in_words(loops)} A step takes {loops['mean_flops_per_step']:.4g} FLOPs on "
            f"average. All figures of a step below are those of {loops['most']} loops.",
        )
    if report["lost_gradients"]:
        yield "gradients", report["lost_gradients"]
    for i, line in enumerate(in_words(Use(**use) for use in report["kernels"])):
        yield "" if i else "kernels", line
    yield (
        "run",
        f"{report['epochs']:g} epochs of {report['images']:,} images: {report['steps']:,} steps of "
        f"{report['batch_size']:,}, {report['images_per_device']:,} on each device",
    )


def _traffic(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    memory, images = report["memory"], report["batch_size"]
    flops = report["flops_per_step"]
    yield (
        "a step",
        f"{flops:.4g} FLOPs, {flops / images / 2e9:.3f} GMACs per image forward and backward",
    )
    yield (
        "memory",
        f"a device: {', '.join(f'{k} {gib(memory[k])}' for k in MEMORY)}; "
        f"total {gib(memory['total'])}{_share(report)}",
    )
    yield (
        "bytes accessed",
        f"{report['bytes_accessed_per_image'] / 1e9:.4f} GB per image, of them "
        f"{report['hbm_bytes_per_image'] / 1e9:.4f} GB in main memory (compiled, loops multiplied "
        "in)",
    )
    for collective in report["collectives"]:
        yield (
            collective["kind"],
            f"{collective['count']} with {collective['bytes'] / 1e6:,.2f} MB a device"
            f"{_among(collective, report)}",
        )
    if not report["collectives"]:
        yield "collectives", "none"


def _among(collective: dict[str, Any], report: dict[str, Any]) -> str:
    """The number of devices that take part in each collective, unless it is all of them."""
    devices = collective["devices"] or report["devices"]
    return f", among {devices:,} each" if devices < report["devices"] else ""


def _share(report: dict[str, Any]) -> str:
    available = report["memory_available"]
    if available is None:
        return ", of a memory whose size is unknown"
    return f" of {gib(available)} ({report['memory']['total'] / available:.1%})"


def _estimate(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    estimate, peaks = report["estimate"], report["peaks"]
    yield (
        "published peaks",
        f"a chip: {peaks['flops'] / 1e12:g} TFLOP/s in bfloat16, {gib(peaks['hbm_bytes'])} at "
        f"{peaks['hbm_bandwidth'] / 1e9:g} GB/s, {peaks['ici_bandwidth'] / 1e9:g} GB/s to others",
    )
    yield "formula", estimate["formula"]
    hours = report.get("train_loops", estimate)["hours"]
    parts = ", ".join(
        f"{name} {1000 * estimate[name]:.2f} ms" for name in ("compute", "memory", "communication")
    )
    yield (
        "estimate",
        f"{1000 * estimate['step_seconds']:.2f} ms a step ({parts}), "
        f"{estimate['images_per_second_per_chip']:,.0f} images/s a chip, "
        f"{hours:.2f} hours for the run at peak: computing and memory overlap, "
        "communication does not; evaluation and checkpoints come on top",
    )


def _verdict(report: dict[str, Any]) -> str:
    available, needed = report["memory_available"], report["memory_needed"]
    if available is None:
        return "Whether it fits is unknown."
    tried = _many(report["compilations"], "compilation")
    if report["fits"]:
        found = " and is the largest batch found to" if "largest_batch" in report else ""
        return f"A batch of {report['batch_size']:,} fits{found} ({tried})."
    best = report["largest_batch"]
    advice = f"a batch of {best:,} fits" if best else f"no batch fits; {_more_room(report)}"
    return (
        f"A batch of {report['batch_size']:,} does not fit: "
        f"{shortage(needed, available)}; {advice} ({tried})."
    )


def _more_room(report: dict[str, Any]) -> str:
    """Advice for a state that does not fit by itself."""
    if report["mesh"]["fsdp"] < report["devices"]:
        return "raise --config.fsdp"
    return "give a larger --topology, or a smaller model"
