"""The kernel of attention in windows, interpreted, against the same mathematics in plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sret_jax.models.kernels.fused_windows import can_hold, fused_windows
from sret_jax.models.layers.windows import Windows, plain_window_attention
from sret_jax.models.registry import create_model
from sret_jax.parallel.mesh import batch_sharding, make_mesh
from tests.conftest import needs_libtpu
from tests.models.kernels.test_kernels import (
    assert_close,
    assert_rounds_like,
    compile_on,
    kernel_calls,
    kernel_macs,
    moved_bytes,
    normal,
    value_and_gradients,
)


def plain_and_kernel(windows):
    def kernel(qkv, bias):
        return fused_windows(qkv, bias, windows.mask(), interpret=True)

    return functools.partial(plain_window_attention, windows=windows), kernel


def operands(windows, batch, heads, dim, dtype=jnp.float32):
    """The gradient of the result, then QKV and bias."""
    tokens, n = windows.padded**2, windows.size**2
    d_out = normal(0, batch, tokens, heads * dim, dtype=dtype)
    qkv = normal(1, batch, tokens, 3 * heads * dim, dtype=dtype)
    return d_out, qkv, normal(2, heads, n, n)


@pytest.mark.parametrize(
    ("windows", "batch", "heads", "dim"),
    [
        (Windows(56, 7, 3), 1, 1, 32),
        (Windows(28, 7), 1, 1, 16),
        (Windows(14, 7, 3), 2, 3, 8),
        (Windows(7, 7), 3, 2, 8),
        (Windows(9, 4, 2), 4, 1, 8),  # three windows are one matrix of scores
        (Windows(24, 12, 6), 1, 1, 8),  # more scores than a tile has columns
    ],
    ids=str,
)
def test_the_kernel_has_the_values_and_gradients_of_plain_attention_in_windows(
    windows, batch, heads, dim
):
    plain, ours = (
        jax.jit(functools.partial(value_and_gradients, f))(*operands(windows, batch, heads, dim))
        for f in plain_and_kernel(windows)
    )
    assert_close(ours, plain)
    assert np.abs(ours[1][1]).min() > 0, "every bias has a gradient"


def test_the_kernel_in_bfloat16_is_as_exact_as_plain_attention_in_windows():
    plain, kernel = plain_and_kernel(Windows(14, 7, 3))
    half = operands(Windows(14, 7, 3), 2, 2, 16, jnp.bfloat16)
    wide = [x.astype(jnp.float32) for x in half]
    results = (
        jax.jit(functools.partial(value_and_gradients, f))(*x)
        for f, x in ((kernel, half), (plain, half), (plain, wide))
    )
    assert_rounds_like(*results)


def test_cost_estimates_follow_from_the_blocks_the_grid_and_the_program():
    windows = Windows(56, 7, 3)
    _, kernel = plain_and_kernel(windows)
    run = functools.partial(value_and_gradients, kernel)
    arguments = jax.eval_shape(functools.partial(operands, windows, 4, 2, 16))
    calls = list(kernel_calls(jax.make_jaxpr(run)(*arguments).jaxpr))
    assert len(calls) == 2
    for call in calls:
        estimate = call.params["cost_estimate"]
        assert estimate.bytes_accessed == moved_bytes(call)
        assert estimate.flops == 2 * kernel_macs(call)


def test_a_swin_with_kernels_on_many_devices_has_the_gradients_of_one_without():
    mesh = make_mesh(fsdp=2)
    small = dict(image_size=16, window=2, blocks=(2,), heads=(2,), dim=4, drop_path_rate=0.0)
    plain = create_model("swin_tiny", num_classes=5, attention="xla", mlp="xla", **small)
    fused = plain.clone(attention="pallas", mesh=mesh)
    images = jax.device_put(normal(0, 16, 16, 16, 3), batch_sharding(mesh))
    params = jax.jit(plain.init)(jax.random.key(0), images)["params"]
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))

    def loss(params, model):
        return jnp.sum(jnp.sin(model.apply({"params": params}, images)))

    ours, theirs = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, model)
        for model in (fused, plain)
    )
    assert_close(ours, theirs, 1e-5)


@needs_libtpu
@pytest.mark.slow  # compiles large kernels
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("windows", "heads", "dtype"),
    [
        (Windows(56, 7, 3), 4, "bfloat16"),  # Swin-B's stages at 224 pixels
        (Windows(28, 7, 3), 8, "bfloat16"),
        (Windows(14, 7, 3), 16, "bfloat16"),
        (Windows(7, 7), 32, "bfloat16"),
        (Windows(24, 12, 6), 16, "bfloat16"),  # and at 384
        (Windows(12, 12), 32, "bfloat16"),
        (Windows(28, 7, 3), 8, "float32"),
    ],
    ids=str,
)
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2"])
def test_windows_that_a_kernel_is_given_compile(chip, windows, heads, dtype):
    d_out, qkv, bias = jax.eval_shape(
        functools.partial(operands, windows, 2, heads, 32, jnp.dtype(dtype))
    )
    assert can_hold(qkv, heads, windows.mask())

    def run(*arguments):
        attend = functools.partial(fused_windows, mask=windows.mask(), interpret=False)
        return value_and_gradients(attend, *arguments)

    compile_on(chip, run, d_out, qkv, bias)
