import pytest

from sret_jax.data.classes import difference


@pytest.mark.parametrize(
    ("here", "sentence"),
    [
        (["cat", "dog", "emu"], ""),
        (["cat", "doge", "emu"], "class 1 is 'dog' there and 'doge' here"),
        (
            ["ant", "cat", "dog", "emu"],
            "class 0 is 'cat' there and 'ant' here (3 classes there, 4 ",
        ),
        (["cat", "emu"], "class 1 is 'dog' there and 'emu' here (3 classes there, 2 here)"),
        (["cat", "dog"], "class 2 is 'emu' there and none here (3 classes there, 2 here)"),
        (["cat", "emu", "dog"], "class 1 is 'dog' there and 'emu' here"),
    ],
)
def test_the_first_class_that_differs_is_named_with_its_number(here, sentence):
    found = difference(["cat", "dog", "emu"], here)
    assert found.startswith(sentence) and bool(found) == bool(sentence)
