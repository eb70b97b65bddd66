"""The page on adding a family shows the table that it says it does."""

from __future__ import annotations

import re
from pathlib import Path

from conversion_lib.families import olmo3
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "add_a_family.md"


def test_the_worked_example_is_the_family():
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown = [line.partition("  #")[0].rstrip() for block in blocks for line in block.splitlines()]
    table = Path(olmo3.__file__).read_text().splitlines()
    catalogue = (ROOT / "conversion_lib" / "models" / "catalog.py").read_text()
    missing = [line for line in shown if line and line not in table and line not in catalogue]
    assert [line for line in missing if line.strip() != "...,"] == []
    assert len(shown) > 20


def test_the_files_that_it_names_are_there():
    root = ROOT
    named = re.findall(r"`((?:tests|conversion_lib)/[a-z_0-9/]+(?:\.py|/))`", PAGE.read_text())
    assert len(named) > 8
    assert [path for path in named if not (root / path).exists()] == []
