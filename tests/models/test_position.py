import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.position import resize_position, with_image_size

TORCH = np.load(pathlib.Path(__file__).parent.parent / "data" / "position.npz")


@pytest.mark.parametrize("sizes", ["8_12", "28_48", "12_8"])
def test_positions_are_resized_as_torch_resizes_bicubically(sizes):
    resized = resize_position(jnp.asarray(TORCH[f"{sizes}/in"]), int(sizes.split("_")[1]))
    np.testing.assert_allclose(resized, TORCH[f"{sizes}/out"], atol=1e-4)
    by_jax = jax.image.resize(TORCH[f"{sizes}/in"], resized.shape, "bicubic", antialias=False)
    assert np.abs(by_jax - TORCH[f"{sizes}/out"]).max() > 0.01  # its kernel is another


def test_another_image_size_changes_the_positions_alone():
    model = sret_jax.create_model(
        "sret_t", image_size=16, blocks=(1,), groups=((2, 1),), heads=(2,), dim=8
    )
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
    larger, resized = with_image_size(model, variables, 48)
    assert larger == model.clone(image_size=48)
    assert resized["params"]["pos_embed"].shape == (1, 6, 6, 16)
    for tree in (variables, resized):
        tree["params"].pop("pos_embed")
    jax.tree.map(np.testing.assert_array_equal, variables, resized)
    with pytest.raises(ValueError, match="image_size=20 is not divisible by 8"):
        with_image_size(model, variables, 20)
