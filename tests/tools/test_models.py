import pytest

from sret_jax.models.registry import list_models
from sret_jax.tools import models
from tests.conftest import ROOT, refusal

DOCUMENT = (ROOT / "docs/models.md").read_text("utf-8")


def test_a_pattern_chooses_models_and_their_rows_are_those_of_the_document(capsys):
    models.main(["sret_t"])
    assert f"| {' | '.join(capsys.readouterr().out.splitlines()[1].split())} |\n" in DOCUMENT
    assert list_models("sret_?") == ["sret_s", "sret_t"]
    assert "there are " in refusal(capsys, models.main, "none*")


@pytest.mark.slow  # traces every model
def test_the_document_has_the_table_that_the_command_prints(capsys):
    models.main(["--markdown"])
    assert capsys.readouterr().out in DOCUMENT
