import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sret_jax
from configs import common
from sret_jax.data.views.mixing import Mixing
from sret_jax.evaluation.evaluation import empty_totals, make_eval_step
from sret_jax.models.apply import normalise
from sret_jax.models.loops import with_loops
from sret_jax.parallel.mesh import batch_sharding, make_mesh, replicated, state_shardings
from sret_jax.training.hyperparameters import Hyperparameters, Schedule
from sret_jax.training.losses import LabelLoss, in_top_k
from sret_jax.training.mixed_depth import DEEP_ONLY, MixedDepth
from sret_jax.training.optimizer import make_optimizer
from sret_jax.training.state import init_state
from sret_jax.training.step import make_train_step, micro_batches

SGD = optax.identity()  # params <- params - lr * gradient
ADAM = optax.scale_by_adam()
SETTINGS = dict(mixing=Mixing(label_smoothing=0.1), grad_accum=1, label_loss=LabelLoss())
FULL = Mixing(erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
MODEL = sret_jax.create_model(
    "sret_t",
    num_classes=10,
    image_size=16,
    blocks=(1,),
    groups=((2, 2),),
    heads=(4,),
    dim=8,
    drop_path_rate=0.0,
    permutation="identity",
)
SMALLEST = MODEL.clone(loops=1, groups=((1,),))


def batch(size=32):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 16, 16, 3), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "bad": np.arange(size) == 3,
        "real": np.ones(size, bool),
    }


def numbers(**changes):
    """Hyper-parameters with a constant learning rate of 0.1."""
    schedule = Schedule(*map(np.float32, (0.1, 0.0, 1.0, 0, 1)))
    settings = dict(seed=0, weight_decay=0.0, ema_rate=0.1, ema_warmup=False)
    return Hyperparameters(schedule=schedule, **{**settings, **changes})


@functools.cache
def fresh_variables(model):
    """Initial weights as NumPy arrays."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.device_get(jax.jit(model.init)(jax.random.key(0), images))


@functools.cache
def make_step(model, optimizer, fsdp, **settings):
    """The step, compiled once for all tests, and the shapes and shardings of its state."""
    mesh = make_mesh(fsdp)
    abstract = jax.eval_shape(lambda: init_state(model, optimizer, 0))
    shardings = state_shardings(abstract, mesh)
    step = make_train_step(model, optimizer, mesh, shardings, **settings)
    return step, abstract, shardings


def start(model, optimizer, fsdp=1, **changes):
    """A fresh state, the step, and the step's other arguments."""
    step, abstract, shardings = make_step(model, optimizer, fsdp, **{**SETTINGS, **changes})
    variables = fresh_variables(model)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = jax.device_put(state.replace(variables=variables, ema=variables), shardings)
    return state, step, place(batch(), make_mesh(fsdp))


def place(data, mesh):
    return jax.device_put(data, batch_sharding(mesh)), jax.device_put(numbers(), replicated(mesh))


def test_a_step_updates_weights_statistics_average_and_counter():
    state, step, data = start(MODEL, SGD)
    before = jax.device_get(state)
    state, metrics = step(state, *data)
    assert int(state.step) == 1
    assert float(metrics["bad_images"]) == 1
    kernel = lambda s: np.asarray(s["params"]["head"]["kernel"])  # noqa: E731
    mean = lambda s: np.asarray(s["batch_stats"]["stem"]["bn1"]["mean"])  # noqa: E731
    for leaf in (kernel, mean):
        old, new = leaf(before.variables), leaf(state.variables)
        assert not np.allclose(old, new)
        np.testing.assert_allclose(leaf(state.ema), 0.9 * old + 0.1 * new, rtol=1e-5, atol=1e-6)


def test_both_heads_of_a_distilled_model_learn_alone_where_the_backbone_is_frozen():
    sizes = dict(num_classes=10, image_size=16, blocks=(1,), heads=(2,), dim=8, patch_size=8)
    model = sret_jax.create_model("deit_tiny_distilled", **sizes)
    loss = LabelLoss(kind="hard", hard_weight=0.5)
    state, step, (data, numbers) = start(model, SGD, head_only=True, label_loss=loss)
    soft = np.random.default_rng(1).dirichlet(np.ones(10), 32).astype(np.float16)
    before = jax.device_get(state.variables["params"])

    def plain(params):
        images = normalise(model, jnp.asarray(batch()["image"]))
        of_labels, of_teacher = model.apply({"params": params}, images, method="head_logits")
        labels = optax.smooth_labels(jax.nn.one_hot(batch()["label"], 10), 0.1)
        entropy = optax.losses.softmax_cross_entropy(of_labels, labels).mean()
        teacher = optax.losses.softmax_cross_entropy_with_integer_labels(
            of_teacher, soft.argmax(-1)
        )
        return 0.5 * entropy + 0.5 * teacher.mean()

    expected, gradient = jax.jit(jax.value_and_grad(plain))(before)
    soft = jax.device_put(soft, batch_sharding(make_mesh(1)))
    state, metrics = step(state, {**data, "soft": soft}, numbers)
    assert float(metrics["loss"]) == pytest.approx(float(expected), rel=1e-5)
    for part, new in jax.device_get(state.variables["params"]).items():
        moved = 0.1 if part in ("head", "head_dist") else 0.0
        wanted = jax.tree.map(lambda p, g, lr=moved: p - lr * g, before[part], gradient[part])
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), new, wanted)


