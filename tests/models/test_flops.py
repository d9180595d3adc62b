"""Multiply-accumulates against products of shapes."""

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.sharding import PartitionSpec

from sret_jax.models.flops import count_macs, exit_macs, model_macs
from sret_jax.models.registry import create_model
from sret_jax.parallel.mesh import BATCH_AXES, make_mesh

SQUARE = jax.ShapeDtypeStruct((32, 32), "float32")
MACS = 32**3


def multiply(x):
    return x @ x


def test_a_scan_counts_its_body_as_often_as_it_runs():
    assert count_macs(lambda x: jax.lax.scan(lambda x, _: (x @ x, None), x, length=7), SQUARE) == (
        7 * MACS
    )


def test_a_pallas_kernel_counts_once_for_each_step_of_its_grid():
    def kernel(x, out):
        out[...] = x[...] @ x[...]

    call = pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((6, 32, 32), "float32"),
        grid=(3, 2),
        in_specs=[pl.BlockSpec((None, 32, 32), lambda i, j: (2 * i + j, 0, 0))],
        out_specs=pl.BlockSpec((None, 32, 32), lambda i, j: (2 * i + j, 0, 0)),
    )
    assert count_macs(call, jax.ShapeDtypeStruct((6, 32, 32), "float32")) == 6 * MACS


def test_a_shard_map_counts_once_for_each_device():
    spec = PartitionSpec(BATCH_AXES)
    mapped = jax.shard_map(
        lambda x: x @ x.swapaxes(1, 2), mesh=make_mesh(), in_specs=spec, out_specs=spec
    )
    assert count_macs(mapped, jax.ShapeDtypeStruct((16, 32, 32), "float32")) == 16 * MACS


def test_of_the_branches_for_several_platforms_the_dearest_counts():
    def choose(x):
        return jax.lax.platform_dependent(x, tpu=lambda x: x @ x @ x, default=multiply)

    assert count_macs(choose, SQUARE) == 2 * MACS


def test_a_while_loop_may_hold_no_matrix_products():
    def loop(body):
        return lambda x: jax.lax.while_loop(lambda x: jnp.all(x < 1), body, x)

    assert count_macs(loop(jnp.tanh), SQUARE) == 0
    with pytest.raises(ValueError, match="trip count is unknown"):
        count_macs(loop(multiply), SQUARE)


def test_the_gradient_of_a_strided_convolution_costs_what_the_convolution_does():
    images = jax.ShapeDtypeStruct((2, 16, 16, 8), "float32")
    kernel = jax.ShapeDtypeStruct((3, 3, 8, 4), "float32")

    def convolve(images, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            images, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers
        )

    def gradient(images, kernel):
        return jax.grad(lambda i, k: convolve(i, k).sum(), argnums=(0, 1))(images, kernel)

    forward = 2 * 8 * 8 * 4 * 9 * 8
    assert count_macs(convolve, images, kernel) == forward
    assert count_macs(gradient, images, kernel) == 3 * forward


@pytest.mark.parametrize("loops", [1, 5])
def test_an_image_that_leaves_early_costs_the_applications_and_read_outs_until_then(loops):
    model = create_model(
        "sret_t",
        num_classes=10,
        image_size=32,
        blocks=(1,),
        heads=(2,),
        dim=8,
        stem_stride=4,
        groups=((4, 1),),
        loops=loops,
        nll_every=1,
    )
    found, head = exit_macs(model), 16 * 10  # channels * classes
    assert len(found) == loops
    for k, macs in enumerate(found, 1):  # of one unique block, an exit is the model with k loops
        assert macs == model_macs(model.clone(loops=k)) + (k - 1) * head
