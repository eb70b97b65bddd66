"""Headers that are taken and headers that are refused, each as the format's own package does."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.errors import BadInput
from conversion_lib.limits import HEADER_BYTES
from conversion_lib.sources.safetensors_header import Entry, header_bytes, parse_header

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
B = {"dtype": "BF16", "shape": [3, 2], "data_offsets": [8, 20]}
ROOM = 20
"""Bytes of the two."""


def text_of(header: Any) -> bytes:
    return header if isinstance(header, bytes) else json.dumps(header).encode()


def file_of(header: Any, room: int = ROOM) -> bytes:
    text = text_of(header)
    return struct.pack("<Q", len(text)) + text + bytes(room)


def parsed(content: bytes) -> list[Entry]:
    start = header_bytes(len(content), lambda count: content[:count])
    return parse_header("model.safetensors", len(content), start)


def package_takes(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except Exception:
        return False
    return True


def ferry_takes(content: bytes) -> bool:
    try:
        parsed(content)
    except BadInput:
        return False
    return True


TAKEN = {
    "two tensors": {"a": A, "b": B},
    "in any order": {"b": B, "a": A},
    "metadata": {"__metadata__": {"format": "pt"}, "a": A, "b": B},
    "no metadata": {"__metadata__": None, "a": A, "b": B},
    "more keys": {"a": A | {"more": 1}, "b": B},
    "empty tensors": {"a": A, "e": {"dtype": "F32", "shape": [0, 5], "data_offsets": [8, 8]}, "b": B},
    "a scalar": {"a": A | {"shape": [2, 1, 1]}, "b": {"dtype": "F32", "shape": [], "data_offsets": [8, 12]}},
    "spaces behind": text_of({"a": A, "b": B}) + b"   ",
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_package_takes_is_taken(name):
    content = file_of(TAKEN[name], 12 if name == "a scalar" else ROOM)
    assert package_takes(content)
    found = parsed(content)
    base = len(content) - (12 if name == "a scalar" else ROOM)
    assert {entry.info.name: (entry.start - base, entry.stop - base) for entry in found} | {"e": (8, 8)} == {
        "a": (0, 8),
        "b": (8, 12 if name == "a scalar" else 20),
        "e": (8, 8),
    }


def twice(one: str, other: str) -> bytes:
    return b"{" + f'"a": {one}, "a": {other}, "b": {json.dumps(B)}'.encode() + b"}"


REFUSED = {
    "a name twice": (twice(json.dumps(A), json.dumps(A | {"data_offsets": [8, 16]})), "a is there twice"),
    "a key twice": (
        b'{"a": {"dtype": "F32", "dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        "dtype is there twice",
    ),
    "the same bytes twice": (
        {"a": A, "b": B, "c": A},
        "c begins at byte 0 of the data, expected 8: it overlaps a",
    ),
    "some of the same bytes": ({"a": A, "b": B | {"shape": [4, 2], "data_offsets": [4, 20]}}, "it overlaps a"),
    "a hole": ({"a": A, "b": B | {"shape": [1, 2], "data_offsets": [16, 20]}}, "leaves 8 bytes that nothing names"),
    "a hole at the beginning": ({"b": B}, "leaves 8 bytes that nothing names after the header"),
    "bytes behind": ({"a": A}, "longer than its header says"),
    "beyond the file": ({"a": A, "b": B, "c": A | {"data_offsets": [20, 28]}}, "truncated"),
    "far beyond the file": ({"a": A | {"shape": [1 << 61], "data_offsets": [0, 1 << 63]}}, "data_offsets"),
    "the end before the beginning": ({"a": A | {"data_offsets": [8, 0]}, "b": B}, "data_offsets [8, 0] of a"),
    "one offset": ({"a": A | {"data_offsets": [8]}, "b": B}, "data_offsets [8] of a"),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}, "b": B}, "data_offsets null of a"),
    "offsets that are no list": ({"a": A | {"data_offsets": {"0": 8}}, "b": B}, "data_offsets"),
    "offsets that are no integers": ({"a": A | {"data_offsets": [0, 8.0]}, "b": B}, "data_offsets"),
    "a wrong size": ({"a": A | {"shape": [3]}, "b": B}, "tensor a takes 8 bytes, but its shape and dtype say 12"),
    "a negative extent": ({"a": A | {"shape": [-1, -2]}, "b": B}, "shape [-1, -2] of a"),
    "an extent that is no integer": ({"a": A | {"shape": [2.0]}, "b": B}, "shape [2.0] of a"),
    "an extent that is a text": ({"a": A | {"shape": ["2"]}, "b": B}, 'shape ["2"] of a'),
    "an extent that is a bool": ({"a": A | {"shape": [True, 2]}, "b": B}, "shape [true, 2] of a"),
    "an extent that is a list": ({"a": A | {"shape": [[2]]}, "b": B}, "shape [[2]] of a"),
    "a shape that is a number": ({"a": A | {"shape": 2}, "b": B}, "shape 2 of a"),
    "a shape beyond all": ({"a": A | {"shape": [1 << 62, 1 << 62]}, "b": B}, "more elements than there can be"),
    "such a shape of nothing": (
        {"a": A | {"shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}},
        "more elements than there can be",
    ),
    "a number of 400 digits": (
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 400 + b'], "data_offsets": [0, 8]}}',
        "an integer has 400 digits",
    ),
    "a number of 5000 digits": (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", "header"),
    "a dtype that is not known": ({"a": A | {"dtype": "F99"}, "b": B}, "dtype F99"),
    "a dtype that is none": ({"a": A | {"dtype": ["F32"]}, "b": B}, "dtype ['F32']"),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}, "b": B}, "dtype None"),
    "a tensor that is a list": ({"a": [], "b": B}, "tensor a is list"),
    "metadata of numbers": ({"__metadata__": {"format": 1}, "a": A, "b": B}, "__metadata__"),
    "metadata that is a text": ({"__metadata__": "pt", "a": A, "b": B}, "__metadata__"),
    "a list": ([A, B], "it should be a JSON object, not list"),
    "no JSON": (b"{,}", "header"),
    "NaN": (b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}', "NaN is not a number"),
    "no UTF-8": (b'{"\xff": {}}', "header"),
    "half of a surrogate pair": (
        rb'{"\ud800": {"dtype": "F32", "shape": [5], "data_offsets": [0, 20]}}',
        "surrogate pair",
    ),
    "nesting": (b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_package_refuses_is_refused(name):
    header, words = REFUSED[name]
    content = file_of(header)
    assert not package_takes(content)
    with pytest.raises(BadInput) as raised:
        parsed(content)
    line = str(raised.value)
    assert line.startswith("model.safetensors") and words in line and "\n" not in line and len(line) < 400


def test_the_same_entry_twice_is_refused_too():
    """The package keeps one of the two."""
    content = file_of(twice(json.dumps(A), json.dumps(A)))
    assert package_takes(content)
    with pytest.raises(BadInput, match="a is there twice"):
        parsed(content)


def test_more_axes_than_an_array_may_have_are_refused():
    content = file_of({"a": A | {"shape": [2, *[1] * 64]}, "b": B})
    assert package_takes(content)
    with pytest.raises(BadInput, match="expected 64 whole numbers at most"):
        parsed(content)


@pytest.mark.parametrize("length", [HEADER_BYTES + 1, 1 << 40, (1 << 64) - 1])
def test_a_header_that_is_too_long_is_not_read(length):
    asked = []

    def first_bytes(count: int) -> bytes:
        asked.append(count)
        return struct.pack("<Q", length) + bytes(100)

    start = header_bytes(1 << 65, first_bytes)
    assert max(asked) < 1 << 20
    with pytest.raises(BadInput, match=f"it would take {length} bytes, and 100000000 are allowed"):
        parse_header("x", 1 << 65, start)
    with pytest.raises(BadInput, match="truncated or not a safetensors file: 1000 bytes, no whole header"):
        parse_header("x", 1000, start)


@pytest.mark.parametrize("keep", [0, 3, 8, 20])
def test_a_file_that_ends_in_its_header(keep):
    with pytest.raises(BadInput, match="truncated"):
        parsed(file_of({"a": A, "b": B})[:keep])


def value() -> st.SearchStrategy[Any]:
    numbers = st.sampled_from([0, 1, 2, 3, 4, 8, 12, 20, 28, -1, 1 << 31, 1 << 62, 1 << 70, 1.5, True, None, "F32"])
    return st.one_of(numbers, st.lists(numbers, max_size=3))


@settings(deadline=None, max_examples=400)
@given(
    st.dictionaries(
        st.sampled_from(["a", "b", "c", "__metadata__"]),
        st.one_of(
            st.sampled_from([A, B, A | {"data_offsets": [20, 28]}, {"format": "pt"}, None]),
            st.fixed_dictionaries(
                {"dtype": st.sampled_from(["F32", "BF16", "U8", 1]), "shape": value(), "data_offsets": value()}
            ),
        ),
        max_size=3,
    ),
    st.sampled_from([0, 8, 20, 28]),
)
def test_any_header_is_taken_where_the_package_takes_it(header, room):
    content = file_of(header, room)
    assert ferry_takes(content) == package_takes(content)
