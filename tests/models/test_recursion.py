"""Recursion over depth: properties that all ways of computing it share."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import deep_digits
from sret_jax.models.flops import count_macs
from sret_jax.models.layers.attention import Slices, fixed_permutation, slice_cycle
from sret_jax.models.layers.blocks import AttentionBlock
from sret_jax.models.layers.linear import LayerSettings
from sret_jax.models.layers.residual import ResidualMLP
from sret_jax.models.per_loop import DropPathKeys, GradientProbe, NonLinearLayers, Permutations
from sret_jax.models.recursion import REMAT, Recursion
from sret_jax.models.remat import segment_length
from sret_jax.settings.config_model import create_from_config

TOKENS, CHANNELS = 16, 8
FLOAT32, FLOAT64 = LayerSettings(), LayerSettings(dtype=jnp.float64)


def recursive_block(
    *,
    groups,
    nll_every=1,
    drop_path_rate=0.0,
    permutation=None,
    train=True,
    layers=FLOAT32,
    **settings,
):
    """SReT's recursion: sliced attention, NLLs, drop path."""
    per_loop = [
        Permutations(chosen=permutation or ("random" if train else "fixed")),
        NonLinearLayers(every=nll_every, layer=ResidualMLP(CHANNELS, layers, parent=None)),
        GradientProbe(),
    ]
    if drop_path_rate:
        per_loop.insert(1, DropPathKeys())
    return Recursion(
        block=AttentionBlock(
            heads=2,
            hidden=2 * CHANNELS,
            drop_path_rate=drop_path_rate,
            layers=layers,
            parent=None,
        ),
        turns=slice_cycle(groups),
        per_loop=tuple(per_loop),
        **settings,
    )


def tokens(batch=4):
    return jax.random.normal(jax.random.key(0), (batch, TOKENS, CHANNELS))


def abstract_init(block):
    return jax.eval_shape(functools.partial(block.init, train=False), jax.random.key(1), tokens())


def init(block):
    """Variables with distinct values: scales and coefficients near 1, the others near 0."""

    def draw(path, p):
        near = 1 if path[-1].key in ("scale", "skip", "branch") else 0
        return near + 0.2 * np.random.default_rng(p.size).standard_normal(p.shape, p.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_init(block))


def rotation(key, tokens):
    """A random permutation that compiles faster than a shuffle."""
    return (jnp.arange(tokens) + jax.random.randint(key, (), 0, tokens)) % tokens


def loss(block, variables, x):
    rngs = {"drop_path": jax.random.key(1), "permutation": jax.random.key(2)}
    out = block.apply(variables, x, train=True, rngs=rngs)
    return (out**2).sum(), out


def by_hand(params, x, *, loops, groups, nll_every, backprop_loops=None, layers=FLOAT32):
    """The states after each application, with an NLL after every n-th: (loops, B, N, C)."""
    states = []
    for loop in range(loops):
        if backprop_loops is not None and loop == loops - backprop_loops:
            x = jax.lax.stop_gradient(x)
        i = loop % len(groups)
        permutation = fixed_permutation(None, TOKENS) if i > 0 and groups[i] > 1 else None
        block = AttentionBlock(heads=2, hidden=2 * CHANNELS, layers=layers)
        turn = Slices(groups[i], permuted=i > 0)
        x = block.apply({"params": params["block"]}, x, turn=turn, permutation=permutation)
        j, between = divmod(loop + 1, nll_every)
        if not between:
            nll = jax.tree.map(lambda p, j=j: p[j - 1], params["nll"])
            nll_layer = ResidualMLP(x.shape[-1], layers)
            x = nll_layer.apply({"params": nll}, x, jnp.ones(x.shape[0]))
        states.append(x)
    return jnp.stack(states)


