"""Makes text from outside safe to show on a terminal, in logs and in pages: the one place where that is done.

Names of tensors, files and models, values of configs and messages of servers can hold control characters. A terminal
would obey them, and a log would show them as lines of its own.
"""

from __future__ import annotations

import unicodedata

from conversion_lib.limits import MESSAGE_CHARACTERS

CONTROLS = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode's categories of what is not a character to see: controls, formats (such as those that reverse the direction
of text), halves of surrogate pairs, private use, separators of lines and paragraphs."""


def escaped(text: str) -> str:
    r"""Returns the text with each control or format character as a Python escape, such as `\x1b` or `\n`.

    Other text comes back unchanged, and so does text that was escaped before.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def escaped_lines(text: str) -> str:
    """As `escaped`, but line breaks stay."""
    return "\n".join(escaped(line) for line in text.split("\n"))


def visible(value: object) -> object:
    """As `escaped_lines` for a text; anything else comes back unchanged. For the values in templates of pages."""
    return escaped_lines(value) if type(value) is str else value  # Markup, a subclass of str, is a page's own


def one_line(text: object, most: int = MESSAGE_CHARACTERS) -> str:
    """Returns a message as one line, escaped.

    Args:
        text: The message. Its lines are joined with spaces.
        most: Characters, about. Of a longer message the middle is left out: it begins with what is wrong and ends with
            what to do.
    """
    whole = str(text)
    if len(whole) > 2 * most:  # most of it goes anyway
        whole = f"{whole[:most]} … {whole[-most:]}"
    lines = whole.strip().splitlines()
    line = escaped(" ".join(part.strip() for part in lines))
    end = most // 4
    return line if len(line) <= most else f"{line[: most - end]} … {line[-end:]}"


def _visible(character: str) -> str:
    if unicodedata.category(character) not in CONTROLS:
        return character
    return character.encode("unicode_escape").decode("ascii")
