"""The page on adding a family shows what is there, and lists every file that its worked example touches."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

from tests.support.family import Description
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "add_a_family.md"
MOST = 10
"""Files that a family of an ordinary kind may touch, those that tools write included."""

ROOMS = (".ci", ".github", "conversion_lib", "dags", "deploy", "operators", "tests")
"""What is searched for the worked example, and the files beside them. Pages in docs/ may name any family."""


def listed() -> list[str]:
    """The files in the page's first table."""
    return re.findall(r"^\| `([^`]+)` \|.*\| \d \|$", PAGE.read_text(), re.MULTILINE)


def worked_example() -> str:
    return Path(listed()[0]).stem


def mentioning(family: str) -> set[str]:
    """The files that name `family`, with or without something between its name and its number."""
    name = re.compile(re.sub(r"(?<=\D)(?=\d)", "[ _.-]?", family), re.IGNORECASE)
    files = [path for path in ROOT.iterdir() if path.name != "CHANGELOG.md"]
    files += [path for room in ROOMS for path in (ROOT / room).rglob("*")]
    texts = {path: path.read_bytes() for path in files if path.is_file() and path.suffix != ".pyc"}
    return {str(path.relative_to(ROOT)) for path, text in texts.items() if name.search(text.decode(errors="replace"))}


def test_it_lists_every_file_that_the_worked_example_touches():
    assert mentioning(worked_example()) == set(listed())
    assert len(listed()) <= MOST


def test_the_search_finds_a_name_however_it_is_spelled():
    assert mentioning("gemma4") >= {"tests/support/tiny_sizes.py", "conversion_lib/models/catalog.py"}


def test_the_code_that_it_shows_is_the_familys():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown = [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]
    there = {line.partition("  #")[0].rstrip() for path in listed() for line in (ROOT / path).read_text().splitlines()}
    assert [line for line in shown if line.strip() not in ("...", "...,") and line not in there] == []
    assert len(shown) > 50


def test_the_files_that_it_names_are_there():
    named = re.findall(r"`((?:tests|conversion_lib)/[a-z_0-9/]+(?:\.py|\.sh|\.json|/))[` ]", PAGE.read_text())
    assert len(named) > 8
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_the_fields_that_it_explains_are_a_descriptions():
    """Those in the first column of a table."""
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE.read_text(), re.MULTILINE)
    explained = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert len(explained) > 5
    assert explained <= {of.name for of in fields(Description)}
