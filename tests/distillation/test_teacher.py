"""Distillation: the step learns its teacher's labels for the same images that it sees."""

import contextlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from configs import quickstart
from sret_jax.checkpoints.manager import CHECKPOINTS, Checkpoints
from sret_jax.data.views.mixing import Mixing, row_keys
from sret_jax.distillation.teacher import open_teacher, with_classes
from sret_jax.errors import UserError
from sret_jax.models.apply import normalise
from sret_jax.models.flops import jaxpr_macs, model_macs
from sret_jax.parallel.mesh import batch_sharding, make_mesh, state_shardings
from sret_jax.planning.compilation import state_bytes
from sret_jax.run import loop
from sret_jax.settings.config_model import create_from_config
from sret_jax.training.experiment import build_computation
from sret_jax.training.hyperparameters import make_hyperparameters
from sret_jax.training.losses import LabelLoss
from sret_jax.training.state import init_state
from sret_jax.training.step import make_train_step, micro_batches
from tests.conftest import read_metrics
from tests.run.test_loop import checkpoint_arrays
from tests.training.test_step import fresh_variables

FULL = Mixing(erasing=0.25, mixup=0.8, cutmix=1.0, label_smoothing=0.1)
DIGITS = [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory):
    """A run on 32-pixel images in ten classes, with widely spread logits."""
    workdir = epath.Path(tmp_path_factory.mktemp("teacher"))
    config = quickstart.get_config()
    config.model.update(
        image_size=32, blocks=(1,), groups=((4, 2),), heads=(2,), permutation="random"
    )
    model = create_from_config(config, num_classes=10)
    variables = jax.jit(model.init)(jax.random.key(7), jnp.zeros((1, 32, 32, 3)))
    variables["params"]["head"]["kernel"] *= 10
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        checkpoints.save(1, {"model": variables, "ema": variables})
    (workdir / "config.json").write_text(json.dumps(config.to_dict()))
    (workdir / "class_names.json").write_text(json.dumps(DIGITS))
    return workdir


@pytest.fixture
def config(tiny_config, teacher_dir):
    tiny_config.model.update(
        blocks=(1,), groups=((2,),), loops=1, heads=(2,), drop_path_rate=0.0, permutation="identity"
    )
    tiny_config.teacher = str(teacher_dir)
    return tiny_config


def batch(size=32):
    rng = np.random.default_rng(0)
    return {
        "image": rng.integers(0, 256, (size, 16, 16, 3), np.uint8),
        "label": rng.integers(0, 10, size).astype(np.int32),
        "bad": np.zeros(size, bool),
        "real": np.ones(size, bool),
    }


def plain_loss(variables, student, teacher, label_loss, data):
    """A micro-batch's loss, computed from the models' own calls, and the teacher's accuracy."""
    targets = {"hard": FULL.hard_targets(data["label"], 10)}
    if "soft" in data:
        targets["soft"] = data["soft"].astype(jnp.float32)
    images, targets = FULL(normalise(student, data["image"]), targets, data["key"])
    if teacher:
        side = teacher.model.image_size
        seen = jax.image.resize(images, (len(images), side, side, 3), "cubic")
        rngs = {"permutation": jax.random.key(0)}
        logits = teacher.model.apply(teacher.variables, seen, train=False, rngs=rngs)
        targets["soft"] = jax.nn.softmax(logits / label_loss.temperature)
    logits, _ = student.apply(
        variables,
        images,
        train=True,
        mutable=["batch_stats"],
        rngs={"drop_path": jax.random.key(0), "permutation": jax.random.key(0)},
    )
    right = targets["soft"].argmax(-1) == targets["hard"].argmax(-1)
    return label_loss((logits,), targets), right.mean()


@pytest.mark.parametrize(
    ("source", "fsdp", "grad_accum", "label_loss"),
    [
        ("teacher", 4, 2, LabelLoss(temperature=3.0, hard_weight=0.3)),
        pytest.param("batch", 1, 1, LabelLoss(temperature=3.0), marks=pytest.mark.slow),
    ],
)
def test_a_step_learns_the_soft_labels_of_the_mixed_images(
    source, fsdp, grad_accum, label_loss, config
):
    student, mesh = create_from_config(config, num_classes=10), make_mesh(fsdp)
    config.distill.temperature = label_loss.temperature
    teacher = open_teacher(config, mesh, student) if source == "teacher" else None
    data = batch()
    if source == "batch":
        logits = np.random.default_rng(1).standard_normal((32, 10))
        data["soft"] = np.asarray(jax.nn.softmax(3 * logits), np.float16)
    abstract = jax.eval_shape(lambda: init_state(student, optax.identity(), 0))
    shardings = state_shardings(abstract, mesh)
    variables = fresh_variables(student)
    state = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)
    state = jax.device_put(state.replace(variables=variables, ema=variables), shardings)
    step = make_train_step(
        student,
        optax.identity(),
        mesh,
        shardings,
        mixing=FULL,
        grad_accum=grad_accum,
        label_loss=label_loss,
        teacher=teacher,
    )
    placed = (teacher.place(),) if teacher else ()
    config.seed = 5
    numbers = make_hyperparameters(config, steps_per_epoch=1, total_steps=1)

    keys = row_keys(5, jnp.asarray(0), 32)
    parts = micro_batches({**jax.tree.map(jnp.asarray, data), "key": keys}, grad_accum, mesh)
    plain = jax.jit(lambda part: plain_loss(variables, student, teacher, label_loss, part))
    loss, teacher_top1 = np.mean(
        [plain(jax.tree.map(lambda x, i=i: x[i], parts)) for i in range(grad_accum)], axis=0
    )

    _, found = step(state, jax.device_put(data, batch_sharding(mesh)), numbers, *placed)
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-4)
    assert float(found["teacher_top1"]) == pytest.approx(teacher_top1)
    if teacher:
        kernel = placed[0]["params"]["stage0_block0"]["block"]["mlp"]["fc1"]["kernel"]
        if fsdp > 1:
            assert kernel.addressable_shards[0].data.size == kernel.size // fsdp
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(placed[0]), teacher.variables)


