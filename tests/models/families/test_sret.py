import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sret_jax
from sret_jax.models.families.sret import SReT
from sret_jax.models.layers.linear import LayerSettings
from sret_jax.models.layers.residual import ResidualMLP
from sret_jax.models.recursion import Recursion
from sret_jax.models.registry import title
from sret_jax.models.variables import abstract_variables

TINY = dict(
    num_classes=10,
    image_size=64,
    blocks=(1, 1),
    groups=((8, 2), (4, 1)),
    heads=(2, 4),
    dim=8,
    drop_path_rate=0.0,
)


def tiny(**overrides):
    return sret_jax.create_model("sret_t", **{**TINY, **overrides})


def init(model):
    return jax.jit(model.init)(jax.random.key(0), images(1, model.image_size))


def weights(model):
    """Variables with distinct values: scales and variances near 1, the others near 0."""

    def draw(path, x):
        near = 1 if path[-1].key in ("scale", "skip", "branch", "var") else 0
        return near + 0.2 * np.random.default_rng(x.size).uniform(-1, 1, x.shape).astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, abstract_variables(model))


def images(batch=2, size=64):
    return jax.random.normal(jax.random.key(7), (batch, size, size, 3))


def test_computing_everything_again_changes_neither_parameters_nor_statistics_nor_gradients():
    def trained(remat):
        small = dict(image_size=16, blocks=(1,), groups=((2, 2),), heads=(2,))
        model = tiny(remat=remat, **small)
        variables = init(model)

        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                images(size=16),
                train=True,
                mutable=["batch_stats"],
                rngs={"permutation": jax.random.key(1)},
            )
            return (logits**2).mean(), updates

        return variables, jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4),
        trained("none"),
        trained("full"),
    )


def test_trace_and_program_do_not_grow_with_loops():
    def lowered_lines(loops):
        model = tiny(loops=loops)

        def loss(variables, x):
            logits, _ = model.apply(
                variables,
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"drop_path": jax.random.key(0), "permutation": jax.random.key(0)},
            )
            return logits.sum()

        variables = jax.eval_shape(model.init, jax.random.key(0), images(1))
        return len(jax.jit(jax.grad(loss)).lower(variables, images(1)).as_text().splitlines())

    assert lowered_lines(1000) <= 1.01 * lowered_lines(10)


def test_permutation_is_random_in_training_and_fixed_in_evaluation():
    model = tiny(groups=((8, 4), (4, 2)))
    variables = weights(model)

    @functools.partial(jax.jit, static_argnums=0)
    def logits(train, key):
        out, _ = model.apply(
            variables,
            images(),
            train=train,
            rngs={"permutation": jax.random.key(key), "drop_path": jax.random.key(0)},
            mutable=["batch_stats"],
        )
        return out

    assert np.array_equal(logits(False, 1), logits(False, 2))
    assert np.array_equal(logits(True, 1), logits(True, 1))
    assert not np.array_equal(logits(True, 1), logits(True, 2))


def test_a_caller_chooses_the_permutation_also_by_a_function_of_key_and_size():
    seen = []

    def transpose(key, n):
        seen.append(n)
        return jnp.arange(n).reshape(8, -1).T.ravel()

    model = tiny(groups=((8, 4), (4, 1)))
    variables = weights(model)

    def logits(permutation):
        run = jax.jit(model.clone(permutation=permutation).apply)
        return run(variables, images(), rngs={"permutation": jax.random.key(0)})

    transposed = logits(transpose)
    assert set(seen) == {64}  # stage 1's second element is plain attention
    identity, fixed = logits("identity"), logits("fixed")
    assert np.array_equal(fixed, logits(None))
    assert not np.allclose(identity, transposed, atol=1e-6)
    assert not np.allclose(identity, fixed, atol=1e-6)


def test_random_permutations_differ_between_applications():
    seen = []

    def record(permutation):
        seen.append(tuple(np.asarray(permutation).tolist()))
        return permutation

    def spy(key, n):
        permutation = jax.random.permutation(key, n)
        return jax.pure_callback(record, jax.typeof(permutation), permutation)

    model = tiny(groups=((8, 4), (4, 2)), loops=4)
    variables = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_variables(model))
    jax.jit(model.clone(permutation=spy).apply)(
        variables, images(), rngs={"permutation": jax.random.key(3)}
    )
    assert len(seen) == 2 + 2  # two permuted loops in each stage's one block
    assert len(set(seen)) == len(seen)
    assert all(sorted(p) == list(range(len(p))) for p in seen)


