"""Compares two checkpoints of the same kind, leaf by leaf, bit for bit, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel

from conversion_lib.conversions.opening import files_at
from conversion_lib.core.boxes import Box, Shape, size, split, whole
from conversion_lib.core.dtypes import itemsize
from conversion_lib.core.memory_bound import memory_bound
from conversion_lib.core.tensors import Source, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.sources.files import Files
from conversion_lib.sources.orbax import OrbaxSource
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.sources.weight_files import INDEX_NAME
from conversion_lib.storage.locations import location

READ_BYTES = 64 << 20
"""Largest part of a leaf that is read at once."""

COMPARE_BYTES = 4 << 30
"""More than boxes of both need, with the chunks that they lie in."""
BUCKET_BYTES = 16 * READ_BYTES
"""The memory budget for reading a checkpoint in a bucket. The blocks that are kept take a share of it."""


class Difference(BaseModel):
    """How one leaf differs between A and B. `bits`: shape and dtype are the same, and some elements differ."""

    path: str
    what: Literal["only in A", "only in B", "shape", "dtype", "bits"]
    detail: str = ""


class Comparison(BaseModel):
    """The result of a comparison.

    Attributes:
        same: Whether there are no differences.
        leaves: Number of leaves in A or B.
        bytes_compared: Size of the leaves that both have.
        differences: One entry for each leaf that differs.
    """

    same: bool
    leaves: int
    bytes_compared: int
    differences: list[Difference]


Opened = tuple[Literal["maxtext", "safetensors"], Source]


@contextmanager
def opened_checkpoint(path: Path | str) -> Iterator[Opened]:
    """Opens a checkpoint of either kind, in a directory or at gs://bucket/prefix.

    Yields:
        The kind and the source.

    Raises:
        BadInput: There is no checkpoint of either kind.
        OutsideFailure: Cloud Storage failed.
    """
    with files_at(location(path), BUCKET_BYTES) as found:
        if not isinstance(found, Files):
            yield "maxtext", OrbaxSource(found)
        elif found.weights() or (found.directory / INDEX_NAME).is_file():
            yield "safetensors", SafetensorsSource(found)
        else:
            raise BadInput(f"{path} is neither a Hugging Face checkpoint (safetensors) nor a MaxText one (Orbax)")


def compare(a: Path | str, b: Path | str, *, reporter: Reporter = SILENT) -> Comparison:
    """Compares every leaf of two checkpoints, in directories or at gs://bucket/prefix. NaNs are compared by their bits.

    Raises:
        BadInput: The two are of different kinds, or one is not a checkpoint.
        OutsideFailure: Cloud Storage failed.
    """
    with opened_checkpoint(a) as (kind_a, source_a), opened_checkpoint(b) as (kind_b, source_b):
        if kind_a != kind_b:
            raise BadInput(f"{a} is a {kind_a} checkpoint and {b} a {kind_b} one: give two of the same kind")
        with memory_bound(COMPARE_BYTES, f"{a} and {b}"):
            return _compare(source_a, source_b, reporter)


def _compare(source_a: Source, source_b: Source, reporter: Reporter) -> Comparison:
    names_a, names_b = set(source_a.tensors), set(source_b.tensors)
    differences = [Difference(path=name, what="only in A") for name in sorted(names_a - names_b)]
    differences += [Difference(path=name, what="only in B") for name in sorted(names_b - names_a)]
    shared = sorted(names_a & names_b)
    total = sum(source_a.tensors[name].nbytes for name in shared)
    with reporter.task("compare", total) as task:
        for name in shared:
            found = _compare_leaf(source_a, source_b, source_a.tensors[name], source_b.tensors[name])
            task.advance(source_a.tensors[name].nbytes)
            if found is not None:
                differences.append(found)
    return Comparison(
        same=not differences, leaves=len(names_a | names_b), bytes_compared=total, differences=differences
    )


def _compare_leaf(a: Source, b: Source, info: TensorInfo, other: TensorInfo) -> Difference | None:
    if info.shape != other.shape:
        detail = f"{list(info.shape)} in A, {list(other.shape)} in B"
        return Difference(path=info.name, what="shape", detail=detail)
    if info.dtype != other.dtype:
        return Difference(path=info.name, what="dtype", detail=f"{info.dtype} in A, {other.dtype} in B")
    count = 0
    for box in read_boxes(info.shape, itemsize(info.dtype)):
        left, right = (np.ascontiguousarray(source.read(info.name, box)) for source in (a, b))
        width = max(itemsize(info.dtype), 1)
        unequal = left.reshape(-1).view(np.uint8) != right.reshape(-1).view(np.uint8)
        count += int(unequal.reshape(-1, width).any(axis=1).sum())
    if count:
        return Difference(path=info.name, what="bits", detail=f"{count} of {size(whole(info.shape))} elements")
    return None


def read_boxes(shape: Shape, width: int, limit: int = READ_BYTES) -> Iterator[Box]:
    """Yields boxes that tile an array, cut along its leading axes.

    Args:
        shape: The array's shape.
        width: Bytes of an element.
        limit: About the largest size of a box in bytes.
    """
    pending = [(whole(shape), 0)]
    while pending:
        box, axis = pending.pop()
        nbytes = size(box) * width
        if nbytes <= limit or axis == len(shape):
            yield box
            continue
        extent = box[axis][1] - box[axis][0]
        step = max(1, extent * limit // nbytes)
        pending.extend((part, axis + 1) for part in split(box, axis, step))
