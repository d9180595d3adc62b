"""Images are normalised with the statistics of the model that sees them."""

import numpy as np

import sret_jax
from sret_jax.models.apply import normalise, normalised_again


def test_images_of_a_student_are_normalised_again_for_a_teacher_with_other_statistics():
    student = sret_jax.create_model("sret_t")
    teacher = sret_jax.create_model("mixer_s16")
    assert student.std != teacher.std
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    again = normalised_again(normalise(student, images), student, teacher)
    np.testing.assert_allclose(again, normalise(teacher, images), atol=1e-5)
