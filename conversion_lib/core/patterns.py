r"""Regular expressions that come from a file, matched in linear time.

Python's `re` can take exponential time, so a config could stop every command that reads it. google-re2 cannot, since it
has no lookaheads and no back-references. Published configs use lookaheads at the beginning, such as `^(?!mtp\.).*`:
those are matched apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import re2

from conversion_lib.errors import BadInput
from conversion_lib.limits import PATTERN_CHARACTERS

LOOKAHEADS = {"(?!": False, "(?=": True}
"""How a lookahead begins, and whether it has to match."""


@dataclass(frozen=True)
class Pattern:
    """A pattern that matches at the beginning of a text, as `re.match` does.

    Attributes:
        source: The pattern as it was written.
    """

    source: str
    _matches: Callable[[str], bool]

    def matches(self, text: str) -> bool:
        """Returns whether the text begins with what the pattern describes."""
        return self._matches(text)


def compile_pattern(source: str, where: str) -> Pattern:
    """Compiles a pattern.

    Args:
        source: In the syntax of Python's `re`, as far as google-re2 has it.
        where: What the message calls the place that it is from.

    Raises:
        BadInput: It is not a pattern, is too long, or has what cannot be matched in linear time.
    """
    if len(source) > PATTERN_CHARACTERS:
        raise BadInput(f"{where}: a pattern has {len(source)} characters, and {PATTERN_CHARACTERS} are allowed")
    conditions, rest = _leading_lookaheads(source)
    if conditions and _has_alternatives(rest):
        raise BadInput(
            f"{where}: {source!r} has a lookahead before alternatives (`|`); put the alternatives in a group"
        )
    compiled = [(_compiled(inner, source, where), wanted) for inner, wanted in conditions]
    main = _compiled(rest, source, where)

    def matches(text: str) -> bool:
        return all((found.match(text) is not None) == wanted for found, wanted in compiled) and (
            main.match(text) is not None
        )

    return Pattern(source, matches)


def _compiled(pattern: str, source: str, where: str) -> re2._Regexp:
    options = re2.Options()
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace") if error.args else "unknown"
    except UnicodeEncodeError:
        reason = "it is no text"
    raise BadInput(
        f"{where}: {source!r} is not a regular expression matched in linear time: {reason}. Back-references are "
        "not supported, and lookaheads only at the beginning"
    )


def _leading_lookaheads(pattern: str) -> tuple[list[tuple[str, bool]], str]:
    """Returns the lookaheads at the beginning, each with whether it has to match, and the rest of the pattern."""
    conditions = []
    rest = pattern.removeprefix("^")
    while (wanted := LOOKAHEADS.get(rest[:3])) is not None and (end := _group_end(rest)):
        conditions.append((rest[3 : end - 1], wanted))
        rest = rest[end:]
    return (conditions, rest) if conditions else ([], pattern)


def _group_end(pattern: str) -> int:
    """Returns the index after the group at the beginning; 0 if it does not end."""
    depth = 0
    for index, character in _syntax(pattern):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return index + 1
    return 0


def _has_alternatives(pattern: str) -> bool:
    """Returns whether there is a `|` outside of any group."""
    depth = 0
    for _, character in _syntax(pattern):
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            return True
    return False


def _syntax(pattern: str) -> list[tuple[int, str]]:
    """Returns the characters that are neither escaped nor in a class such as `[(|]`, with their indices."""
    found, index, opened = [], 0, -1
    while index < len(pattern):
        character = pattern[index]
        if character == "\\":
            index += 2
            continue
        if opened < 0 and character == "[":
            opened = index + (2 if pattern[index + 1 : index + 2] == "^" else 1)
        elif opened >= 0 and character == "]" and index > opened:
            opened = -1
            index += 1
            continue
        if opened < 0:
            found.append((index, character))
        index += 1
    return found
