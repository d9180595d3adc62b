"""Speed is compared with timm's own module of a published model, and with nothing else."""

import sys

import pytest

from sret_jax import create_model
from sret_jax.errors import UserError
from sret_jax.models.families.sret import SReT
from sret_jax.models.registry import FAMILIES
from tests.timm_models import needs_timm

# The first published model of each family that timm has.
NAMES = [next(iter(family.variants)) for family in FAMILIES if family is not SReT]


@needs_timm
@pytest.mark.parametrize("name", NAMES)
def test_the_peer_of_a_published_model_has_its_arrays(name):
    from sret_jax.benchmarks.torch_peer import torch_peer

    peer = torch_peer(create_model(name, num_classes=10, drop_path_rate=0.2), name)
    assert type(peer).__module__.startswith("timm.models.")
    assert not {type(layer).__name__ for layer in peer.modules()}.isdisjoint({"DropPath"})


@needs_timm
@pytest.mark.parametrize("settings", [dict(loops=2), dict(nll_ratio=0.5), dict(residual="learned")])
def test_a_recursive_model_has_no_peer_in_timm(settings):
    from sret_jax.benchmarks.torch_peer import torch_peer

    ((key, value),) = settings.items()
    with pytest.raises(UserError, match=f"{key}=.* instead of {value}; set --config.model.{key}="):
        torch_peer(create_model("deit_tiny", **settings), "deit_tiny")


@needs_timm
def test_without_timm_one_sentence_says_what_to_install(monkeypatch):
    from sret_jax.benchmarks.torch_peer import import_timm

    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs timm, which is not installed; pip install timm"):
        import_timm()
