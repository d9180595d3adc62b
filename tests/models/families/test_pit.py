"""PiT against timm's modules, and its recursive form against explicit applications."""

import re

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

import sret_jax
from sret_jax.models.families.pit import PiT
from sret_jax.models.flops import model_macs
from sret_jax.models.position import with_image_size
from sret_jax.models.variables import abstract_variables
from sret_jax.weights.weight_files import read_weight_file
from tests import timm_models
from tests.explicit import check_recursion, distinct_weights
from tests.timm_models import check_initialisation, check_parity, images, needs_timm, timm_model

# Grids of 7x7 and 4x4: pooling an odd side is not that of an even one.
TINY = dict(num_classes=5, image_size=32, blocks=(1, 1), heads=(2, 4), dim=8, patch_size=8)
TIMM_TINY = dict(
    num_classes=5, img_size=32, depth=[1, 1], heads=[2, 4], base_dims=[8, 8], patch_size=8, stride=4
)
# Millions of parameters and 10^9 operations, from PiT's README. It counts norms and GELUs as well.
PUBLISHED = {
    "pit_ti": (4.9, 0.71),
    "pit_xs": (10.6, 1.4),
    "pit_s": (23.5, 2.9),
    "pit_b": (73.8, 12.5),
}


def tiny(name="pit_ti_distilled", **overrides):
    return sret_jax.create_model(name, **{**TINY, "drop_path_rate": 0.0, **overrides})


@needs_timm
def test_a_tiny_distilled_pit_is_that_of_timm():
    theirs = timm_model("pit_ti_distilled_224", **TIMM_TINY)
    theirs.set_distilled_training(True)
    check_parity(theirs, tiny())


@needs_timm
@pytest.mark.slow  # the published sizes
@pytest.mark.parametrize("name", sorted(PiT.variants))
def test_published_pits_are_those_of_timm(name):
    theirs = timm_model(f"{name}_224")
    theirs.set_distilled_training(True)
    check_parity(theirs, sret_jax.create_model(name, drop_path_rate=0.0))


@needs_timm
@pytest.mark.parametrize(
    "name", ["pit_ti_distilled", *(pytest.param(n, marks=pytest.mark.slow) for n in PUBLISHED)]
)
def test_parameters_and_macs_are_the_published_ones(name):
    model = sret_jax.create_model(name)
    macs = model_macs(model)
    assert macs == timm_models.macs(f"{name}_224")
    if name in PUBLISHED:
        millions, gmacs = PUBLISHED[name]
        # The table has 4.9M for the 4.847M of PiT-Ti.
        assert timm_models.parameters(model) / 1e6 == pytest.approx(millions, abs=0.06)
        assert macs / 1e9 == pytest.approx(gmacs, rel=0.02)


@needs_timm
def test_parameters_start_as_those_of_timm():
    check_initialisation("pit_ti_distilled_224", tiny(), **TIMM_TINY)


def test_the_recursive_form_is_applications_of_the_same_block_in_values_and_gradients():
    with jax.enable_x64(True):
        check_recursion(
            tiny(
                blocks=(1,),
                heads=(2,),
                loops=3,
                nll_ratio=0.5,
                nll_every=2,
                residual="learned",
                groups=((1, 7),),
                dtype=np.float64,
            )
        )


def test_a_recursive_pit_is_a_deeper_published_one_with_equal_blocks():
    tied, deeper = tiny(loops=2), tiny(blocks=(2, 2))
    variables = distinct_weights(tied)
    untied = sret_jax.from_torch(sret_jax.to_torch(variables, tied), deeper)
    logits = jax.jit(lambda v, w, x: (tied.apply(v, x), deeper.apply(w, x)))
    np.testing.assert_allclose(*logits(variables, untied, images(32)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has no published names"):
        sret_jax.to_torch(variables, tied.clone(residual="learned"))


@pytest.mark.parametrize("image_size", [28, 44])
def test_another_image_size_changes_the_positions_alone_and_can_be_read_from_the_arrays(image_size):
    model = tiny()
    variables = distinct_weights(model)
    other, resized = with_image_size(model, variables, image_size)
    side = image_size // 4 - 1
    assert resized["params"]["pos_embed"].shape == (1, side, side, 16)
    assert other.stages[1].side == -(-side // 2)
    assert jax.tree.map(np.shape, resized) == jax.tree.map(np.shape, abstract_variables(other))
    resized["params"]["pos_embed"] = variables["params"]["pos_embed"]
    jax.tree.map(np.testing.assert_array_equal, resized, variables)


def test_classes_and_image_size_can_be_read_from_the_arrays_under_either_name():
    for patch_size, image_size in ((8, 28), (14, 42)):
        model = tiny(patch_size=patch_size, image_size=image_size)
        variables = abstract_variables(model)
        paths = jax.tree_util.tree_leaves_with_path(variables)
        ours = {"/".join(key.key for key in path): leaf.shape for path, leaf in paths}
        zeros = jax.tree.map(lambda s: np.broadcast_to(np.float32(0), s.shape), variables)
        published = {n: a.shape for n, a in sret_jax.to_torch(zeros, model).items()}
        assert PiT.sizes(ours) == PiT.sizes(published) == dict(num_classes=5, image_size=image_size)


def test_the_authors_files_are_read_under_the_names_of_timm(tmp_path):
    model = tiny(blocks=(1, 1, 1), heads=(2, 4, 8))
    arrays = sret_jax.to_torch(distinct_weights(model), model)
    file = tmp_path / "pit.safetensors"
    theirs = {
        re.sub(r"transformers\.(\d)\.pool", lambda m: f"pools.{int(m[1]) - 1}", name): array
        for name, array in arrays.items()
    }
    assert "pools.1.fc.weight" in theirs
    save_file({name: array.astype("float32") for name, array in theirs.items()}, file)
    assert read_weight_file(epath.Path(file)).state_dict.keys() == arrays.keys()


BAD = [
    (dict(image_size=30), "image_size=30 .* patches of 8 pixels at stride 4; use 28 or 32"),
    (dict(image_size=6), "image_size=6 .* patches of 8 pixels at stride 4; use 8$"),
    (dict(patch_size=7), "patch_size=7 is odd, but patches overlap by half; use 8"),
    (dict(heads=(2, 3)), "stage 1 is 24 wide, not a multiple of the 16 of stage 0"),
    (dict(groups=((4,), (2,))), "stage 0 has 49 tokens .* 4 groups .* are 1 and 7"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_sizes_that_do_not_fit_are_named_with_the_fix(change, message):
    with pytest.raises(ValueError, match=message) as error:
        tiny(**change)
    assert not re.search(r"\n", str(error.value))