@pytest.mark.parametrize("permutation", ["random", jax.random.permutation])
def test_permutations_that_need_a_key_are_refused_without_their_rng_stream(permutation):
    model = tiny(groups=((8, 4), (4, 2)), permutation=permutation)
    variables = abstract_variables(model)
    with pytest.raises(ValueError, match=r"no rng stream 'permutation' was given.*pass rngs="):
        jax.eval_shape(model.apply, variables, images())
    plain = tiny(groups=((8, 1), (1, 1)), permutation=permutation)
    assert jax.eval_shape(plain.apply, variables, images()).shape == (len(images()), 10)


def test_drop_path_rates_rise_by_unique_block_and_are_shared_by_its_loops():
    model = sret_jax.create_model("sret_t", drop_path_rate=0.2)
    rates = {}

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, Recursion):
            rates[context.module.name] = context.module.block.drop_path_rate
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    expected = [0, 1, 4, 5, 6, 7, 8, 14, 15, 16]
    np.testing.assert_allclose(list(rates.values()), [0.2 * i / 20 for i in expected])


def test_parameters_start_as_published():
    model = sret_jax.create_model("sret_t", blocks=(1, 1, 1))
    params = init(model)["params"]
    fan_ins = {
        ("stem", "conv1"): 27,
        ("stem", "conv3"): 9 * 64,
        ("pool1",): 9,
        ("head",): 256,
        ("stage0_block0", "block", "attn", "qkv"): 64,
        ("stage0_block0", "block", "mlp", "fc2"): 230,
        ("stage0_block0", "nll", "mlp", "fc1"): 64,
    }
    for path, fan_in in fan_ins.items():
        layer = params
        for key in path:
            layer = layer[key]
        bound = 1 / np.sqrt(fan_in)
        for leaf in (layer["kernel"], layer["bias"]):
            assert np.abs(leaf).max() <= bound
            assert np.abs(leaf).max() > 0.9 * bound, path
            assert np.std(leaf) == pytest.approx(bound / np.sqrt(3), rel=0.25)
    assert np.std(params["pos_embed"]) == pytest.approx(0.02, rel=0.02)
    assert float(params["stage0_block0"]["block"]["attn_residual"]["skip"]) == 1
    loops = params["stage0_block0"]["nll"]["mlp"]["fc1"]["kernel"]
    assert not np.array_equal(loops[0], loops[1])


