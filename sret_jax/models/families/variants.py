"""The published members of the SReT family, by name (SReT tables 3, 5 and 6)."""

from collections.abc import Mapping
from typing import Any

SLICED = ((8, 2), (4, 1), (1, 1))

VARIANTS: dict[str, dict[str, Any]] = {
    "sret_t": dict(heads=(2, 4, 8), dim=32, mlp_ratio=3.6, nll_ratio=1.0, drop_path_rate=0.1),
    "sret_lt": dict(heads=(2, 4, 8), dim=32, mlp_ratio=4.0, nll_ratio=1.0, drop_path_rate=0.1),
    "sret_s": dict(heads=(3, 6, 12), dim=42, mlp_ratio=3.0, nll_ratio=2.0, drop_path_rate=0.2),
}


def published(name: str) -> dict[str, Any]:
    """The settings of a published variant, as `create_model` takes them."""
    return dict(blocks=(2, 5, 3), loops=2, groups=SLICED, **VARIANTS[name])


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return sorted(VARIANTS)


def nearest_variant(settings: Mapping[str, Any]) -> str:
    """The variant that has the most settings in common with these."""

    def shared(name: str) -> int:
        return sum(settings.get(key) == value for key, value in VARIANTS[name].items())

    return max(list_models(), key=shared)
