"""The losses for hard and soft labels, against published numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sret_jax.distillation.soft_targets import marginal_smoothing, soft_labels
from sret_jax.errors import UserError
from sret_jax.models.registry import create_model
from sret_jax.training.losses import LabelLoss, deit_soft_loss, hard_label_loss, soft_label_loss
from tests.golden import ARRAYS

STUDENT, TEACHER = (jnp.asarray(ARRAYS[f"kd/{name}"]) for name in ("student", "teacher"))


@pytest.mark.parametrize("temperature", [1, 3])
def test_the_soft_label_loss_and_its_gradient_are_the_published_ones(temperature):
    probabilities = soft_labels(TEACHER, temperature)
    loss, gradient = jax.value_and_grad(soft_label_loss)(STUDENT, probabilities, temperature)
    expected = f"kd/T{temperature}"
    np.testing.assert_allclose(loss, ARRAYS[f"{expected}/loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, ARRAYS[f"{expected}/grad_student"], atol=1e-6)


def test_deits_soft_loss_divides_the_divergence_by_images_and_classes():
    torch = pytest.importorskip("torch")
    logs = [
        torch.log_softmax(torch.tensor(np.asarray(logits)) / 3, 1) for logits in (STUDENT, TEACHER)
    ]  # DeiT's losses.py, with alpha = 3/4 and tau = 3
    summed = torch.nn.functional.kl_div(*logs, reduction="sum", log_target=True)
    expected = float(summed) * 3**2 / STUDENT.size
    probabilities = soft_labels(TEACHER, 3)
    np.testing.assert_allclose(deit_soft_loss(STUDENT, probabilities, 3), expected, rtol=1e-5)
    hard = jax.nn.one_hot(jnp.asarray([1, 2, 3, 4]), 10)
    loss = LabelLoss(temperature=3, hard_weight=0.25, kind="deit_soft")
    np.testing.assert_allclose(
        loss((STUDENT,), {"hard": hard, "soft": probabilities}),
        0.75 * expected + 0.25 * hard_label_loss(STUDENT, hard),
        rtol=1e-5,
    )


def test_soft_labels_alone_count_unless_hard_ones_have_a_weight():
    hard = jax.nn.one_hot(jnp.asarray([1, 2, 3, 4]), 10)
    targets = {"hard": hard, "soft": soft_labels(TEACHER, 3)}
    soft_loss, hard_loss = (
        soft_label_loss(STUDENT, targets["soft"], 3),
        hard_label_loss(STUDENT, hard),
    )
    assert not np.isclose(soft_loss, hard_loss)
    assert LabelLoss(temperature=3)((STUDENT,), targets) == soft_loss
    weighted = LabelLoss(temperature=3, hard_weight=0.25)((STUDENT,), targets)
    np.testing.assert_allclose(weighted, 0.75 * soft_loss + 0.25 * hard_loss, rtol=1e-5)


def test_hard_distillation_is_the_cross_entropy_with_the_teachers_class_in_the_second_head():
    # DeiT's losses.py: (1 - alpha) CE(outputs, labels) + alpha CE(outputs_kd, teacher.argmax(1)).
    heads = (STUDENT, STUDENT[:, ::-1] + 1)
    labels = jnp.asarray([1, 2, 3, 4])
    targets = {"hard": jax.nn.one_hot(labels, 10), "soft": soft_labels(TEACHER)}
    entropy = optax.losses.softmax_cross_entropy_with_integer_labels
    of_labels, of_teacher = (
        entropy(logits, classes).mean()
        for logits, classes in zip(heads, (labels, TEACHER.argmax(-1)), strict=True)
    )
    loss = LabelLoss(kind="hard", hard_weight=0.25)
    np.testing.assert_allclose(
        loss(heads, targets), 0.75 * of_teacher + 0.25 * of_labels, rtol=1e-5
    )
    one_head = entropy(STUDENT, TEACHER.argmax(-1)).mean()
    np.testing.assert_allclose(LabelLoss(kind="hard")((STUDENT,), targets), one_head, rtol=1e-5)


def test_the_mean_of_two_heads_learns_the_labels_without_a_teacher():
    hard = jax.nn.one_hot(jnp.asarray([1, 2, 3, 4]), 10)
    loss = LabelLoss()((STUDENT, TEACHER), {"hard": hard})
    np.testing.assert_allclose(loss, hard_label_loss((STUDENT + TEACHER) / 2, hard), rtol=1e-6)


@pytest.mark.parametrize(("weight", "head"), [(0.0, "head"), (1.0, "head_dist")])
def test_a_weight_that_leaves_one_of_two_heads_untrained_is_refused(weight, head):
    loss = LabelLoss(hard_weight=weight)
    loss.check(create_model("deit_tiny"))
    with pytest.raises(UserError, match=f"leaves the model's '{head}' untrained.*use 0.5"):
        loss.check(create_model("deit_tiny_distilled"))


def test_classes_that_are_not_kept_share_the_rest_equally():
    kept = jnp.asarray([[0.5, 0.2], [0.75, 0.25], [0.9, 0.2]], jnp.float16)
    classes = jnp.asarray([[3, 0], [1, 2], [4, 3]], jnp.uint16)
    expected = [
        [0.2, 0.1, 0.1, 0.5, 0.1],
        [0, 0.75, 0.25, 0, 0],
        [0, 0, 0, 0.2, 0.9],  # the sum may round above 1
    ]
    np.testing.assert_allclose(marginal_smoothing(kept, classes, 5), expected, atol=3e-4)
    np.testing.assert_array_equal(marginal_smoothing(kept, None, 2), kept.astype(jnp.float32))
    everything = marginal_smoothing(kept[:1], jnp.asarray([[1, 0]]), 2)
    np.testing.assert_allclose(everything, [[0.2, 0.5]], atol=3e-4)


def test_without_soft_labels_the_loss_is_the_cross_entropy_whatever_the_temperature():
    labels = jnp.asarray([1, 2, 3, 4])
    loss = LabelLoss(temperature=3)((STUDENT,), {"hard": jax.nn.one_hot(labels, 10)})
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(STUDENT, labels).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (dict(temperature=0.0), "temperature=0.0 must be above 0"),
        (dict(temperature=-1), "temperature=-1 must be above 0"),
        (dict(kind="hrd"), "kind.*hrd.*did you mean 'hard'"),
        (dict(kind="hard", temperature=3.0), "temperature=3.0 changes nothing with .*kind='hard'"),
        (dict(hard_weight=1.5), r"hard_weight=1.5 must be in \[0, 1\]"),
        (dict(hard_weight=-0.1), r"hard_weight=-0.1 must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range_are_named(settings, sentence):
    with pytest.raises(UserError, match=f"config.distill.{sentence}"):
        LabelLoss(**settings)
