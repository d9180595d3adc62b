"""The notebook, run from top to bottom as a person does."""

import base64
import io
import json

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

from tests.conftest import FAST_COMPILE, ROOT

NOTEBOOK = ROOT / "notebooks" / "finetune.ipynb"
FIGURES = 6  # samples, curves, predictions, confusion, groups, attention maps
# The model, its settings in place of those of the notebook, and the least accuracy.
MODELS = {
    "sret_t": ("", 0.9),
    "deit_tiny": (
        "first.model.update(name='deit_tiny', patch_size=8, blocks=(2,), heads=(4,), groups=())",
        0.3,  # chance is 0.2; a DeiT learns little from so few scans
    ),
}
LAST_WORDS = """
import json
print(json.dumps(dict(accuracy=accuracy, top1=result["eval"]["top1"], tests=len(tests))))
"""


def outputs(notebook):
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def test_the_notebook_is_kept_without_outputs():
    assert not outputs(nbformat.read(NOTEBOOK, as_version=4))


@pytest.mark.slow  # a whole run; test_fit.py and test_predict.py make the same calls
@pytest.mark.parametrize("name", MODELS)
def test_the_notebook_fine_tunes_and_draws(name, tmp_path, monkeypatch):
    settings, least = MODELS[name]
    monkeypatch.setenv("XLA_FLAGS", FAST_COMPILE)  # one device
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (trains,) = (cell for cell in notebook.cells if "sret_jax.fit(first" in cell.source)
    trains.source = trains.source.replace("checkpoint =", f"{settings}\ncheckpoint =")
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_WORDS))
    folder = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, resources=folder).execute()

    said = json.loads(notebook.cells[-1].outputs[-1]["text"])
    assert said["accuracy"] > least
    assert said["accuracy"] == pytest.approx(said["top1"], abs=1e-6) and said["tests"] == 181
    pictures = [
        o["data"]["image/png"] for o in outputs(notebook) if "image/png" in o.get("data", ())
    ]
    assert len(pictures) == FIGURES + (name == "sret_t")  # residual coefficients
    for picture in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("L"))
        assert len(np.unique(pixels)) > 20  # drawn, not blank
