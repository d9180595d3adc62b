import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from sret_jax.errors import UserError
from sret_jax.parallel.mesh import make_mesh, state_shardings


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_the_mesh_has_all_devices(fsdp):
    assert dict(make_mesh(fsdp).shape) == {"data": 8 // fsdp, "fsdp": fsdp}


def test_a_count_that_does_not_divide_is_an_error():
    with pytest.raises(UserError, match=r"config.fsdp=3 does not divide the 8 devices"):
        make_mesh(3)


def test_large_arrays_split_along_their_largest_divisible_axis_but_never_the_loops():
    state = {
        "kernel": jax.ShapeDtypeStruct((30, 64), jnp.float32),
        "odd": jax.ShapeDtypeStruct((45, 45), jnp.float32),
        "bias": jax.ShapeDtypeStruct((64,), jnp.float32),
        "stage0_block0": {
            "nll": {"kernel": jax.ShapeDtypeStruct((128, 32, 24), jnp.float32)},
            "block": {"kernel": jax.ShapeDtypeStruct((128, 32), jnp.float32)},
        },
    }
    specs = jax.tree.map(lambda s: s.spec, state_shardings(state, make_mesh(4)))
    assert specs == {
        "kernel": PartitionSpec(None, "fsdp"),
        "odd": PartitionSpec(),
        "bias": PartitionSpec(),
        "stage0_block0": {
            "nll": {"kernel": PartitionSpec(None, "fsdp")},
            "block": {"kernel": PartitionSpec("fsdp")},
        },
    }