@pytest.mark.parametrize(
    ("loops", "groups", "nll_every"),
    [
        (1, (4, 2), 1),
        (5, (4, 2), 1),
        (4, (4, 2, 1), 1),
        (7, (1,), 3),
        (8, (4, 2), 3),
        (2, (4, 2, 1), 2),
    ],
)
def test_recursion_is_so_many_applications_of_the_shared_block_with_an_nll_after_every_nth(
    loops, groups, nll_every
):
    recursive = recursive_block(loops=loops, groups=groups, nll_every=nll_every, train=False)
    variables = init(recursive)
    nlls = variables["params"]["nll"]
    assert {len(leaf) for leaf in jax.tree.leaves(nlls)} == {loops // nll_every}

    observe = dict(train=False, observe=lambda before, x: (before, x), method="observed")
    run = jax.jit(functools.partial(recursive.apply, **observe))
    last, (before, after) = run(variables, tokens())
    sizes = dict(loops=loops, groups=groups, nll_every=nll_every)
    expected = jax.jit(functools.partial(by_hand, **sizes))(variables["params"], tokens())
    np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(after[-1], last)
    np.testing.assert_array_equal(before, [tokens(), *after[:-1]])


@pytest.mark.parametrize(("loops", "groups", "nll_every"), [(3, (1,), 2), (5, (4, 2), 1)])
def test_a_recursion_that_may_stop_early_does_the_same_until_then(loops, groups, nll_every):
    block = recursive_block(loops=loops, groups=groups, nll_every=nll_every, train=False)
    variables = init(block)
    observe = dict(train=False, observe=lambda _, x: x, method="observed")
    _, states = jax.jit(functools.partial(block.apply, **observe))(variables, tokens())

    @jax.jit
    def stopped(wanted):
        carry = (jnp.zeros((), int), tokens(), tokens())
        update = lambda carry, before, x: (carry[0] + 1, before, x)  # noqa: E731
        done = lambda carry: carry[0] == wanted  # noqa: E731
        return block.apply(variables, tokens(), carry, update, done, method="until")

    for wanted in (1, loops - 1, loops, loops + 1):
        count, before, x = stopped(wanted)
        assert count == min(wanted, loops)
        np.testing.assert_allclose(x, states[count - 1], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            before, tokens() if count == 1 else states[count - 2], rtol=1e-5, atol=1e-5
        )


def test_the_gradient_through_the_last_loops_is_that_of_a_program_that_stops_it_by_hand():
    """It stops after 3 of 5 loops, inside a cycle of turns and of NLLs."""
    sizes = dict(loops=5, groups=(4, 2), nll_every=2, layers=FLOAT64)
    recursive = recursive_block(**sizes, train=False, backprop_loops=2)
    with jax.enable_x64(True):
        variables = jax.tree.map(lambda p: p.astype(np.float64), init(recursive))
        x = tokens().astype(jnp.float64)

        def actual(params, x):
            return (recursive.apply({"params": params}, x, train=False) ** 2).sum()

        def expected(params, x):
            return (by_hand(params, x, **sizes, backprop_loops=2)[-1] ** 2).sum()

        values, gradients = zip(
            *(
                jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(variables["params"], x)
                for loss in (actual, expected)
            ),
            strict=True,
        )
    np.testing.assert_allclose(*values, rtol=1e-12)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), *gradients)


def test_applications_without_gradient_cost_their_forward_pass_alone():
    def macs(loops, **settings):
        block = recursive_block(loops=loops, groups=(1,), **settings)
        variables = abstract_init(block)
        forward = count_macs(functools.partial(loss, block), variables, tokens())
        gradient = jax.grad(functools.partial(loss, block), has_aux=True)
        return forward, count_macs(gradient, variables, tokens())

    (six, _), (two, gradient_of_two) = macs(6), macs(2)
    assert macs(6, backprop_loops=2) == (six, six - two + gradient_of_two)


DOTS, BLOCK, FULL = REMATS = [dict(remat=name) for name in REMAT[1:]]
UNROLL = dict(unroll=2)


# 11 loops of two groups: 5 cycles in segments of 2, a rest of 1, and a loop left over.
@pytest.mark.parametrize(
    ("loops", "groups", "nll_every", "changes"),
    [
        (11, (4, 2), 1, [FULL]),
        (3, (1,), 1, [DOTS, BLOCK, UNROLL]),
        pytest.param(11, (4, 2), 1, [DOTS, BLOCK, UNROLL], marks=pytest.mark.slow),
        pytest.param(2, (4, 2), 1, [*REMATS, UNROLL], marks=pytest.mark.slow),
        pytest.param(9, (1,), 2, [*REMATS, UNROLL], marks=pytest.mark.slow),
    ],
)
def test_remat_and_unroll_change_neither_parameters_nor_draws_nor_gradients(
    loops, groups, nll_every, changes
):
    plain = recursive_block(
        loops=loops, groups=groups, nll_every=nll_every, drop_path_rate=0.3, permutation=rotation
    )
    variables = init(plain)
    grad = jax.jit(jax.grad(loss, argnums=1, has_aux=True), static_argnums=0)
    expected, out = grad(plain, variables, tokens())
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected))
    for change in changes:
        actual, same = grad(plain.clone(**change), variables, tokens())
        np.testing.assert_allclose(same, out, rtol=1e-3, atol=1e-4, err_msg=str(change))
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(
            lambda a, b, change=change: np.testing.assert_allclose(
                a, b, rtol=1e-3, atol=1e-4 * largest, err_msg=str(change)
            ),
            actual,
            expected,
        )


@functools.cache
def gradient_macs(loops, remat):
    block = recursive_block(loops=loops, groups=(4, 2), remat=remat)
    gradient = jax.grad(functools.partial(loss, block), has_aux=True)
    return count_macs(gradient, abstract_init(block), tokens())


