"""Changes of the state, application by application."""

import numpy as np

import sret_jax
from sret_jax.models.dynamics import dynamics
from tests.explicit import distinct_weights
from tests.timm_models import images


def test_changes_are_those_of_the_states_of_each_block(float64):
    model = sret_jax.create_model(
        "deit_tiny",
        num_classes=5,
        image_size=16,
        patch_size=8,
        blocks=(2,),
        loops=3,
        heads=(2,),
        dim=4,
        dtype=np.float64,
    )
    weights = distinct_weights(model)
    found = dynamics(model, weights, images(16))
    changes, cosines, ratios = [], [], []
    seen = model.apply(weights, images(16), lambda before, x: (before, x), method="observed")
    for before, after in seen:
        before, after = (np.asarray(x).reshape(3, 2, -1) for x in (before, after))
        updates = after - before  # (loops, B, N * C)
        norms = np.linalg.norm(updates, axis=-1)
        changes += (norms / np.linalg.norm(before, axis=-1)).mean(1).tolist()
        products = (updates[1:] * updates[:-1]).sum(-1) / (norms[1:] * norms[:-1])
        cosines += [None, *products.mean(1).tolist()]
        ratios += [None, *(norms[1:] / norms[:-1]).mean(1).tolist()]
    for name, expected in (
        ("relative_change", changes),
        ("cosine", cosines),
        ("contraction", ratios),
    ):
        assert [value is None for value in found[name]] == [value is None for value in expected]
        np.testing.assert_allclose(
            np.array(found[name], float), np.array(expected, float), rtol=1e-9
        )
    np.testing.assert_allclose(
        found["contraction_rate"],
        [np.sqrt(ratios[1] * ratios[2]), np.sqrt(ratios[4] * ratios[5])],
        rtol=1e-9,
    )
