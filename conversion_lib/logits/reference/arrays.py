"""Reads the arrays of an .npz within a limit of bytes: sizes are compared before anything is unpacked."""

from __future__ import annotations

import math
import re
import zipfile
from pathlib import Path
from typing import IO, Any, Self

import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.limits import NPY_HEADER_BYTES

NUMBERS, TEXT = "iuf", "U"
"""Kinds of numpy dtypes."""

HEADER = re.compile(
    rb"\{'descr': '([<>|=]?[a-zA-Z][0-9]{1,10})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:[0-9]{1,13}(?:, ?[0-9]{1,13})?,?)?)\), ?\}\s*"
)
"""Of an array of one dtype with at most two axes."""


class NpzReader:
    """The arrays of an .npz by name; nothing is unpickled.

    Args:
        path: The file.
        most_bytes: Bytes that all arrays that are read may take together.

    Raises:
        ValueError: An array is not numbers or text, would take more, or its sizes contradict each other.
        zipfile.BadZipFile: It is no .npz, or is cut off.
        KeyError: It has no array of that name.
    """

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._zip, self._room = zipfile.ZipFile(path), most_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._zip.close()

    def numbers(self, name: str) -> Array:
        """Returns an array of integers or floats."""
        return self._read(name, NUMBERS)

    def text(self, name: str) -> str:
        """Returns an array that is one text."""
        array = self._read(name, TEXT)
        if array.shape:
            raise ValueError(f"{name} should be one text")
        return str(array)

    def _read(self, name: str, kinds: str) -> Array:
        member = self._zip.getinfo(f"{name}.npy")
        self._room -= member.file_size
        if self._room < 0:
            raise ValueError(f"{name} takes {member.file_size} bytes, more than arrays of a file of this size may take")
        with self._zip.open(member) as stream:
            shape, fortran, dtype = _header(stream, name)
            nbytes = math.prod(shape) * dtype.itemsize
            if dtype.kind not in kinds or not 0 < nbytes <= member.file_size:
                raise ValueError(
                    f"{name} has {nbytes} bytes of {dtype} by its header, and {member.file_size} in the file"
                )
            data = stream.read(nbytes)
        if len(data) < nbytes:
            raise ValueError(f"{name} is cut off")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _header(stream: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Reads the header as numpy writes it. numpy's own reader takes any Python literal."""
    magic, length_bytes = stream.read(8), 2
    if magic[:6] != np.lib.format.MAGIC_PREFIX or magic[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError(f"{name} is no array")
    if magic[6:] == b"\x02\x00":
        length_bytes = 4
    length = int.from_bytes(stream.read(length_bytes), "little")
    found = HEADER.fullmatch(stream.read(length)) if length <= NPY_HEADER_BYTES else None
    if found is None:
        raise ValueError(f"{name} has no header that numpy writes")
    descr, fortran, extents = (part.decode() for part in found.groups())
    shape = tuple(int(extent) for extent in extents.split(",") if extent.strip())
    try:
        return shape, fortran == "True", np.dtype(descr)
    except TypeError:
        raise ValueError(f"{name} has the unknown dtype {descr}") from None
