"""Models of a user's own module, by name."""

import pytest

from sret_jax.models.registry import create_model

OWN = {
    "broken": ("def f(:", "the module broken, .* cannot be imported: SyntaxError"),
    "needs": ("import no_such_library", "cannot be imported: .*No module named 'no_such_library'"),
    "fails": ("1 / 0", "cannot be imported: ZeroDivisionError: division by zero"),
    "plain": (
        "class Net:\n    variants = {'net': None}",
        "module plain has no model 'net', because none of its classes is a subclass of .*Model",
    ),
    "other": (
        "from sret_jax.models.families.mixer import Mixer\n"
        "class Own(Mixer):\n    variants = {'nest': Mixer.variants['mixer_s16']}",
        "unknown model of other 'net'; did you mean 'nest'",
    ),
}


@pytest.mark.parametrize("module", OWN)
def test_a_module_without_the_model_is_one_sentence(module, tmp_path, monkeypatch):
    code, sentence = OWN[module]
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=sentence) as error:
        create_model(f"{module}:net")
    assert "\n" not in str(error.value)


def test_a_module_that_is_not_found_is_named_with_the_way_out():
    for name in ("no_such_module:net", "no_such_package.inner:net"):
        missing = name.partition(".")[0].partition(":")[0]
        with pytest.raises(ValueError, match=f"no module '{missing}' on Python's path.*PYTHONPATH"):
            create_model(name)


def test_a_model_of_a_users_own_module_takes_its_own_settings(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(OWN["other"][0])
    monkeypatch.syspath_prepend(tmp_path)
    assert create_model("own:nest", width=24, loops=2).width == 24
    with pytest.raises(ValueError, match="own:nest has no setting 'windth'; did you mean 'width'"):
        create_model("own:nest", windth=24)
