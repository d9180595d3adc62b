"""The fused kernels, interpreted, against the same mathematics in plain JAX."""

import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxpr_as_fun
from jax.sharding import NamedSharding, PartitionSpec

from sret_jax.models.flops import inner_jaxprs, jaxpr_macs
from sret_jax.models.kernel_use import in_words, kernel_uses
from sret_jax.models.kernels import fused_mlp
from sret_jax.models.kernels.choice import Kernels, tiled_bytes
from sret_jax.models.kernels.fused_attention import _queries, can_hold, fused_attention
from sret_jax.models.layers.attention import (
    SlicedAttention,
    fixed_permutation,
    permuted,
    plain_attention,
    random_permutation,
)
from sret_jax.models.layers.linear import LayerSettings
from sret_jax.models.layers.residual import ResidualMLP
from sret_jax.models.registry import create_model
from sret_jax.parallel.mesh import batch_sharding, make_mesh
from sret_jax.planning.topology import open_topology
from tests.conftest import needs_libtpu


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def assert_close(ours, theirs, tolerance=2e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()), rtol=0)


def assert_rounds_like(ours, plain, exact):
    """In bfloat16 our errors are at most twice those of plain JAX."""
    for a, b, c in zip(*map(jax.tree.leaves, (ours, plain, exact)), strict=True):
        assert a.dtype == b.dtype
        a, b, c = (np.asarray(x, np.float32) for x in (a, b, c))
        assert np.linalg.norm(a - c) <= 2 * max(np.linalg.norm(b - c), 2**-9 * np.linalg.norm(c))


def value_and_gradients(fn, d_out, *args):
    out, vjp = jax.vjp(fn, *args)
    return out, vjp(d_out)


# Tokens, heads, channels per head and slices: all token and slice counts of the published models.
PUBLISHED = [
    *((784, 1, 42, groups) for groups in (1, 2, 8)),
    (784, 1, 32, 16),
    *((196, 1, 42, groups) for groups in (1, 4)),
    (196, 1, 32, 14),
    (49, 3, 42, 1),
]


@pytest.mark.parametrize("order", ["raster", "random"])
@pytest.mark.parametrize(("tokens", "heads", "dim", "groups"), PUBLISHED)
def test_the_attention_kernel_has_the_values_and_gradients_of_plain_attention(
    tokens, heads, dim, groups, order
):
    permutation = random_permutation(jax.random.key(2), tokens) if order == "random" else None
    qkv, d_out = normal(0, 1, tokens, 3 * heads * dim), normal(1, 1, tokens, heads * dim)
    assert_attention_is_plain(qkv, permutation, d_out, heads, groups)


@pytest.mark.parametrize(("tokens", "heads", "dim", "groups"), PUBLISHED[1:3])
def test_the_attention_kernel_in_bfloat16_is_as_exact_as_plain_attention(
    tokens, heads, dim, groups
):
    qkv = normal(0, 1, tokens, 3 * heads * dim, dtype=jnp.bfloat16)
    d_out = normal(1, 1, tokens, heads * dim, dtype=jnp.bfloat16)
    static = dict(heads=heads, groups=groups)
    ours, plain, exact = (
        jax.jit(functools.partial(value_and_gradients, f))(d_out.astype(dtype), qkv.astype(dtype))
        for f, dtype in (
            (lambda x: fused_attention(x, None, **static, interpret=True), jnp.bfloat16),
            (functools.partial(plain_attention, **static), jnp.bfloat16),
            (functools.partial(plain_attention, **static), jnp.float32),
        )
    )
    assert_rounds_like(ours, plain, exact)


@pytest.mark.parametrize(("tokens", "groups", "queries"), [(1000, 1, 512), (2048, 2, 256)])
def test_the_attention_kernel_takes_many_tokens_in_blocks_of_queries(tokens, groups, queries):
    permutation = random_permutation(jax.random.key(2), tokens)
    qkv, d_out = normal(0, 1, tokens, 24), normal(1, 1, tokens, 8)
    assert _queries(qkv, 1, groups, permuted=True) == queries
    assert_attention_is_plain(qkv, permutation, d_out, heads=1, groups=groups)


def assert_attention_is_plain(qkv, permutation, d_out, heads, groups):
    """The kernel on `qkv` has the values and gradients of `plain_attention`."""
    static = dict(heads=heads, groups=groups)
    ours, theirs = (
        jax.jit(lambda d_out, qkv, p, f=f: value_and_gradients(lambda x: f(x, p), d_out, qkv))(
            d_out, qkv, permutation
        )
        for f in (
            functools.partial(fused_attention, **static, interpret=True),
            permuted(functools.partial(plain_attention, **static)),
        )
    )
    assert_close(ours, theirs)


