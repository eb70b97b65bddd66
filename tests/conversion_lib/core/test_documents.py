"""JSON and YAML from outside: limits, and one line that names the file."""

from __future__ import annotations

import json

import pytest

from conversion_lib.core.documents import parse_json, parse_yaml, read_limited
from conversion_lib.errors import BadInput
from conversion_lib.limits import INTEGER_DIGITS, JSON_DEPTH, YAML_BYTES, YAML_DEPTH


def nested(depth, opening=b"[", closing=b"]"):
    return b'{"a":' + opening * (depth - 1) + closing * (depth - 1) + b"}"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "should be a JSON object, not list"),
        (b"null", "should be a JSON object, not NoneType"),
        (b'{"\xff": 1}', "is not UTF-8: .* at byte 2"),
        ("{}".encode("utf-16"), "is not UTF-8"),
        (nested(JSON_DEPTH + 1), "is nested too deeply"),
        (nested(900), "is nested too deeply"),
        (nested(100_000), "is nested too deeply"),
        (nested(100_000, b'{"a":', b"}").replace(b"{}", b"{1}"), "is nested too deeply"),
        (b'{"a": ' + b"9" * (INTEGER_DIGITS + 1) + b"}", "has 41 digits"),
        (b'{"a": -' + b"9" * 5000 + b"}", "has 5001 digits"),
        (rb'{"a": "\ud800"}', "half of a surrogate pair"),
        (rb'{"\uDfff": 1}', "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize("strict", [False, True])
def test_json_is_refused_in_one_line(content, problem, strict):
    with pytest.raises(BadInput, match=f"^the file.*{problem}"):
        parse_json(content, "the file", strict=strict)


def test_json_within_the_limits():
    assert parse_json(nested(JSON_DEPTH), "x") == json.loads(nested(JSON_DEPTH))
    assert parse_json(b'{"a": ' + b"9" * INTEGER_DIGITS + b"}", "x") == {"a": 10**INTEGER_DIGITS - 1}
    assert parse_json(rb'{"\ud83d\ude00": 1}', "x") == {"😀": 1}
    assert parse_json(b"[1]", "x", list) == [1]
    assert parse_json(b"\xef\xbb\xbf{}", "x") == {}
    assert parse_json(b'{"limit": [0.0, Infinity]}', "x") == {"limit": [0.0, float("inf")]}  # published by mamba models


@pytest.mark.parametrize("content", [b'{"a": 1, "a": 2}', b'{"a": NaN}', b'{"a": -Infinity}', b"\xef\xbb\xbf{}"])
def test_strict_json_is_that_of_the_safetensors_package(content):
    parse_json(content, "x")
    with pytest.raises(BadInput, match="is not JSON"):
        parse_json(content, "x", strict=True)


def test_a_file_larger_than_its_limit_is_not_read(tmp_path):
    (tmp_path / "f").write_bytes(b"12345")
    assert read_limited(tmp_path / "f", 5) == b"12345"
    with pytest.raises(BadInput, match="f is larger than 4 bytes"):
        read_limited(tmp_path / "f", 4)
    with pytest.raises(BadInput, match="is not a regular file"):
        read_limited(tmp_path)
    with pytest.raises(BadInput, match="has 5 bytes of JSON, and 4 are allowed"):
        parse_json(b"[  1]", "x", list, limit=4)


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[" * 5000 + "]" * 5000, f"line 1: more than {YAML_DEPTH} levels"),
        ("- " * (YAML_DEPTH + 1) + "x", f"more than {YAML_DEPTH} levels"),
        (LAUGHS, r"line \d: more than \d+ values"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}]\n" for i in range(60)),
            "line 49: more than 50 levels",
        ),
        ("a: &a [*a]", "line 1: a contains itself"),
        ("a: &a {<<: *a}", "line 1: a contains itself"),
        ("a: *nothing", "line 1: found undefined alias"),
        ("a: [", "line 1: "),
        ("\x00", "is not YAML"),
        ("x" * (YAML_BYTES + 1), "bytes of YAML"),
        ("d: 2026-02-30", "a value that YAML cannot read"),
        ("i: " + "9" * 5000, "a value that YAML cannot read"),
        ("!!bool maybe", "a value that YAML cannot read"),
        ("!!int ''", "a value that YAML cannot read"),
        ("!!timestamp x", "a value that YAML cannot read"),
        ("!!python/object/apply:os.system [id]", "could not determine a constructor"),
        ("{[1]: 2}", "unhashable"),
        ("--- a\n--- b", "line 2: "),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_yaml_is_refused_in_one_line(text, problem):
    with pytest.raises(BadInput, match=f"^the file.*{problem}"):
        parse_yaml(text, "the file")


def test_yaml_with_aliases_within_the_limits():
    assert parse_yaml("x: &x {q: 1}\ny: {<<: *x, r: *x}\n", "x") == {"x": {"q": 1}, "y": {"q": 1, "r": {"q": 1}}}
    assert parse_yaml(b"", "x") is None
