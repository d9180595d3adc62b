"""Convolutions against plain sums."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax.models.layers.convolution import (
    _grouped,
    _shifted,
    flat_convolution,
    patch_convolution,
    patch_product,
)


@pytest.mark.parametrize("run", [_grouped, _shifted])
@pytest.mark.parametrize("sides", [(6, 4), (5, 3)])
def test_a_grouped_convolution_is_the_sum_of_its_definition(run, sides):
    x = jax.random.normal(jax.random.key(0), (2, *sides, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    out = run(x, kernel)
    assert out.shape == (2, 3, 2, 6)  # an odd side is rounded up
    for b, r, s, c, k in np.ndindex(2, 3, 2, 3, 2):
        window = padded[b, 2 * r : 2 * r + 3, 2 * s : 2 * s + 3, c]
        expected = (window * kernel[:, :, c, k]).sum()
        np.testing.assert_allclose(out[b, r, s, 2 * c + k], expected, rtol=1e-4, atol=1e-4)


def test_both_forms_of_a_grouped_convolution_have_the_same_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 3, 2))

    def gradients(run):
        return jax.grad(lambda x, kernel: jnp.sum(run(x, kernel) ** 2), (0, 1))(x, kernel)

    for a, b in zip(gradients(_grouped), gradients(_shifted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_patches_is_one_matrix_product_in_values_and_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    kernel = jax.random.normal(jax.random.key(1), (2, 2, 3, 5))

    def loss(run, x, kernel):
        out = run(x, kernel)
        return (out**2).sum(), out

    plain, product = (
        jax.grad(functools.partial(loss, run), (0, 1), has_aux=True)(x, kernel)
        for run in (patch_convolution, patch_product)
    )
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(product), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 8, 6, 3), (2, 7, 5, 3)])
def test_a_flat_convolution_has_the_values_and_gradients_of_the_plain_one(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    plain = nn.Conv(4, (3, 3), strides=2, padding=1)
    variables = plain.init(jax.random.key(1), x)

    def run(layer):
        def loss(variables, x):
            return (layer.apply(variables, x) ** 2).sum()

        return layer.apply(variables, x), jax.grad(loss, (0, 1))(variables, x)

    flat = plain.clone(conv_general_dilated=flat_convolution)
    for a, b in zip(*(jax.tree.leaves(run(layer)) for layer in (plain, flat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