def test_a_step_that_is_not_finite_updates_nothing_but_the_counters():
    state, step, data = start(MODEL, ADAM, fsdp=4)
    bias = state.variables["params"]["head"]["bias"]
    state.variables["params"]["head"]["bias"] = bias.at[3].set(jnp.nan)
    before = jax.device_get(state)
    for streak in (1, 2):
        state, metrics = step(state, *data)
        assert int(metrics["bad_streak"]) == streak and np.isnan(float(metrics["loss"]))
    assert (int(state.step), int(state.bad_streak)) == (2, 2)
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get(state.replace(step=0, bad_streak=0)),
        before.replace(step=0, bad_streak=0),
    )
    state.variables["params"]["head"]["bias"] = bias  # of before: fixed
    state, metrics = step(state, *data)
    assert (int(state.step), int(state.bad_streak)) == (3, 0)


def test_only_the_head_moves_where_the_backbone_is_frozen():
    optim = common.get_config().optim
    optim.update(freeze_backbone=True, layer_decay=0.5)
    state, step, data = start(SMALLEST, make_optimizer(optim), head_only=True, fsdp=2)
    before = jax.device_get(state.variables)
    for _ in range(2):
        state, metrics = step(state, *data)
    after = jax.device_get(state.variables)
    for variables in (before, after):
        head = variables["params"].pop("head")
        variables["kernel"] = head["kernel"]
    assert float(metrics["grad_norm"]) > 0
    assert not np.allclose(before.pop("kernel"), after.pop("kernel"))
    jax.tree.map(np.testing.assert_array_equal, after, before)


def stepped(model, **settings):
    """The change of the weights in a step, the statistics after it and the loss."""
    state, step, data = start(model, SGD, **settings)
    weights = with_loops(MODEL, fresh_variables(MODEL), model.loops)[1]
    variables = jax.tree.map(lambda w, x: jax.device_put(w, x.sharding), weights, state.variables)
    state, metrics = step(state.replace(variables=variables), *data)
    state = jax.device_get(state)
    moved = jax.tree.map(np.subtract, state.variables["params"], weights["params"])
    return moved, state.variables["batch_stats"], float(metrics["loss"])


def test_a_step_of_other_loops_is_that_of_the_model_with_these_loops():
    actual, statistics, loss = stepped(MODEL, loops=1, grad_accum=2)
    expected, wanted_statistics, wanted = stepped(MODEL.clone(loops=1), grad_accum=2)
    assert loss == pytest.approx(wanted, rel=1e-5)

    def check(path, actual, expected):
        if "nll" in jax.tree_util.keystr(path):  # the second row has no gradient
            expected = np.concatenate([expected, np.zeros_like(actual[1:])])
        np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)

    jax.tree_util.tree_map_with_path(check, actual, expected)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-4), statistics, wanted_statistics
    )


def test_mixed_depth_adds_the_shallow_paths_loss_and_gradient():
    """With SGD, the step for deep + w shallow is the sum of the two models' own steps."""
    deep, statistics, deep_loss = stepped(MODEL)
    shallow, _, shallow_loss = stepped(MODEL.clone(loops=1))
    mixed, mixed_statistics, mixed_loss = stepped(
        MODEL, mixed_depth=MixedDepth(loops=1, weight=0.5)
    )
    assert mixed_loss == pytest.approx(deep_loss + 0.5 * shallow_loss, rel=1e-4)
    jax.tree.map(np.testing.assert_array_equal, mixed_statistics, statistics)

    def check(path, mixed, deep, shallow):
        if "nll" in jax.tree_util.keystr(path):  # the shallow path has only the first
            shallow = np.concatenate([shallow, np.zeros_like(deep[1:])])
        # Sums that cancel round by the size of their terms: the largest move is no more than 1.
        np.testing.assert_allclose(mixed, deep + 0.5 * shallow, rtol=1e-3, atol=1e-5)

    jax.tree_util.tree_map_with_path(check, mixed, deep, shallow)


def test_a_second_forward_pass_of_mixed_depth_draws_permutations_of_its_own():
    """If both paths had the same key, the loss would be the sum of their losses alone."""
    model = MODEL.clone(blocks=(2,), loops=3, permutation="random")

    def losses(loops, mixed_depth=DEEP_ONLY):
        """The losses of eight steps with the same weights, each with its own key."""
        alone, weights = with_loops(model, fresh_variables(model), loops)
        state, step, data = start(alone, SGD, mixed_depth=mixed_depth)
        loss = jax.jit(lambda state, *data: step(state, *data)[1]["loss"])  # needs no gradient
        state = state.replace(variables=weights)
        return np.array([loss(state.replace(step=np.int32(i)), *data) for i in range(8)])

    mixed, deep, shallow = losses(3, MixedDepth(loops=2)), losses(3), losses(2)
    assert np.abs(mixed - (deep + shallow)).max() > 1e-3  # rounding leaves 1e-6


