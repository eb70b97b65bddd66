"""YAML whose every value knows its line, so that an error can name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from conversion_lib.errors import BadInput

Path = tuple[str | int, ...]
"""Keys and indices from the top of the document to a value."""


@dataclass(frozen=True)
class Document:
    """A YAML document: its data, and the line (counted from 1) of each value by its path."""

    data: Any
    lines: Mapping[Path, int]

    def line(self, path: Sequence[str | int]) -> int:
        """The line of the value at `path`, or of the innermost one around it that is there."""
        known = tuple(path)
        while known and known not in self.lines:
            known = known[:-1]
        return self.lines.get(known, 1)


def parse(text: str, name: str) -> Document:
    """Parses `text`; `name` stands for it in errors.

    Raises BadInput, with the line, for what is no YAML, a key that is given twice, and anchors (`&`): an entry says
    all of itself, and nothing can refer to itself.
    """
    lines: dict[Path, int] = {}
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None:
            _record(node, (), lines, name, set())
        data = yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise BadInput(f"{name}, line {mark.line + 1 if mark else 1}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that there is not, such as 2026-02-30
        raise BadInput(f"{name}: {' '.join(str(error).split())}") from error
    return Document(data, lines)


def _record(node: yaml.Node, path: Path, lines: dict[Path, int], name: str, seen: set[int]) -> None:
    here = node.start_mark.line + 1
    if id(node) in seen:
        raise BadInput(f"{name}, line {here}: anchors are not taken; `defaults` is for what entries share")
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
            lines[inner] = line  # a block begins in the line after its key; the key's line is what a person looks for
