"""YAML with the line of every value, so that an error can name the line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from conversion_lib.core.documents import compose_yaml, value_of
from conversion_lib.errors import BadInput

Path = tuple[str | int, ...]
"""Keys and indices from the top of the document to a value."""


@dataclass(frozen=True)
class Document:
    """A YAML document: its data, and the line of each value, counted from 1, by its path."""

    data: Any
    lines: Mapping[Path, int]

    def line(self, path: Sequence[str | int]) -> int:
        """Returns the line of the value at `path`, or, if there is none, of the innermost existing value around it."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        return self.lines.get(known, 1)


def parse(text: bytes | str, name: str) -> Document:
    """Parses YAML.

    Args:
        text: The document.
        name: The file's name, for errors.

    Raises:
        BadInput: The text is not YAML, is beyond the limits on YAML, has a key twice, or has an anchor (`&`). The
            message names the line.
    """
    lines: dict[Path, int] = {}
    node = compose_yaml(text, name)
    if node is not None:
        _record(node, (), lines, name, set())
    return Document(value_of(node, name), lines)


def _record(node: yaml.Node, path: Path, lines: dict[Path, int], name: str, seen: set[int]) -> None:
    here = node.start_mark.line + 1
    if id(node) in seen:
        raise BadInput(f"{name}, line {here}: anchors are not allowed; put what entries share into `defaults`")
    seen.add(id(node))
    lines[path] = here
    if isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            _record(value, (*path, index), lines, name, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner, line = (*path, str(key.value)), key.start_mark.line + 1
            if inner in lines:
                raise BadInput(f"{name}, line {line}: {key.value} is given twice, first in line {lines[inner]}")
            _record(value, inner, lines, name, seen)
            lines[inner] = line  # a block begins in the line after its key, but a person looks for the key
