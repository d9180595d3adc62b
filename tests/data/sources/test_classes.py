import pytest

from sret_jax.data.sources.classes import are_labels, check_known, difference
from sret_jax.errors import UserError

THERE = ["cat", "dog", "emu"]


@pytest.mark.parametrize(
    ("here", "sentence"),
    [
        (THERE, ""),
        (
            ["cat", "doge", "emu"],
            "class 1 is 'dog' there and 'doge' here (only there: 'dog'; only here: 'doge')",
        ),
        (
            ["ant", "cat", "dog", "emu"],
            "class 0 is 'cat' there and 'ant' here (3 classes there, 4 here; only here: 'ant')",
        ),
        (
            ["cat", "dog"],
            "class 2 is 'emu' there and none here (3 classes there, 2 here; only there: 'emu')",
        ),
        (["cat", "emu", "dog"], "class 1 is 'dog' there and 'emu' here"),
    ],
)
def test_the_first_class_that_differs_is_named_with_its_number(here, sentence):
    assert difference(THERE, here) == sentence


def test_fewer_classes_in_any_order_are_known_and_others_are_not():
    check_known(THERE, ["emu", "cat"], "RUN", "correct it")
    with pytest.raises(UserError) as error:
        check_known(THERE, ["emu", "ox"], "RUN", "correct it")
    assert str(error.value) == (
        "RUN was not trained on the class 'ox': class 0 is 'cat' there and 'emu' in the data "
        "(3 classes there, 2 in the data; only there: 'cat', 'dog'; only in the data: 'ox'); "
        "correct it"
    )


def test_numbers_in_their_order_say_which_label_they_mean():
    assert are_labels(["0", "1", "2"]) and are_labels([f"{number:03}" for number in range(12)])
    for names in (["1", "2"], ["0", "2", "1"], ["0", "1", "cat"], ["0", "00"]):
        assert not are_labels(names)
