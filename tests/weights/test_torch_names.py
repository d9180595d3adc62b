import jax
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sret_jax
from sret_jax.weights.torch_names import StateDictError
from tests import golden


@pytest.mark.parametrize("name", [n for n in golden.MODELS if n.startswith("tiny")])
def test_published_names_and_shapes_are_ours_shared_copies_included(name):
    ours = golden.state_dict(golden.build(name))
    published = {n: tuple(shape) for n, _, shape in golden.MODELS[name]["keys"]}
    assert {n: a.shape for n, a in ours.items()} == published


@pytest.mark.parametrize("name", ["tiny_sliced", "tiny_unsliced_3_loops", "sret_s"])
def test_conversion_there_and_back_changes_nothing(name):
    model = golden.build(name)
    published = golden.state_dict(model)
    variables = sret_jax.from_torch(published, model)
    back = sret_jax.to_torch(variables, model)
    assert back.keys() == published.keys()
    for key, array in published.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)
    again = sret_jax.from_torch(back, model)
    jax.tree.map(np.testing.assert_array_equal, again, variables)


def test_a_model_without_an_nll_after_every_application_has_no_published_names():
    model = golden.build("tiny_sliced").clone(nll_every=2)
    for convert in (sret_jax.from_torch, sret_jax.to_torch):
        with pytest.raises(ValueError, match="nll_every=2, .* has no published names"):
            convert({}, model)


def test_batch_counters_are_taken_or_left():
    model = golden.build("tiny_sliced")
    published = golden.state_dict(model)
    published["patch_embed.bn1.num_batches_tracked"] = np.array(12)
    sret_jax.from_torch(published, model)


def test_everything_that_does_not_fit_is_listed_in_one_error():
    model = golden.build("tiny_sliced")
    published = golden.state_dict(model)
    del published["norm.weight"]
    published["extra"] = np.zeros(3)
    published["head.bias"] = np.zeros(11, np.float32)
    with pytest.raises(ValueError) as error:
        sret_jax.from_torch(published, model)
    message = str(error.value)
    assert "in 3 places" in message
    for part in (
        "missing norm.weight",
        "surplus extra",
        "head.bias has shape (11,), expected (10,)",
    ):
        assert part in message


def test_names_behind_an_unknown_prefix_are_shown_before_those_that_are_missing():
    model = golden.build("tiny_sliced")
    published = {f"encoder.{name}": array for name, array in golden.state_dict(model).items()}
    published["queue"] = np.zeros(3)
    with pytest.raises(StateDictError) as error:
        sret_jax.from_torch(published, model)
    assert error.value.problems[0] == "surplus encoder.pos_embed"


def test_copies_of_a_shared_block_must_agree():
    model = golden.build("tiny_sliced")
    published = golden.state_dict(model)
    name = "transformers.0.blocks.2.attn.qkv.weight"
    published[name] = published[name] + 1
    with pytest.raises(ValueError, match=r"in 1 place: transformers.0.blocks.2.attn.qkv.weight"):
        sret_jax.from_torch(published, model)


SMALL = sret_jax.create_model(
    "sret_t", blocks=(1,), groups=((1,),), heads=(2,), dim=4, image_size=8, num_classes=3
)
PUBLISHED = golden.state_dict(SMALL)
TENTH = settings(max_examples=settings.default.max_examples // 10)  # each makes a model
NAMES = st.sampled_from(list(PUBLISHED))
STRANGE_NAMES = st.text() | NAMES.map(lambda name: name + ".x") | st.integers() | st.none()
VALUES = (
    hnp.arrays(
        st.sampled_from([np.float32, np.int64, "U3", object]),
        hnp.array_shapes(min_dims=5, max_dims=5),
    )
    | st.none()
    | st.integers()
    | st.floats()
    | st.text()
    | st.binary()
    | st.lists(st.integers(), min_size=5, max_size=6)  # no side of an array of the model
    | st.dictionaries(st.text(), st.integers())
    | st.just(object())
)


@TENTH
@given(st.permutations(list(PUBLISHED)))
def test_the_order_of_the_names_does_not_matter(names):
    variables = sret_jax.from_torch({name: PUBLISHED[name] for name in names}, SMALL)
    back = sret_jax.to_torch(variables, SMALL)
    assert back.keys() == PUBLISHED.keys()
    for name, array in PUBLISHED.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)


@TENTH
@given(
    missing=st.sets(NAMES, max_size=4),
    strange=st.dictionaries(STRANGE_NAMES, VALUES, max_size=4),
    wrong=st.dictionaries(NAMES, VALUES, max_size=4),
)
def test_whatever_does_not_fit_is_listed_in_one_error(missing, strange, wrong):
    assume(missing or strange or wrong)
    given = {name: array for name, array in PUBLISHED.items() if name not in missing}
    with pytest.raises(StateDictError) as error:
        sret_jax.from_torch({**given, **strange, **wrong}, SMALL)
    problems = error.value.problems
    assert len(problems) == len(missing | strange.keys() | wrong.keys())
    assert {f"missing {name}" for name in missing - wrong.keys()} <= set(problems)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, "text", {}, [[1], [2, 3]], object(), b"\0"])
def test_a_value_that_is_no_array_is_listed_like_any_other(value):
    with pytest.raises(StateDictError, match="norm.weight (is not an array of numbers|has shape)"):
        sret_jax.from_torch({**PUBLISHED, "norm.weight": value}, SMALL)


def test_names_that_a_terminal_could_obey_are_quoted():
    with pytest.raises(StateDictError, match=r"surplus 'a\\x1b\[2Jb\\n'; surplus 7$"):
        sret_jax.from_torch({**PUBLISHED, "a\x1b[2Jb\n": np.zeros(1), 7: np.zeros(1)}, SMALL)