@pytest.mark.parametrize("loops", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("remat", ["block", "full"])
def test_every_application_is_computed_again_the_left_over_ones_too(loops, remat):
    plain = gradient_macs(loops, "none")
    assert (
        gradient_macs(loops, remat) >= 1.2 * plain
    )  # a forward pass is a third of it, without its last products


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("groups", [(8, 2), (1,)])
def test_the_program_does_not_grow_with_loops(remat, groups):
    def length(loops):
        block = recursive_block(loops=loops, groups=groups, drop_path_rate=0.1, remat=remat)
        variables = abstract_init(block)
        grad = jax.grad(functools.partial(loss, block), has_aux=True)
        return len(jax.jit(grad).lower(variables, tokens()).as_text())

    # Of 8 loops, "full" has segments of 2 cycles or applications, and no rest.
    assert length(1000) <= 1.3 * length(8)


def plain_scan(next_method, args, kwargs, context):
    """A recursion of keys, permutations and NLLs alone in one scan, for `nn.intercept_methods`."""
    recursion = context.module
    if not isinstance(recursion, Recursion) or context.method_name != "observed":
        return next_method(*args, **kwargs)
    (x,), turns = args, recursion.turns
    rows = recursion._rows(x, kwargs["train"])
    cycles = recursion.loops // len(turns)

    def cycle(block, x, rows):
        for i, turn in enumerate(turns):
            row = [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree in rows]
            given = {"turn": turn}
            for own, own_row in zip(recursion.per_loop, row, strict=True):
                given |= {} if own_row is None else own.given(own_row, x, turn)
            x = block(x, **given)
            for own, tree in zip(recursion.per_loop, rows, strict=True):
                if tree is not None:
                    x = own.leave(x, jax.tree.map(lambda leaf, i=i: leaf[i], tree))
        return x, None

    folded = jax.tree.map(lambda leaf: leaf.reshape(cycles, -1, *leaf.shape[1:]), rows)
    scan = nn.scan(cycle, variable_broadcast="params", split_rngs={"params": False}, length=cycles)
    return scan(recursion.block, x, folded)


def test_a_recursion_without_adapters_and_the_like_is_the_program_of_a_plain_scan():
    block = recursive_block(loops=4, groups=(4, 2), drop_path_rate=0.1)
    variables = abstract_init(block)

    def lowered():
        grad = jax.grad(functools.partial(loss, block), has_aux=True)
        return jax.jit(grad).lower(variables, tokens()).as_text()

    found = lowered()
    with nn.intercept_methods(plain_scan):
        assert lowered() == found


def test_segments_are_about_the_square_root_and_leave_a_rest_only_where_they_must():
    for cycles in range(1, 2000):
        n = segment_length(cycles)
        assert cycles**0.5 / 2 - 1 < n <= cycles**0.5
    assert [segment_length(n) for n in (1, 2, 100, 500, 1000, 1024)] == [1, 1, 10, 20, 25, 32]
    assert segment_length(997) == 31


def temp_bytes(loops, remat, **settings):
    block = recursive_block(loops=loops, groups=(4, 2), remat=remat, **settings)
    variables = abstract_init(block)
    grad = jax.grad(functools.partial(loss, block), argnums=(0, 1), has_aux=True)
    compiled = jax.jit(grad).lower(variables, tokens(batch=256)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow  # compiles six programs
def test_temporary_memory_grows_with_the_square_root_of_depth_at_most():
    assert temp_bytes(1000, "full") <= 4 * temp_bytes(100, "full")
    sizes = [temp_bytes(100, remat) for remat in REMAT]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= sizes[0] / 3


@pytest.mark.slow  # compiles two programs
def test_memory_is_that_of_the_last_loops_where_gradients_pass_through_them_alone():
    assert temp_bytes(100, "none", backprop_loops=8) <= 1.5 * temp_bytes(8, "none")


@pytest.mark.slow  # a thousand applications run one after another
def test_the_first_gradients_of_a_thousand_applications_are_finite_and_reach_the_first_layer():
    config = deep_digits.get_config("1000")
    config.model.update(blocks=(1,), loops=1010)  # of one block, which compiles five times faster
    model = create_from_config(config, num_classes=10)
    images = jax.random.normal(jax.random.key(0), (4, 16, 16, 3))
    variables = jax.jit(model.init)(jax.random.key(1), images)
    rngs = {"permutation": jax.random.key(2)}

    @jax.jit
    @jax.grad
    def gradients(params):
        at = {**variables, "params": params}
        logits, _ = model.apply(at, images, train=True, rngs=rngs, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.arange(4)).mean()

    found = gradients(variables["params"])
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(found))
    first, last = (optax.global_norm(found[name]) for name in ("stem", "head"))
    assert last < first < 1000 * last, (float(first), float(last))


def test_a_probe_gets_the_norm_of_the_gradient_at_each_application():
    block = recursive_block(loops=3, groups=(4, 2))
    variables = init(block)

    def probed(probes):
        return loss(block, {**variables, "probes": {"gradient_norm": probes}}, tokens())

    norms, out = jax.jit(jax.grad(probed, has_aux=True))(jnp.zeros(3))
    assert norms[2] == pytest.approx(float(jnp.linalg.norm(2 * out)), rel=1e-4)
    assert np.all(norms > 0) and len(set(norms.tolist())) == 3