def test_float64_which_a_tpu_has_not_is_left_to_xla():
    for dtype, held in ((np.float32, True), (np.float64, False)):
        assert can_hold(jax.ShapeDtypeStruct((1, 196, 192), dtype), 2, 1, permuted=False) == held
        assert fused_mlp.can_hold(jax.ShapeDtypeStruct((1, 196, 64), dtype), 128) == held


def test_tokens_that_overfill_the_fast_memory_are_permuted_outside_the_kernel():
    assert can_hold(jax.ShapeDtypeStruct((1, 784, 378), jnp.float32), 3, 2, permuted=True)
    x = normal(0, 1, 3136, 8)
    qkv = jax.ShapeDtypeStruct((1, 3136, 24), x.dtype)
    assert [can_hold(qkv, 1, 2, permuted=permuted) for permuted in (True, False)] == [False, True]
    plain = SlicedAttention(heads=1, layers=LayerSettings(Kernels(attention="xla")))
    settings = dict(groups=2, permutation=fixed_permutation(None, 3136))
    variables = plain.init(jax.random.key(0), x, **settings)
    fused = plain.clone(layers=LayerSettings(Kernels(attention="pallas")))
    ours, theirs = (
        jax.jit(functools.partial(m.apply, **settings))(variables, x) for m in (fused, plain)
    )
    assert_close(ours, theirs)


@pytest.mark.parametrize(("platform", "kernels"), [("tpu", True), ("cpu", False), ("cuda", False)])
def test_auto_takes_the_kernels_where_a_program_is_lowered_for_a_tpu(platform, kernels):
    x, k = normal(0, 1, 16, 8), jnp.ones(1)
    for layer, arguments in ((SlicedAttention(heads=1), (x,)), (ResidualMLP(16), (x, k))):
        variables = layer.init(jax.random.key(0), *arguments)
        traced = jax.jit(layer.apply).trace(variables, *arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert ("tpu_custom_call" in text) == kernels


@pytest.mark.parametrize(("tokens", "kernel"), [(2304, True), (4096, False)])
def test_attention_too_large_for_the_fast_memory_of_a_tpu_is_left_to_xla(tokens, kernel):
    layer = SlicedAttention(heads=3, layers=LayerSettings(dtype=jnp.bfloat16))
    x = jax.ShapeDtypeStruct((1, tokens, 126), jnp.bfloat16)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    text = jax.jit(layer.apply).trace(variables, x).lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == kernel


@needs_libtpu
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("tokens", "groups", "permuted", "dtype"),
    [
        (2512, 1, False, "bfloat16"),
        (4096, 8, False, "bfloat16"),
        (1792, 2, True, "bfloat16"),
        (1184, 2, True, "float32"),
    ],
)
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2"])
def test_the_largest_attention_that_a_kernel_is_given_compiles(
    chip, tokens, groups, permuted, dtype
):
    qkv = jax.ShapeDtypeStruct((2, tokens, 378), dtype)
    d_out = jax.ShapeDtypeStruct((2, tokens, 126), dtype)
    permutation = np.arange(tokens) if permuted else None
    larger = jax.ShapeDtypeStruct((2, tokens + 16 * groups, 378), dtype)
    sizes = [can_hold(x, 3, groups, permuted=permuted) for x in (qkv, larger)]
    assert sizes == [True, False]

    def run(d_out, qkv):
        attend = lambda x: fused_attention(x, permutation, 3, groups, False)  # noqa: E731
        return value_and_gradients(attend, d_out, qkv)

    compile_on(chip, run, d_out, qkv)


@needs_libtpu
@pytest.mark.usefixtures("no_compilation_cache")
@pytest.mark.parametrize(
    ("tokens", "channels", "hidden", "dtype"),
    [
        (4096, 126, 453, "bfloat16"),
        (784, 384, 1536, "bfloat16"),
        (49, 512, 2048, "bfloat16"),
        (49, 504, 1512, "float32"),
        (962, 256, 1024, "bfloat16"),
        (730, 144, 576, "bfloat16"),
    ],
)
@pytest.mark.parametrize("chip", ["v4:2x2x1", "v5e:2x2"])
def test_large_mlps_that_a_kernel_is_given_compile(chip, tokens, channels, hidden, dtype):
    layer = ResidualMLP(hidden, LayerSettings(dtype=dtype))
    x, k = jax.ShapeDtypeStruct((2, tokens, channels), dtype), jnp.ones(2)
    assert fused_mlp.can_hold(x, hidden)
    params = jax.eval_shape(layer.init, jax.random.key(0), x, k)

    def run(d_out, params, x):
        return value_and_gradients(lambda p, x: layer.apply(p, x, k), d_out, params, x)

    compile_on(chip, run, x, params, x)


