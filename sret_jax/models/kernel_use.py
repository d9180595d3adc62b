"""Which parts of a model run as fused kernels, which ones XLA compiles instead, and why."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator

import jax

from sret_jax.models.kernels import fused_attention, fused_mlp, fused_windows
from sret_jax.models.kernels.choice import runs_kernels
from sret_jax.models.layers.windows import window_cycle
from sret_jax.models.model import Model

KERNEL, INTERPRETED, XLA = "a kernel", "an interpreted kernel", "XLA"
TOO_LARGE, NO_KERNEL = "too large for a TPU's fast memory", "no kernel computes it"


@dataclasses.dataclass(frozen=True)
class Use:
    """What computes one part of a stage.

    Attributes:
      model: name of the model; "" for the model in training.
      stage: number of the stage, from 0.
      shape: (tokens, channels) of the stage.
      part: "attention in 8 groups", "attention in windows", "attention in shifted windows", "MLP
        over tokens", "MLP" or "NLL".
      by: KERNEL, INTERPRETED or XLA.
      why: the reason for INTERPRETED or XLA; "" for KERNEL.
    """

    model: str
    stage: int
    shape: tuple[int, int]
    part: str
    by: str
    why: str = ""


def kernel_uses(model: Model, device: jax.Device, *, name: str = "") -> list[Use]:
    """What computes each part of the model on such a device; `name` is the model's name.

    The list is empty where kernels are not considered: off a TPU, unless model.attention or
    model.mlp is "pallas".
    """
    if device.platform != "tpu" and "pallas" not in (model.attention, model.mlp):
        return []
    uses = []
    for stage, shape, field, part, declined in _parts(model):
        by, why = _choice(getattr(model, field), device, declined)
        uses.append(Use(name, stage, shape, part, by, why))
    return uses


def in_words(uses: Iterable[Use]) -> list[str]:
    """One line per stage, or a single line if kernels compute every part."""
    uses = list(uses)
    if uses and all(use.by == KERNEL for use in uses):
        nlls = any(use.part == "NLL" for use in uses)
        return [f"all attention{', MLPs and NLLs' if nlls else ' and MLPs'} run as kernels"]
    stages = itertools.groupby(uses, lambda use: (use.model, use.stage, *use.shape))
    return [
        (f"{model}, " if model else "")
        + f"stage {stage} ({tokens:,} tokens of {channels:,} channels): {_by_whom(of_stage)}"
        for (model, stage, tokens, channels), of_stage in stages
    ]


def _by_whom(uses: Iterable[Use]) -> str:
    grouped: dict[tuple[str, str], list[str]] = {}
    for use in uses:
        grouped.setdefault((use.by, use.why), []).append(use.part)
    return "; ".join(
        f"{', '.join(parts)} by {by}{f' ({why})' if why else ''}"
        for (by, why), parts in grouped.items()
    )


def _parts(model: Model) -> Iterator[tuple[int, tuple[int, int], str, str, str]]:
    """Yields stage, (tokens, channels), model field, part, and why no kernel can compute it."""
    for number, stage in enumerate(model.stages):
        tokens = stage.side**2 + stage.prefix
        shape = (tokens, stage.width)
        applications = model.blocks[number] * model.loops
        cycle = window_cycle(stage.side, stage.window, block=0) if stage.window else ()
        for windows in cycle[:applications]:
            part = f"attention in {'shifted ' if windows.shift else ''}windows"
            qkv = jax.ShapeDtypeStruct((1, windows.padded**2, 3 * stage.width), model.dtype)
            fits = fused_windows.can_hold(qkv, stage.heads, windows.mask())
            yield number, shape, "attention", part, "" if fits else TOO_LARGE
        qkv = jax.ShapeDtypeStruct((1, tokens, 3 * stage.width), model.dtype)
        everywhere = stage.heads and not stage.window
        for groups in dict.fromkeys(stage.groups[: model.loops]) if everywhere else ():
            part = "attention" if groups == 1 else f"attention in {groups} groups"
            # Tokens that do not fit together with a permutation are permuted outside the kernel.
            fits = fused_attention.can_hold(qkv, stage.heads, groups, permuted=False)
            declined = NO_KERNEL if stage.prefix and groups > 1 else "" if fits else TOO_LARGE
            yield number, shape, "attention", part, declined
        if stage.token_hidden:
            yield number, shape, "mlp", "MLP over tokens", NO_KERNEL
        x = jax.ShapeDtypeStruct((1, tokens, stage.width), model.dtype)
        for part, hidden in (("MLP", stage.hidden), ("NLL", int(model.nll_ratio * stage.width))):
            if hidden:
                fits = fused_mlp.can_hold(x, hidden)
                yield number, shape, "mlp", part, "" if fits else TOO_LARGE


def _choice(implementation: str, device: jax.Device, declined: str) -> tuple[str, str]:
    """What computes a part, as `Kernels.choose` decides, and the reason if it is XLA."""
    if implementation == "xla":
        return XLA, "as the config asks"
    no_kernels = f"{device.device_kind} runs none"
    if not runs_kernels(device) and implementation == "auto":
        return XLA, no_kernels
    if declined:
        return XLA, declined
    return (KERNEL, "") if runs_kernels(device) else (INTERPRETED, f"slow: {no_kernels}")
