"""Our numbers against those of the published implementation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sret_jax
from configs import common
from sret_jax.models.flops import model_macs
from sret_jax.models.variables import abstract_variables
from sret_jax.training.optimizer import make_optimizer
from tests import golden

TINY = [name for name in golden.MODELS if name.startswith("tiny")]
WITH_GRADIENTS = ("tiny_sliced", "tiny_unsliced_3_loops")
FULL_SIZE = [
    name if name in ("sret_t", "sret_t_unsliced") else pytest.param(name, marks=pytest.mark.slow)
    for name in golden.MODELS
    if name not in TINY
]
# Relative to the largest entry. For any order of summation, rounding in these models is at most
# 1e-13 in float64 and below 1e-3 in float32, even in sums that nearly cancel.
LIMITS = {"float64": 1e-10, "float32": 1e-3}

GMACS = [  # from the published table, to three decimals
    ("sret_t", {}, 1.112),
    ("sret_t", dict(groups=None), 1.366),
    ("sret_lt", {}, 1.164),
    ("sret_lt", dict(groups=((16, 1), (14, 1), (1, 1))), 1.225),
    ("sret_lt", dict(groups=None), 1.418),
    ("sret_s", {}, 4.173),
    ("sret_s", dict(groups=None), 4.671),
    ("sret_t", dict(groups=None, image_size=384), 6.408),
    pytest.param("sret_s", dict(groups=None, image_size=384), 18.443, marks=pytest.mark.slow),
    ("sret_s", dict(groups=None, image_size=512), 42.672),
]


def assert_close(ours, published, dtype, err_msg=""):
    atol = LIMITS[dtype] * np.abs(published).max()
    np.testing.assert_allclose(ours, published, rtol=0, atol=atol, err_msg=err_msg)


@pytest.mark.parametrize("name", golden.MODELS)
def test_the_parameters_are_as_many_as_the_published_ones(name):
    params = abstract_variables(golden.build(name))["params"]
    assert sum(p.size for p in jax.tree.leaves(params)) == golden.MODELS[name]["num_params"]


@pytest.mark.parametrize("name", FULL_SIZE)
def test_logits_are_the_published_ones(name):
    check_logits(name, "float32", golden.ARRAYS)


@pytest.mark.parametrize("name", TINY)
def test_logits_in_float64_are_the_published_ones(name):
    with jax.enable_x64(True):
        check_logits(name, "float64", golden.ARRAYS64)


@pytest.mark.parametrize("name", ["tiny_sliced", "tiny_sliced_all"])
def test_logits_of_random_permutations_are_the_published_ones(name):
    check_logits(name, "float32", golden.ARRAYS)


def check_logits(name, dtype, published):
    model = golden.build(name, permutation="identity", dtype=jnp.dtype(dtype).type)
    variables = golden.variables(model, dtype)
    x = golden.images(0, 1, batch=2, size=model.image_size).astype(dtype)
    random = {int(k.split("/")[1]): golden.ARRAYS[k] for k in golden.ARRAYS if k[:5] == "perm/"}
    identity = {n: np.arange(n) for n in random}

    @jax.jit
    def apply(variables, x, permutations):
        permuted = model.clone(permutation=lambda key, n: permutations[n])
        return permuted.apply(variables, x, rngs={"permutation": jax.random.key(0)})

    kinds = [k for k in published if k.startswith(f"{name}/logits")]
    assert kinds
    for kind in kinds:
        logits = apply(variables, x, random if kind.endswith("random_perm") else identity)
        assert logits.dtype == dtype
        assert_close(logits, published[kind], dtype, kind)


def test_published_variants_are_those_of_the_reference():
    for name in ("sret_t", "sret_lt", "sret_s"):
        assert sret_jax.create_model(name, drop_path_rate=0.0) == golden.build(name)


def loss_fn(model, params, batch_stats, images, labels):
    logits, updates = model.apply(
        {"params": params, "batch_stats": batch_stats}, images, train=True, mutable=["batch_stats"]
    )
    targets = optax.smooth_labels(jax.nn.one_hot(labels, 10), 0.1)
    return optax.losses.softmax_cross_entropy(logits, targets).mean(), (
        logits,
        updates["batch_stats"],
    )


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tiny_sliced", "float64"),
        ("tiny_unsliced_3_loops", "float32"),
        *(
            pytest.param(name, "float64", marks=pytest.mark.slow)
            for name in TINY
            if name != "tiny_sliced"
        ),
    ],
)
def test_training_mode_logits_gradients_and_statistics_are_the_published_ones(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        check_training_mode(name, dtype)


def check_training_mode(name, dtype):
    model = golden.build(name, permutation="identity", dtype=jnp.dtype(dtype).type)
    variables = golden.variables(model, dtype)
    x = golden.images(0, 2, batch=8, size=64).astype(dtype)
    labels = np.random.default_rng([0, 3]).integers(0, 10, 8)
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn, argnums=1, has_aux=True), static_argnums=0)
    (loss, (logits, stats)), grads = value_and_grad(
        model, variables["params"], variables["batch_stats"], x, labels
    )
    for leaf in jax.tree.leaves((loss, logits, stats, grads)):
        assert leaf.dtype == dtype
    arrays = golden.ARRAYS64
    expected = {k.split("/", 1)[1]: arrays[k] for k in arrays if k.startswith(name + "/")}
    assert_close(logits, expected["train_logits"], dtype)
    assert_close(loss, expected["train_loss"], dtype)

    ours = sret_jax.to_torch({"params": grads, "batch_stats": stats}, model)
    gradients = {k: v for k, v in expected.items() if k.startswith("grad/")}
    buffers = ("running_mean", "running_var")
    keys = golden.MODELS[name]["keys"]
    if name in WITH_GRADIENTS:
        assert len(gradients) == len({c for n, c, _ in keys if not n.endswith(buffers)})
    largest = max(np.abs(gradient).max() for gradient in gradients.values()) if gradients else 0
    for key, published in gradients.items():
        gradient = ours[key.removeprefix("grad/")]
        if "patch_embed.conv" in key and key.endswith("bias"):
            # BatchNorm subtracts the mean, so the exact gradient is 0; both contain rounding noise.
            assert np.abs(gradient).max() < LIMITS[dtype] * largest
        else:
            assert_close(gradient, published, dtype, key)

    before = sret_jax.to_torch(variables, model)
    statistics = [k for k in expected if k.startswith("after/")]
    assert len(statistics) == 6
    for key in statistics:
        buffer = key.removeprefix("after/")
        new = ours[buffer]
        if buffer.endswith("running_var"):
            # torch averages the unbiased variance: n / (n - 1) of the biased one.
            side = 64 // 2 ** int(buffer.split("bn")[1][0])
            n = 8 * side**2
            new = 0.9 * before[buffer] + (new - 0.9 * before[buffer]) * n / (n - 1)
        assert_close(new, expected[key], dtype, key)


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("tiny_unsliced_1_loop", 6),
        *(pytest.param(name, 40, marks=pytest.mark.slow) for name in TINY),
    ],
)
def test_adamw_steps_follow_the_published_loss_curve(name, steps):
    with jax.enable_x64(True):
        losses = adamw_losses(golden.build(name, permutation="identity", dtype=np.float64), steps)
    assert_close(losses, golden.ARRAYS64[f"{name}/adamw_losses"][:steps], "float64")


def adamw_losses(model, steps):
    variables = golden.variables(model, "float64")
    optimizer = make_optimizer(common.get_config().optim)

    @jax.jit
    def step(params, batch_stats, opt_state, images, labels, lr):
        (loss, (_, batch_stats)), grads = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)(
            model, params, batch_stats, images, labels
        )
        direction, opt_state = optimizer.update(grads, opt_state, params, weight_decay=0.05)
        params = optax.apply_updates(params, optax.tree.scale(-lr, direction))
        return params, batch_stats, opt_state, loss

    params, batch_stats = variables["params"], variables["batch_stats"]
    opt_state = optimizer.init(params)
    losses = []
    for t in range(steps):
        images, labels = golden.adamw_batch(t)
        params, batch_stats, opt_state, loss = step(
            params,
            batch_stats,
            opt_state,
            images.astype("float64"),
            labels,
            1e-3 * min(1, (t + 1) / 10),
        )
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(("name", "overrides", "published"), GMACS)
def test_macs_counted_from_the_program_are_the_published_ones(name, overrides, published):
    model = sret_jax.create_model(name, **overrides)
    assert model_macs(model) / 1e9 == pytest.approx(published, abs=5e-4)