def test_batch_statistics_are_those_of_the_global_batch():
    state, step, data = start(MODEL, SGD)
    params = jax.device_get(state.variables["params"]["stem"]["conv1"])
    state, _ = step(state, *data)
    x = jax.lax.conv_general_dilated(
        normalise(MODEL, jnp.asarray(batch()["image"])),
        params["kernel"],
        (2, 2),
        ((1, 1), (1, 1)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    expected = 0.1 * (x + params["bias"].reshape(1, 1, 1, -1)).mean((0, 1, 2))
    actual = state.variables["batch_stats"]["stem"]["bn1"]["mean"]
    np.testing.assert_allclose(actual, expected, rtol=1e-3, atol=1e-5)


def test_accumulation_takes_equal_shares_of_every_devices_rows():
    mesh = make_mesh()
    rows = jax.device_put(np.arange(32), batch_sharding(mesh))
    parts = jax.jit(lambda x: micro_batches(x, 2, mesh))(rows)
    assert parts.shape == (2, 16)
    for shard in parts.addressable_shards:
        device = int(shard.data[0, 0]) // 4
        np.testing.assert_array_equal(shard.data, 4 * device + np.array([[0, 1], [2, 3]]))


def test_accumulated_gradients_are_the_mean_over_micro_batches():
    """BatchNorm works per micro-batch, so a batch of equal halves gives what one half gives."""
    half = batch()
    rows = np.arange(64).reshape(8, 2, 4)  # device, micro-batch, row
    twice = {key: np.empty((64, *value.shape[1:]), value.dtype) for key, value in half.items()}
    for key, value in half.items():
        for part in range(2):
            twice[key][rows[:, part].ravel()] = value

    def parameters(data, **changes):
        state, step, _ = start(MODEL, SGD, **changes)
        state, metrics = step(state, *place(data, make_mesh()))
        return jax.device_get(state.variables["params"]), metrics

    expected, one = parameters(half)
    actual, accumulated = parameters(twice, grad_accum=2)
    assert float(accumulated["loss"]) == pytest.approx(float(one["loss"]), rel=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), actual, expected
    )


def test_fsdp_splits_parameters_and_optimizer_state():
    state, step, data = start(MODEL, ADAM, fsdp=4)
    moments = [s.mu for s in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu"))
               if hasattr(s, "mu")]  # fmt: skip
    for tree in (state.variables["params"], *moments):
        kernel = tree["stage0_block0"]["block"]["mlp"]["fc1"]["kernel"]
        assert kernel.addressable_shards[0].data.size == kernel.size // 4
    state, _ = step(state, *data)
    kernel = state.variables["params"]["stage0_block0"]["block"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4


def test_random_permutations_throughout_have_their_keys_in_training_and_evaluation():
    model = MODEL.clone(permutation="random")
    state, step, data = start(model, SGD)
    step.trace(state, *data)
    shardings = jax.tree.map(lambda x: x.sharding, state.variables)
    evaluate = make_eval_step(model, make_mesh(), shardings)
    evaluate.trace(state.variables, data[0], empty_totals(10))


COLLECTIVE = re.compile(r"= (.*) (all-|reduce-scatter|collective-)")


@pytest.mark.parametrize("grad_accum", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_mixing_moves_no_image_between_devices_and_nothing_to_the_host(grad_accum):
    state, step, data = start(SMALLEST, SGD, mixing=FULL, grad_accum=grad_accum)
    compiled = step.lower(state, *data).compile()
    moved = [m[1] for m in map(COLLECTIVE.search, compiled.as_text().splitlines()) if m]
    assert moved, "gradients at least must be summed"
    assert not [shape for shape in moved if re.search(r"\[(\d+,)+16,16,3\]", shape)]
    with jax.transfer_guard("disallow"):
        state, metrics = compiled(state, *data)
        compiled(state, *data)
    assert np.isfinite(float(metrics["loss"]))


@pytest.mark.parametrize(
    "changes",
    [{}, pytest.param(dict(grad_accum=2), marks=pytest.mark.slow)],  # compiles for long
)
def test_a_bfloat16_step_follows_the_float32_one(changes):
    def gradient_norm(dtype):
        state, step, data = start(MODEL.clone(dtype=dtype), SGD, **changes)
        state, metrics = step(state, *data)
        assert {p.dtype for p in jax.tree.leaves(state.variables)} == {jnp.dtype(jnp.float32)}
        return float(metrics["loss"]), float(metrics["grad_norm"])

    np.testing.assert_allclose(gradient_norm(jnp.bfloat16), gradient_norm(jnp.float32), rtol=0.1)


def test_top_k_counts_the_label_among_the_k_largest():
    logits = jnp.asarray([[0.1, 0.5, 0.3], [0.9, 0.0, 0.1]])
    labels = jnp.asarray([2, 1])
    assert in_top_k(logits, labels, 1).tolist() == [False, False]
    assert in_top_k(logits, labels, 2).tolist() == [True, False]
    assert in_top_k(logits, labels, 5).tolist() == [True, True]