def compile_on(chip, run, *arguments):
    """Compiles for a TPU that does not exist here; the program must contain a kernel."""
    sharding = jax.sharding.SingleDeviceSharding(open_topology(chip).devices[0])
    compiled = jax.jit(run, in_shardings=sharding).lower(*arguments).compile()
    assert "tpu_custom_call" in compiled.as_text()


@pytest.mark.parametrize(("channels", "kernel"), [(504, True), (768, False)])
def test_an_mlp_too_large_for_the_fast_memory_of_a_tpu_is_left_to_xla(channels, kernel):
    layer = ResidualMLP(int(3.6 * channels), LayerSettings(dtype=jnp.bfloat16))
    x, k = jax.ShapeDtypeStruct((1, 49, channels), jnp.bfloat16), jnp.ones(1)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, k)
    text = jax.jit(layer.apply).trace(variables, x, k).lower(lowering_platforms=("tpu",)).as_text()
    assert ("tpu_custom_call" in text) == kernel


def test_a_model_says_which_of_its_parts_run_as_kernels_on_a_device():
    tpu = SimpleNamespace(platform="tpu", device_kind="TPU v5e")
    published = create_model("sret_s", dtype=jnp.bfloat16)
    assert in_words(kernel_uses(published, tpu)) == ["all attention, MLPs and NLLs run as kernels"]
    assert kernel_uses(published, jax.devices("cpu")[0]) == []

    large = published.clone(dim=64, mlp_ratio=4.0)
    *_, last = in_words(kernel_uses(large, tpu))
    assert last == (
        "stage 2 (49 tokens of 768 channels): attention by a kernel; "
        "MLP, NLL by XLA (too large for a TPU's fast memory)"
    )
    assert in_words(kernel_uses(large, tpu, name="teacher"))[-1] == f"teacher, {last}"
    old = kernel_uses(large, SimpleNamespace(platform="tpu", device_kind="TPU v3"))
    assert {use.by for use in old} == {"XLA"}
    asked = kernel_uses(large.clone(attention="pallas"), jax.devices("cpu")[0])
    assert [use.by for use in asked if use.stage == 2] == ["an interpreted kernel", "XLA", "XLA"]


@pytest.mark.parametrize(
    ("tokens", "channels", "block"),
    [(784, 126, 784), (784, 252, 392), (197, 384, 197), (962, 256, 328), (196, 512, 0)],
)
def test_an_mlp_takes_fewer_tokens_at_a_time_where_its_weights_leave_less_room(
    tokens, channels, block
):
    x = jax.ShapeDtypeStruct((2, tokens, channels), jnp.bfloat16)
    assert fused_mlp._block(x, 4 * channels) == block


def with_settings(layer, **changes):
    return layer.clone(layers=dataclasses.replace(layer.layers, **changes))


def mlp_arguments(batch, tokens, channels, hidden, dtype=jnp.float32):
    layer = ResidualMLP(hidden, LayerSettings(Kernels(mlp="xla"), dtype))
    x = normal(0, batch, tokens, channels, dtype=dtype)
    keep = jnp.arange(batch) % 3 / 0.9
    shapes = layer.init(jax.random.key(0), x, keep)["params"]
    params = jax.tree.map(lambda p: p + 0.3 * normal(p.size, *p.shape), shapes)
    return layer, params, x, keep


@pytest.mark.parametrize(
    ("batch", "tokens", "channels", "hidden"),
    # The last block of 3,140 tokens is not full.
    [(4, 49, 42, 151), (3, 20, 16, 16), (2, 3140, 8, 12)],
)
def test_the_mlp_kernel_has_the_values_and_gradients_of_the_plain_layer(
    batch, tokens, channels, hidden
):
    layer, params, x, keep = mlp_arguments(batch, tokens, channels, hidden)
    fused = with_settings(layer, kernels=Kernels(mlp="pallas"))
    d_out = normal(2, *x.shape)
    ours, theirs = (
        jax.jit(functools.partial(value_and_gradients, apply))(d_out, params, x, keep)
        for apply in (lambda p, x, k, m=m: m.apply({"params": p}, x, k) for m in (fused, layer))
    )
    assert_close(ours, theirs, 1e-5)
    assert np.abs(ours[1][2]).min() > 0, "the drop path's factor has a gradient too"


