"""The directions in which the loss around trained weights is computed, and its curvatures."""

import jax
import numpy as np

import sret_jax
from sret_jax.evaluation.loss_surface import filter_normalised_direction, grid, principal_curvatures
from sret_jax.weights.torch_names import to_torch


def test_every_filter_of_a_direction_is_as_long_as_that_of_the_weights(saved_run):
    model, variables = sret_jax.load(saved_run)
    draw = jax.jit(filter_normalised_direction)
    direction = draw(variables["params"], jax.random.key(1))
    # In torch, axis 0 counts the filters of linear maps, convolutions and depthwise convolutions.
    weights = to_torch(variables, model)
    moves = to_torch({**variables, "params": direction}, model)
    statistics = ("running_mean", "running_var")
    kernels = {n for n, w in weights.items() if n.endswith(".weight") and w.ndim > 1}
    assert len(kernels) > 20
    for name in weights.keys() - kernels:
        assert name.endswith(statistics) or not np.any(moves[name]), name
    for name in kernels:
        lengths = [
            np.linalg.norm(x.reshape(len(x), -1), axis=1) for x in (moves[name], weights[name])
        ]
        np.testing.assert_allclose(*lengths, rtol=1e-4, err_msg=name)
        assert not np.allclose(moves[name], weights[name])

    again, other = (draw(variables["params"], jax.random.key(seed)) for seed in (1, 2))
    head = ("head", "kernel")
    at = [np.asarray(tree[head[0]][head[1]]) for tree in (direction, again, other)]
    assert np.array_equal(at[0], at[1]) and not np.allclose(at[0], at[2])


def test_the_curvatures_are_the_eigenvalues_of_a_quadratic_loss():
    at = grid(np.array([-0.5, 0.0, 0.5]))  # (9, 2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    hessian = turn @ np.diag([2.0, 9.0]) @ turn.T
    losses = 0.3 + np.einsum("ik,kl,il->i", at, hessian, at).reshape(3, 3) / 2
    np.testing.assert_allclose(principal_curvatures(losses, 0.5), [2, 9])
    losses[2, 1] = np.inf
    assert principal_curvatures(losses, 0.5) is None
