"""Names from outside become paths by one function, which refuses what leaves its directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.storage.locations import location
from conversion_lib.storage.names import path_below, require_distinct, safe_part, safe_path

GOOD = ["a", "a.json", "a/b/c", "..a", "a..", " b", "a b", "%2e%2e%2fx", "a?b#c", "é", "a\u2215b", "x" * 255, "ab:c/d"]
BAD = [
    "",
    ".",
    "..",
    "/",
    "/etc/passwd",
    "//host/share",
    "../a",
    "a/..",
    "a/../b",
    "a/./b",
    "a//b",
    "a/",
    "a\\b",
    "..\\..\\a",
    "C:a",
    "c:/a",
    "a\0b",
    "a\nb",
    "a\rb",
    "a\x1b[2Jb",
    "a\x7f",
    "a\x9bb",
    "a\u2028b",
    "\ud800",
    "a\udcff",
    "x" * 256,
    "é" * 128,
    "a/" * 600 + "a",
]


@pytest.mark.parametrize("name", GOOD)
def test_a_name_that_stays_where_it_is_put(name: str, tmp_path: Path) -> None:
    assert path_below(tmp_path, name) == tmp_path / name
    assert (location(tmp_path) / name).local == tmp_path / name


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_a_name_that_is_refused(name: str, tmp_path: Path) -> None:
    for refusing in (lambda: path_below(tmp_path, name), lambda: location(tmp_path) / name):
        with pytest.raises(BadInput) as caught:
            refusing()
        message = str(caught.value)
        assert message.startswith(f"{tmp_path} has the name ")
        assert message.isascii() and message.isprintable() and len(message) < 1000


def test_one_part() -> None:
    assert safe_part("a.b", "x") == "a.b"
    with pytest.raises(BadInput, match="x has the name 'a/b', which names another directory"):
        safe_part("a/b", "x")
    assert safe_path("a/b", "x") == "a/b"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json", "CONFIG.json"], "take for one file"),
        (["\u00e9", "e\u0301"], "take for one file"),
        (["stra\u00dfe", "strasse"], "take for one file"),
        (["a", "a/b"], "cannot be a directory too"),
        (["a/b/c", "A"], "cannot be a directory too"),
    ],
)
def test_names_that_meet(names: list[str], message: str) -> None:
    for order in (names, names[::-1]):
        with pytest.raises(BadInput, match=message):
            require_distinct(order, "x")


def test_names_that_do_not_meet() -> None:
    require_distinct(["a", "ab", "b/a", "b/c", "a.json", "a-json"], "x")
