"""Reads JSON and YAML that come from outside: each document within limits, and each problem one line that names it.

Records of Ferry's own with a fixed schema are read by `conversion_lib.record`, whose reader has limits of its own.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, TypeVar

import yaml

from conversion_lib.errors import BadInput
from conversion_lib.limits import (
    INTEGER_DIGITS,
    JSON_BYTES,
    JSON_DEPTH,
    STORED_BYTES,
    YAML_BYTES,
    YAML_DEPTH,
    YAML_NODES,
)

Kind = TypeVar("Kind", dict[str, Any], list[Any])
KINDS = {dict: "object", list: "list"}


def read_limited(path: Path, limit: int = STORED_BYTES) -> bytes:
    """Reads a file that comes from outside.

    Args:
        path: The file.
        limit: The most bytes that it may have.

    Raises:
        BadInput: It is larger, or not a regular file.
        OSError: It cannot be read.
    """
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a regular file")
    with path.open("rb") as stream:
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise BadInput(f"{path} is larger than {limit} bytes, the most that ferry reads of such a file")
    return content


def parse_json(
    content: bytes,
    where: object,
    kind: type[Kind] = dict,  # type: ignore[assignment]  # mypy cannot infer a default of a type variable
    *,
    strict: bool = False,
    limit: int = JSON_BYTES,
) -> Kind:
    """Parses JSON.

    Args:
        content: The document, in UTF-8.
        where: The file's name in messages.
        kind: The type of the document, `dict` or `list`.
        strict: Reads it as the safetensors package reads a header: no key twice, no NaN or Infinity, no byte order
            mark. If False, as transformers reads a config: published ones have Infinity.
        limit: The most bytes that it may have.

    Raises:
        BadInput: It is not such a document, or exceeds a limit.
    """
    if len(content) > limit:
        raise BadInput(f"{where} has {len(content)} bytes of JSON, and {limit} are allowed")
    try:
        text = content.decode("utf-8" if strict else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not JSON: it is not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        value = json.loads(
            text,
            parse_int=_integer,
            parse_constant=_refuse_constant if strict else None,
            object_pairs_hook=_unique_keys if strict else None,
        )
        _require_depth(value)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except RecursionError:
        raise BadInput(f"{where} is nested too deeply: {JSON_DEPTH} levels are allowed") from None
    except UnicodeEncodeError:
        raise BadInput(f"{where} has half of a surrogate pair, which is no text") from None
    except ValueError as error:
        raise BadInput(f"{where} is not JSON: {error}") from None
    if not isinstance(value, kind):
        raise BadInput(f"{where} should be a JSON {KINDS[kind]}, not {type(value).__name__}")
    return value


def _integer(digits: str) -> int:
    if len(digits) > INTEGER_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, and {INTEGER_DIGITS} are allowed")
    return int(digits)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice} is there twice")
    return found


def _require_depth(value: Any) -> None:
    """Raises RecursionError where containers lie more than JSON_DEPTH within each other."""
    level, depth = [value], 0
    while level:
        if depth >= JSON_DEPTH:
            raise RecursionError
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        depth += 1


def parse_yaml(content: bytes | str, where: object) -> Any:
    """Parses YAML of plain values: mappings, sequences, texts, numbers, dates. Aliases are followed within limits.

    Args:
        content: The document.
        where: The file's name in messages.

    Raises:
        BadInput: It is not YAML, exceeds a limit, or a value contains itself.
    """
    return value_of(compose_yaml(content, where), where)


def compose_yaml(content: bytes | str, where: object) -> yaml.Node | None:
    """Parses YAML into nodes, each with its place in the text; None for an empty document.

    Args:
        content: The document.
        where: The file's name in messages.

    Raises:
        BadInput: As `parse_yaml` raises it.
    """
    if len(content) > YAML_BYTES:
        raise BadInput(f"{where} has {len(content)} bytes of YAML, and {YAML_BYTES} are allowed")
    try:
        text = content.decode("utf-8-sig") if isinstance(content, bytes) else content
        return _Loader(text).get_single_node()
    except yaml.YAMLError as error:
        raise BadInput(_located(error, where)) from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{where} is not UTF-8: {error.reason} at byte {error.start}") from None


def value_of(node: yaml.Node | None, where: object) -> Any:
    """Returns the value of a node from `compose_yaml`.

    Args:
        node: The node; None: an empty document, whose value is None.
        where: The file's name in messages.

    Raises:
        BadInput: It holds something that is not a plain value, or not the value that its tag says.
    """
    if node is None:
        return None
    try:
        return yaml.SafeLoader("").construct_document(node)
    except yaml.YAMLError as error:
        raise BadInput(_located(error, where)) from None
    # PyYAML's constructors raise any of these for a value that is not what its tag or its look says, such as the date
    # 2026-02-30, an integer of 5000 digits, or `!!bool maybe`
    except (ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        raise BadInput(f"{where} has a value that YAML cannot read: {error}") from None


def _located(error: yaml.YAMLError, where: object) -> str:
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        return f"{where}, line {mark.line + 1 if mark else 1}: {error.problem or error.context}"
    return f"{where} is not YAML: {error}"


class _Loader(yaml.SafeLoader):
    """Composes nodes within YAML_DEPTH and YAML_NODES, the nodes that aliases repeat included."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._count = 0
        self._sizes: dict[str, tuple[int, int]] = {}
        """Of each anchor that is complete: its nodes, and the levels below it."""
        self._deepest = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        anchor = str(event.anchor) if getattr(event, "anchor", None) is not None else None
        if self.check_event(yaml.AliasEvent):
            if anchor in self.anchors and anchor not in self._sizes:
                raise yaml.MarkedYAMLError(problem=f"{anchor} contains itself", problem_mark=event.start_mark)
            nodes, levels = self._sizes.get(anchor or "", (1, 1))
            self._add(nodes, self._depth + levels, event.start_mark)
            return super().compose_node(parent, index)
        before, deepest = self._count, self._deepest
        self._depth += 1
        self._deepest = self._depth
        self._add(1, self._depth, event.start_mark)
        try:
            node = super().compose_node(parent, index)
        finally:
            levels = self._deepest - self._depth + 1
            self._depth -= 1
            self._deepest = max(deepest, self._deepest)
        if anchor is not None:
            self._sizes[anchor] = (self._count - before, levels)
        return node

    def _add(self, nodes: int, depth: int, mark: Any) -> None:
        self._count += nodes
        self._deepest = max(self._deepest, depth)
        if depth > YAML_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"more than {YAML_DEPTH} levels", problem_mark=mark)
        if self._count > YAML_NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {YAML_NODES} values", problem_mark=mark)
