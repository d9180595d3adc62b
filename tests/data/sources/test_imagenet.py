"""The names of ImageNet's classes, against the data set's own list of ids."""

import tensorflow_datasets as tfds

from sret_jax.data.sources.imagenet import CLASSES, display_names, imagenet_ids


def test_the_ids_are_those_of_the_data_set_in_its_order():
    file = tfds.core.tfds_path("datasets/imagenet2012/labels.txt")
    assert imagenet_ids() == file.read_text().split()
    assert len(imagenet_ids()) == CLASSES


def test_wordnet_ids_are_shown_in_words_and_other_names_as_they_are():
    names = display_names(imagenet_ids())
    assert (names[0], names[517], names[999]) == ("tench", "crane", "toilet tissue")
    assert len(set(names)) == CLASSES
    assert display_names(["n03888257", "n01440764"]) == ["parachute", "tench"]  # as Imagenette's
    assert display_names(["n01440764", "cat"]) == ["n01440764", "cat"]