def test_bfloat16_changes_activations_but_neither_parameters_nor_logits_dtype():
    model = tiny(dtype=jnp.bfloat16)
    variables = init(model)
    assert {p.dtype for p in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    logits = jax.jit(model.apply)(variables, images())
    assert logits.dtype == jnp.float32
    exact = jax.jit(model.clone(dtype=jnp.float32).apply)(variables, images())
    np.testing.assert_allclose(logits, exact, atol=0.05)


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_a_smaller_stem_stride_keeps_more_tokens(stride):
    model = tiny(image_size=32, stem_stride=stride, groups=None)
    side = 32 // stride
    assert [stage.side for stage in model.stages] == [side, side // 2]
    shapes = abstract_variables(model)["params"]
    assert shapes["pos_embed"].shape[1:3] == (side, side)
    assert shapes["stem"] == abstract_variables(tiny())["params"]["stem"]
    resized = model.resized({"pos_embed": jnp.zeros((1, 4, 4, 16))}, model.clone(image_size=64))
    assert resized["pos_embed"].shape == shapes["pos_embed"].shape


def test_an_nll_without_activation_is_linear_in_its_normalised_input():
    layer = ResidualMLP(8, LayerSettings(residual="plain"), activation="none")
    x, one = jax.random.normal(jax.random.key(0), (2, 3, 4)), jnp.ones(2)
    params = layer.init(jax.random.key(1), x, one)
    mlp = params["params"]["mlp"]
    w1, w2 = mlp["fc1"]["kernel"], mlp["fc2"]["kernel"]
    y = LayerSettings().layer_norm(name=None).apply({"params": params["params"]["norm"]}, x)
    linear = y @ (w1 @ w2)
    expected = x + linear + (mlp["fc1"]["bias"] @ w2 + mlp["fc2"]["bias"])[None, None]
    np.testing.assert_allclose(layer.apply(params, x, one), expected, rtol=1e-4, atol=1e-5)
    of_model = tiny(nll_activation="none")
    assert abstract_variables(of_model) == abstract_variables(tiny())


def test_a_model_with_parts_of_ours_has_no_published_names():
    for ours in (dict(stem_stride=4), dict(nll_activation="none")):
        with pytest.raises(ValueError, match=f"{next(iter(ours))}=.* has no published names"):
            list(tiny(groups=None, **ours).torch_entries())


def test_groups_none_and_all_ones_mean_unsliced():
    assert tiny(groups=None) == tiny(groups=((1, 1), (1,)))
    assert tiny(groups=None).groups == ((1,), (1,))


def test_only_a_published_model_goes_by_its_name():
    for name in sret_jax.list_models():
        changed = sret_jax.create_model(name, num_classes=3, drop_path_rate=0.0, remat="full")
        assert title(changed, "sret_t") == name
    assert title(sret_jax.create_model("sret_t", mlp_ratio=4.0), "sret_t") == "sret_lt"
    small = tiny(num_classes=10)
    count = sum(p.size for p in jax.tree.leaves(abstract_variables(small)["params"]))
    assert title(small, "sret_t") == f"a model of {count / 1e6:.2f}M parameters after sret_t"
    for change in (dict(groups=None), dict(permutation="identity")):
        whole = sret_jax.create_model("sret_s", **change)
        assert re.fullmatch(r"a model of \d+\.\d\dM parameters", title(whole))


BAD = [
    (dict(name="sret_x"), "unknown model 'sret_x'; did you mean 'sret_"),
    (dict(loop=3), "sret_t has no setting 'loop'; did you mean 'loops'?"),
    (dict(image_size=72), "image_size=72 is not divisible by 16, .* use 64 or 80"),
    (dict(groups=((7, 1), (4, 1))), "stage 0 has 64 tokens .* 7 groups .* are 4 and 8"),
    (dict(groups=((8, 1), (4, 3))), "stage 1 has 16 tokens .* 3 groups .* are 2 and 4"),
    (dict(groups=((8, 2),)), "groups=.* has 1 entries but blocks=.* has 2"),
    (dict(heads=(2, 3)), "stage 1 is 24 wide, not a multiple of the 16 of stage 0"),
    (dict(heads=(3, 6), dim=7), "stem width .* = 21 is odd"),
    (dict(nll_every=0), "nll_every=0 must be a whole number of at least 1"),
    (dict(nll_every=3), "nll_every=3 is more than loops=2, .* use at most 2"),
    (dict(branch_init=2.0), r"branch_init=2.0 must be in \[0, 1\]"),
    (dict(loops=0), "loops=0 must be a whole number of at least 1"),
    (
        dict(groups=((1,), (1,)), loops=40, nll_every=17),
        "stage 0 repeats only every 17 applications, .* use a smaller nll_every",
    ),
    (dict(stem_stride=16), r"stem_stride=16 must be one of \(8, 4, 2\)"),
    (dict(nll_activation="relu"), "unknown nll_activation 'relu'"),
    (dict(permutation="rand"), "unknown permutation 'rand'; did you mean 'random'?"),
    (dict(groups=(8, 4)), r"groups=\(8, 4\) must hold a tuple of whole numbers per stage"),
    (
        dict(groups=(None,)),
        r"groups=\(None,\) must .*, or be \(\) for attention that is not sliced",
    ),
    (dict(groups=((), (1,))), "must hold a tuple of whole numbers per stage"),
    (dict(blocks=(1.5, 1)), r"blocks=\(1.5, 1\) must hold a positive whole number per stage"),
    (dict(remat="ful"), "unknown remat 'ful'; did you mean 'full'?"),
    (dict(drop_path_rate=1.0), r"drop_path_rate=1.0 must be in \[0, 1\)"),
    (dict(mlp_ratio=0.01), "mlp_ratio=0.01 leaves no hidden unit"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_sizes_that_do_not_fit_are_named_with_the_fix(change, message):
    change = dict(change)
    name = change.pop("name", "sret_t")
    with pytest.raises(ValueError, match=message) as error:
        sret_jax.create_model(name, **{**TINY, **change})
    assert not re.search(r"\n", str(error.value))


def test_every_published_model_runs():
    assert SReT.variants.keys() == {"sret_lt", "sret_s", "sret_t"} <= set(sret_jax.list_models())
    for name in SReT.variants:
        model = sret_jax.create_model(name, num_classes=7, image_size=64)
        shape = jax.eval_shape(
            lambda x, m=model: m.init_with_output(jax.random.key(0), x)[0], images(3)
        )
        assert shape.shape == (3, 7)
