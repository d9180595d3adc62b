"""The small layers against plain mathematics."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sret_jax.models.kernels.choice import Kernels
from sret_jax.models.layers.linear import LayerSettings, gelu
from sret_jax.parallel.mesh import make_mesh


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_gelu_is_x_times_the_normal_distribution_at_x(dtype, tolerance):
    x = jnp.linspace(-6, 6, 241).astype(dtype)
    exact = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in np.asarray(x, np.float64)]
    y = gelu(x)
    assert y.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0, atol=tolerance)


def test_joining_axes_changes_neither_a_linear_map_nor_its_gradients():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5))
    plain, flat = (
        LayerSettings(Kernels(mesh=mesh)).linear(4, 5, name="map") for mesh in (None, make_mesh())
    )
    variables = plain.init(jax.random.key(1), x)
    assert jax.tree.all(jax.tree.map(jnp.array_equal, variables, flat.init(jax.random.key(1), x)))

    def gradients(layer):
        return jax.grad(lambda v, x: (layer.apply(v, x) ** 2).sum(), (0, 1))(variables, x)

    for a, b in zip(*(jax.tree.leaves(gradients(m)) for m in (plain, flat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
