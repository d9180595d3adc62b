"""The notebook's cell that installs, with a pip that writes down what it is asked for."""

import json
import subprocess
import sys

import nbformat
import pytest

from tests.conftest import ROOT

# What is installed in Colab, as far as it matters, and one run of pip.
PIP = f"""#!{sys.executable}
import json, pathlib, sys
if sys.argv[3] == "freeze":
    print("google-colab @ file:///colabtools/dist/google_colab-1.0.0.tar.gz")
    print("\\n".join(json.loads(pathlib.Path("installed.json").read_text())))
else:
    stay = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text()
    print(json.dumps([sys.argv[-2:], stay.split()]))
"""
COLAB = ["jax==0.7.2", "numpy==2.0.2", "protobuf==5.29.6", "tensorflow==2.20.0", "flax==0.11.2"]
STAY = ["numpy==2.0.2", "protobuf==5.29.6", "tensorflow==2.20.0"]
CUDA = ["jax-cuda12-plugin==0.7.2", "nvidia-cudnn-cu12==9.19.0.56", "torch==2.11.0+cu128"]


@pytest.mark.parametrize(
    ("installed", "extra", "stay"),
    [
        ([*COLAB, *CUDA], "cuda12", [*STAY, *CUDA[1:]]),
        ([*COLAB, "libtpu==0.0.20"], "tpu", STAY),
    ],
)
def test_what_others_are_built_for_stays_and_jax_brings_its_plugin(
    installed, extra, stay, tmp_path
):
    _, address, _, install, *_ = nbformat.read(ROOT / "notebooks/finetune.ipynb", 4).cells
    (tmp_path / "installed.json").write_text(json.dumps(installed))
    (tmp_path / "python").write_text(PIP)
    (tmp_path / "python").chmod(0o755)
    repository = address.source.replace('""', '"."')  # which is a path: pip takes it as it is
    program = f"import sys; sys.executable = './python'\n{repository}\n{install.source}"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    asked = json.loads(done.stdout.splitlines()[0])
    assert asked == [[".", f"jax[{extra}]"], stay]
