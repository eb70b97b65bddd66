"""The header of a safetensors file, checked as the safetensors package checks it.

A file has an 8-byte little-endian length, a JSON header of that length, and the tensors' bytes, row-major
(https://huggingface.co/docs/safetensors, "Format"). Every byte belongs to exactly one tensor.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from conversion_lib.core.documents import parse_json
from conversion_lib.core.dtypes import SAFETENSORS_DTYPES, itemsize
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.limits import HEADER_BYTES

FIRST_BYTES = 128 << 10
"""Bytes of the first request for a header. Almost every header is smaller, so one request is enough."""
MAX_ELEMENTS = 1 << 63
MAX_AXES = 64
"""The most axes of a numpy array."""


class Entry(NamedTuple):
    """A tensor of a file: its first byte in the file, and the byte after its last."""

    info: TensorInfo
    start: int
    stop: int


def header_bytes(size: int, first_bytes: Callable[[int], bytes]) -> bytes:
    """Reads the length field and the header of a safetensors file.

    Args:
        size: The file's size in bytes.
        first_bytes: Returns the given number of bytes from the beginning of the file.

    Returns:
        The bytes of the length field and of the header. If the header is not valid, the bytes that were read, which
        `parse_header` refuses.
    """
    start = first_bytes(min(FIRST_BYTES, size)) if size >= 8 else b""
    if len(start) < 8:
        return start
    length: int = 8 + struct.unpack("<Q", start[:8])[0]
    if len(start) < length <= min(8 + HEADER_BYTES, size):
        start = first_bytes(length)
    return start[:length]


def parse_header(file: str, size: int, start: bytes) -> list[Entry]:
    """Parses and checks a header.

    Args:
        file: The file's name in messages.
        size: The file's size in bytes.
        start: Its length field and header, from `header_bytes`.

    Returns:
        Its tensors, in the order of the header.

    Raises:
        BadInput: The file is truncated, or the header is not valid: a name is there twice, a shape, dtype or offset is
            wrong, tensors overlap, or bytes belong to no tensor.
    """
    length = struct.unpack("<Q", start[:8])[0] if len(start) >= 8 else 0
    if HEADER_BYTES < length <= size - 8:
        raise BadInput(f"{file} has no whole header: it would take {length} bytes, and {HEADER_BYTES} are allowed")
    if not 0 < length <= size - 8 or len(start) < 8 + length:
        raise BadInput(
            f"{file} is truncated or not a safetensors file: {size} bytes, no whole header. Download it again"
        )
    try:
        header = parse_json(start[8:], "it", strict=True, limit=HEADER_BYTES)
    except BadInput as error:
        raise _no_header(file, str(error)) from None
    _check_metadata(file, header.pop("__metadata__", None))
    room = size - 8 - length
    entries = [_entry(file, name, entry, 8 + length) for name, entry in header.items()]
    _require_tiles(file, entries, 8 + length, room)
    return entries


def _no_header(file: str, why: str) -> BadInput:
    return BadInput(f"{file} has a header that is not in safetensors format: {why}")


def _check_metadata(file: str, metadata: Any) -> None:
    texts = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not texts:
        raise _no_header(file, "__metadata__ holds something else than texts by name")


def _entry(file: str, name: str, entry: Any, base: int) -> Entry:
    """Checks the entry of one tensor; `base` is where the tensors' bytes begin in the file."""
    if not isinstance(entry, dict):
        raise _no_header(file, f"tensor {name} is {type(entry).__name__}, expected an object")
    code, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(code, str) or code not in SAFETENSORS_DTYPES:
        raise BadInput(f"{file}: tensor {name} has dtype {code}, which is not a known dtype")
    extents, span = _counts(shape), _counts(offsets)
    if extents is None or len(extents) > MAX_AXES:
        raise BadInput(
            f"{file}: its header says shape {_shown(shape)} of {name}, expected {MAX_AXES} whole numbers at most"
        )
    if span is None or len(span) != 2 or span[0] > span[1]:
        raise BadInput(
            f"{file}: its header says data_offsets {_shown(offsets)} of {name}, expected its first byte and the one "
            "after its last"
        )
    dtype, (first, last) = SAFETENSORS_DTYPES[code], span
    if (nbytes := _nbytes(extents, itemsize(dtype))) != last - first:
        said = f"{nbytes} bytes" if nbytes is not None else "more elements than there can be"
        raise BadInput(f"{file}: tensor {name} takes {last - first} bytes, but its shape and dtype say {said}")
    return Entry(TensorInfo(name, tuple(extents), dtype, file), base + first, base + last)


def _counts(value: Any) -> list[int] | None:
    """Returns the value if it is a list of counts; else None."""
    counts = isinstance(value, list) and all(type(count) is int and 0 <= count < MAX_ELEMENTS for count in value)
    return value if counts else None


def _nbytes(shape: list[int], width: int) -> int | None:
    """Returns a tensor's bytes; None if the axes that are not empty multiply to more than there can be."""
    elements = 1
    for extent in shape:
        elements *= extent or 1
        if elements * width >= MAX_ELEMENTS:
            return None
    return 0 if 0 in shape else elements * width


def _shown(value: Any) -> str:
    """Returns a value as JSON, cut if it is long."""
    text = json.dumps(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _require_tiles(file: str, entries: list[Entry], base: int, room: int) -> None:
    """Raises BadInput unless the tensors are side by side from the first byte to the last."""
    end, before = base, "the header"
    for info, start, stop in sorted(entries, key=lambda entry: entry[1:]):
        if start != end:
            what = "overlaps" if start < end else f"leaves {start - end} bytes that nothing names after"
            raise BadInput(
                f"{file}: tensor {info.name} begins at byte {start - base} of the data, expected {end - base}: it "
                f"{what} {before}. The file is damaged, or was not written by safetensors"
            )
        end, before = stop, info.name
    if end != base + room:
        state = "truncated" if base + room < end else "longer than its header says"
        raise BadInput(f"{file} is {state}: {base + room} bytes, expected {end}. Download it again")
