"""The Makefile accepts the Python versions in pyproject.toml, and no others."""

import shutil
import subprocess
import tomllib

import pytest
from packaging.specifiers import SpecifierSet

from tests.conftest import ROOT

# A Python of another version, which cannot make environments.
FAKE = """#!/bin/sh
[ "$1" = --version ] && echo "Python {version}.0" && exit
[ "$1" = -c ] && exec python3 -c "import sys; sys.version_info = {numbers}; $2"
echo "makes no environment" >&2; exit 3
"""


@pytest.mark.parametrize("version", ["3.10", "3.11", "3.13", "3.14"])
def test_a_python_that_is_not_supported_is_a_sentence(version, tmp_path):
    for file in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    numbers = (*map(int, version.split(".")), 0)
    (tmp_path / "python").write_text(FAKE.format(version=version, numbers=numbers))
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run(
        ["make", "quickstart", "PYTHON=./python"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if SpecifierSet(project["requires-python"]).contains(version):
        assert "makes no environment" in done.stderr
    else:
        assert f"Error: ./python is Python {version}.0, and 3.11, 3.12 and 3.13" in done.stderr
