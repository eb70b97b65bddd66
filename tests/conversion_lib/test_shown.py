"""What is shown: nothing that a terminal obeys, no line of its own in a log, no markup."""

from __future__ import annotations

import io
import json

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.limits import MESSAGE_CHARACTERS
from conversion_lib.program import Outcome, run_command
from conversion_lib.progress import PlainConsole, Reporter
from conversion_lib.shown import escaped, one_line

HOSTILE = [
    ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
    ("\x9b31m", r"\x9b31m"),
    ("a\rb", r"a\rb"),
    ("a\x00b", r"a\x00b"),
    ("\u202egpj", r"\u202egpj"),
    ("\u2066x", r"\u2066x"),
    ("\u200bx", r"\u200bx"),
    ("\ud800", r"\ud800"),
    ("a\u2028b", r"a\u2028b"),
    ("\x7f", r"\x7f"),
    ("\U000e0041", r"\U000e0041"),
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_controls_are_escaped(text, shown):
    assert escaped(text) == shown
    assert escaped(shown) == shown


@pytest.mark.parametrize("text", ["model.layers.0.mlp", "Qwen/Qwen3-0.6B … – “é” 模型", "C:\\x1b"])
def test_other_text_is_unchanged(text):
    assert escaped(text) == one_line(text) == text


def test_a_message_is_one_line_of_limited_length():
    assert one_line("first\n   second\r\nthird\n") == "first second third"
    long = one_line("what " + "x" * 10**6 + " what to do")
    assert len(long) <= MESSAGE_CHARACTERS + 3
    assert long.startswith("what x")
    assert long.endswith("x what to do")


def test_errors_are_escaped_whoever_shows_them():
    assert str(BadInput("tensor \x1b[2J\nferry: passed")) == r"tensor \x1b[2J ferry: passed"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_progress_errors_and_results_of_a_command(log_format, capsys):
    def body(reporter):
        reporter.say("name \x1b[2J")
        return Outcome({}, ["cell \x1b[2J [red]x"], failed=True, message="failed \x1b[2J")

    assert run_command(body, log_format=log_format) == 1
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    assert out == "cell \\x1b[2J [red]x\n"
    said = json.loads(err.splitlines()[0])["message"] if log_format == "json" else err.splitlines()[0]
    assert said == "name \\x1b[2J"
    assert err.splitlines()[1] == "ferry: failed \\x1b[2J"


def test_a_table_shows_markup_and_controls_as_text():
    from rich.table import Table

    table = Table("[b]heading[/b]", title="[/nothing]")
    table.add_row("[red]x\x1b]0;owned\x07 :smile:")
    stream = io.StringIO()
    PlainConsole(file=stream, width=100, force_terminal=True).print(table)
    shown = stream.getvalue()
    assert "\x1b]0" not in shown
    for text in ("[red]x\\x1b]0;owned\\x07 :smile:", "[b]heading[/b]", "[/nothing]"):
        assert text in shown


def test_a_progress_bar_has_no_markup():
    reporter = Reporter()
    stream = io.StringIO()
    reporter._console = PlainConsole(file=stream, width=200, force_terminal=True)
    with reporter.task("[/x] a\x1b]0;owned\x07", 10) as task:
        task.advance(10)
    assert "[/x] a\\x1b]0;owned\\x07" in stream.getvalue()
    assert "\x1b]0" not in stream.getvalue()
