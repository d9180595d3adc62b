import json

import jax
import numpy as np
import pytest
from PIL import Image

from sret_jax.data.sources.imagenet import imagenet_ids
from sret_jax.evaluation.confusion import Confusion, count, write_confusions
from sret_jax.evaluation.evaluation import empty_totals


def test_counts_are_by_label_and_prediction_without_padding():
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((50, 4)), rng.integers(0, 4, 50)
    real, bad = np.arange(50) < 47, np.arange(50) % 7 == 0
    counts = jax.jit(count)(logits, labels, real, real & ~bad)
    expected = np.zeros((4, 5), int)
    for row, label in enumerate(labels[:47]):
        expected[label, 4 if bad[row] else logits[row].argmax()] += 1
    np.testing.assert_array_equal(counts, expected)


def test_very_many_classes_are_not_counted_by_class():
    assert jax.eval_shape(lambda: empty_totals(1000)).counts.shape == (1000, 1001)
    assert empty_totals(20_000).counts is None


COUNTS = np.array([[8, 2, 0, 0], [1, 5, 1, 3], [0, 0, 0, 0]])


@pytest.fixture
def confusion():
    return Confusion(COUNTS, ["cat", "dog", r"no $\formula$"])


def test_the_worst_classes_are_named_in_one_line(confusion):
    assert confusion.worst() == (
        "Worst classes: 'dog' 50.0% of 10 (3 taken for 'unreadable'); "
        "'cat' 80.0% of 10 (2 taken for 'dog')."
    )
    perfect = Confusion(np.eye(3, 4, dtype=int), confusion.class_names)
    assert perfect.worst() == "Every image of every class is recognised."


def test_accuracy_by_class_and_a_picture_are_written(confusion, tmp_path):
    write_confusions(tmp_path, 7, {"eval": confusion})
    written = json.loads((tmp_path / "per_class.json").read_text())
    assert written["step"] == 7
    assert written["eval"]["per_class"]["dog"] == {"images": 10, "top1": 0.5}
    assert written["eval"]["per_class"][r"no $\formula$"] == {"images": 0, "top1": None}
    assert written["eval"]["confusion"] == COUNTS.tolist()
    pixels = np.asarray(Image.open(tmp_path / "confusion.png").convert("RGB"))
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50  # not blank


def test_imagenet_s_classes_are_written_by_id_and_name_and_without_a_picture(tmp_path):
    counts = np.zeros((1000, 1001), int)
    counts[:2, :2] = [[3, 1], [0, 2]]
    confusion = Confusion(counts, imagenet_ids())
    assert confusion.worst() == "Worst classes: 'tench' 75.0% of 4 (1 taken for 'goldfish')."
    write_confusions(tmp_path, 7, {"eval": confusion})
    written = json.loads((tmp_path / "per_class.json").read_text())["eval"]
    assert written.keys() == {"per_class"} and len(written["per_class"]) == 1000
    assert written["per_class"]["n01440764"] == {"name": "tench", "images": 4, "top1": 0.75}
    assert written["per_class"]["n01484850"]["top1"] is None
    assert not (tmp_path / "confusion.png").exists()
