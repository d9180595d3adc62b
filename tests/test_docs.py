"""The README stays short, and everything that documents link to exists."""

import operator
import re

from configs import common
from tests.conftest import ROOT

PLACES = ("*.md", "docs/*.md", "sret_jax/*/*.md")
DOCUMENTS = sorted(path for place in PLACES for path in ROOT.glob(place))
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(text: str) -> set[str]:
    """The fragments by which GitHub addresses the headings of a document."""
    return {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in HEADING.findall(text)}


def test_the_readme_has_at_most_155_lines():
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 155


def test_links_between_files_and_to_headings_resolve():
    broken = []
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        for path, anchor in LINK.findall(text):
            if "://" in path:
                continue
            target = document.parent / path if path else document
            if not target.exists():
                broken.append(f"{document.name}: {path}")
            elif anchor and anchor not in anchors(target.read_text("utf-8")):
                broken.append(f"{document.name}: {path}#{anchor}")
    assert not broken


def test_the_index_of_docs_has_every_document():
    index = (ROOT / "docs/README.md").read_text("utf-8")
    for document in ROOT.glob("docs/*.md"):
        assert document.name == "README.md" or f"({document.name})" in index, document


def test_configs_and_commands_that_documents_name_exist():
    for document in DOCUMENTS:
        text = document.read_text("utf-8")
        for config in re.findall(r"configs/(\w+\.py)", text):
            assert (ROOT / "configs" / config).exists(), f"{document.name}: {config}"
        for command in re.findall(r"python -m ((?:sret_jax|tests)[\w.]*\w)", text):
            module = ROOT / (command.replace(".", "/") + ".py")
            if command != "sret_jax.tools.NAME":
                assert module.exists(), f"{document.name}: {command}"


def test_settings_that_documents_name_exist():
    settings = common.get_config()
    for document in DOCUMENTS:
        for name in re.findall(r"\bconfig((?:\.[a-z_0-9]+)+)", document.read_text("utf-8")):
            if name != ".json":
                operator.attrgetter(name[1:])(settings)  # raises where there is none