@pytest.mark.slow  # three runs; tests/run/test_loop.py resumes one without a teacher
def test_a_distillation_resumed_is_bitwise_the_same_as_one_that_ran_through(
    config, tmp_path, capfd
):
    config.epochs = 6 * 64 / 1438
    config.checkpoint.every_epochs = 3 * 64 / 1438
    whole, resumed = epath.Path(tmp_path) / "whole", epath.Path(tmp_path) / "resumed"
    loop.train(config, whole)
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / CHECKPOINTS / "6")
    loop.train(config, resumed)
    assert f"Resuming {resumed} at step 3." in capfd.readouterr().out
    expected, actual = checkpoint_arrays(whole, 6), checkpoint_arrays(resumed, 6)
    assert expected.keys() == actual.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(actual[path], array, err_msg=path)
    assert read_metrics(whole) == read_metrics(resumed)
    assert set(read_metrics(whole, "teacher_top1")) == set(range(1, 7))
    assert {p.name for p in (whole / CHECKPOINTS / "6").iterdir()} >= {"model", "ema", "train"}
    assert json.loads((whole / "config.json").read_text())["teacher"] == config.teacher


def test_the_teacher_is_evaluated_in_the_student_s_dtype_with_groups_of_choice(config):
    config.distill.teacher_groups = ((2,),)
    config.model.dtype = "bfloat16"
    student = create_from_config(config, num_classes=10)
    teacher = open_teacher(config, make_mesh(), student)
    assert teacher.model.groups == ((2,),) and teacher.model.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(teacher.variables)} == {np.dtype(np.float32)}
    label = jax.jit(teacher.probabilities, static_argnums=2)
    probabilities = label(teacher.variables, jnp.zeros((2, 16, 16, 3)), student)
    assert probabilities.dtype == jnp.float32
    np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-4)


def test_a_plan_counts_the_teacher_s_forward_pass_and_weights(config):
    config.model.image_size = 32  # the teacher's, for resizing takes matrix products too
    sizes = {"images": 1438, "train_classes": 10, "classes": 10}
    taught = build_computation(config, make_mesh(), **sizes)
    config.teacher = ""
    alone = build_computation(config, make_mesh(), **sizes)
    steps, needed = (
        [count(computation) for computation in (taught, alone)]
        for count in (lambda c: jaxpr_macs(c.trace_train_step().jaxpr.jaxpr), state_bytes)
    )
    assert steps[0] - steps[1] == 64 * model_macs(taught.teacher.model)
    weights = jax.tree.leaves(taught.teacher.variables)
    assert needed[0] - needed[1] == sum(x.nbytes for x in weights)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"teacher": "/nowhere"},
            "config.teacher=/nowhere: there is no file or folder /nowhere; give a run",
        ),
        ({"teacher": __file__}, r"config.teacher=.*test_teacher.py: .* is neither a torch file"),
        ({"teacher": "", "distill.required": True}, "distils, and config.teacher is empty; give"),
        ({"model.num_classes": 12}, r"teacher=.* has 10 classes and the student 12; give"),
        ({"distill.temperature": 0.0}, "config.distill.temperature=0.0 must be above 0"),
        ({"distill.hard_weight": 1.1}, r"config.distill.hard_weight=1.1 must be in \[0, 1\]"),
        ({"distill.teacher_groups": ((3,),)}, "config.teacher=.*which 3 groups do not divide"),
    ],
)
def test_a_teacher_that_cannot_teach_is_a_sentence_before_anything_compiles(
    settings, sentence, config, tmp_path, capfd
):
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=sentence) as error:
        loop.train(config, epath.Path(tmp_path))
    assert "\n" not in str(error.value) and "Compiling" not in capfd.readouterr().out


def test_a_teacher_of_other_classes_is_refused_with_the_first_that_differs(
    config, teacher_dir, tmp_path
):
    names = teacher_dir / "class_names.json"
    names.write_text(json.dumps([*DIGITS[:8], "nine", "eight"]))
    try:
        with pytest.raises(UserError, match="class 8 is 'nine' there and '8' in the data"):
            loop.train(config, epath.Path(tmp_path))
    finally:
        names.write_text(json.dumps(DIGITS))


def test_a_teacher_of_the_same_classes_in_another_order_gives_them_in_the_data_s(
    config, teacher_dir
):
    teacher = open_teacher(config, make_mesh(), create_from_config(config, num_classes=10))
    names = [*reversed(DIGITS)]
    fitted = with_classes(teacher, config.teacher, names)
    old, new = (t.variables["params"] for t in (teacher, fitted))
    for array in ("kernel", "bias"):
        np.testing.assert_array_equal(new["head"][array], old["head"][array][..., ::-1])
    assert new["norm"] is old["norm"]
    same = with_classes(teacher, config.teacher, DIGITS)
    assert same is teacher and teacher.class_names == DIGITS