def test_the_mlp_kernel_in_bfloat16_is_as_exact_as_the_plain_layer():
    layer, params, x, keep = mlp_arguments(2, 16, 32, 64, jnp.bfloat16)
    d_outs = normal(2, 12, *x.shape, dtype=jnp.bfloat16)  # coefficients' gradients are single sums

    @functools.partial(jax.jit, static_argnums=0)
    def results(model, params, x):
        def run(params, x):
            return model.apply({"params": params}, x, keep).astype(jnp.bfloat16)

        out, vjp = jax.vjp(run, params, x)
        return out, jax.lax.map(vjp, d_outs)

    fused = with_settings(layer, kernels=Kernels(mlp="pallas"))
    exact = with_settings(layer, dtype=jnp.float32)
    assert_rounds_like(*(results(model, params, x) for model in (fused, layer, exact)))


def moved_bytes(call):
    """Bytes that the blocks of a grid move: each one when its index changes between steps."""
    total = 0
    mapping = call.params["grid_mapping"]
    for block in mapping.block_mappings:
        index = jaxpr_as_fun(block.index_map_jaxpr)
        indices = [
            list(map(int, index(*step))) for step in itertools.product(*map(range, mapping.grid))
        ]
        changes = 1 + sum(a != b for a, b in itertools.pairwise(indices))
        shape = [getattr(n, "block_size", n) for n in block.block_shape]
        shape = [n for n in shape if isinstance(n, int)]
        total += changes * tiled_bytes(shape, block.array_aval.dtype)
    return total


def kernel_calls(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for inner in inner_jaxprs(equation.params):
            yield from kernel_calls(inner)


def kernel_macs(call):
    return math.prod(call.params["grid_mapping"].grid) * jaxpr_macs(call.params["jaxpr"])


def attention_program(permutation=None, tokens=48, groups=4):
    qkv, d_out = normal(0, 4, tokens, 3 * 24), normal(1, 4, tokens, 24)
    return lambda qkv: value_and_gradients(
        lambda x: fused_attention(x, permutation, 3, groups, True), d_out, qkv
    ), qkv


def attention_in_blocks_program():
    return attention_program(tokens=1500, groups=1)


def permuted_attention_program():
    return attention_program(fixed_permutation(None, 48))


def mlp_program():
    layer, params, x, keep = mlp_arguments(4, 3136, 16, 24)
    fused = with_settings(layer, kernels=Kernels(mlp="pallas"))
    run = lambda x: value_and_gradients(  # noqa: E731
        lambda p, x: fused.apply({"params": p}, x, keep), x, params, x
    )
    return run, x


@pytest.mark.parametrize(
    "program",
    [attention_program, attention_in_blocks_program, permuted_attention_program, mlp_program],
)
def test_cost_estimates_follow_from_the_blocks_the_grid_and_the_program(program):
    run, x = program()
    calls = list(kernel_calls(jax.make_jaxpr(run)(x).jaxpr))
    assert len(calls) >= 2
    for call in calls:
        estimate = call.params["cost_estimate"]
        assert estimate.bytes_accessed == moved_bytes(call)
        assert estimate.flops == 2 * kernel_macs(call)


def test_a_model_with_kernels_on_many_devices_has_the_gradients_of_one_without():
    mesh = make_mesh(fsdp=2)
    small = dict(image_size=16, groups=((2, 2),), blocks=(1,), loops=2, heads=(2,), dim=8)
    plain = create_model("sret_t", num_classes=5, attention="xla", mlp="xla", **small)
    fused = plain.clone(attention="pallas", mlp="pallas", mesh=mesh)
    images = jax.device_put(normal(0, 16, 16, 16, 3), batch_sharding(mesh))
    variables = jax.jit(plain.init)(jax.random.key(0), images)
    variables = jax.device_put(variables, NamedSharding(mesh, PartitionSpec()))

    def loss(params, model):
        logits, _ = model.apply(
            {**variables, "params": params},
            images,
            train=True,
            rngs={"drop_path": jax.random.key(1), "permutation": jax.random.key(2)},
            mutable=["batch_stats"],
        )
        return jnp.sum(jnp.sin(logits))

    ours, theirs = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(variables["params"], model)
        for model in (fused, plain)
    )
    assert_close(ours, theirs, 1e-5)
