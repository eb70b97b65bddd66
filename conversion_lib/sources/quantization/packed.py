"""Weights in int4 as compressed-tensors' `pack-quantized`: eight values in a word, lowest bits first, each plus 8.

A module's `weight_packed` is int32 (out, in / 8). `weight_scale` has one scale for each row or for each group of a
row's values. `weight_shape` is (out, in). If the scheme is not symmetric, `weight_zero_point` has eight rows in a word.
The value is bf16((q − zero point) · scale), multiplied in the dtype of the scale.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from conversion_lib.core.boxes import Box, box_shape, whole
from conversion_lib.core.tensors import Array, Source, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.sources.quantization.weights import Scales, companion, require_matrix

CODES_SUFFIX = "_packed"
PER_WORD, OFFSET = 8, 8

LOOKED_UP = 1 << 16
"""Values that one call makes. With their input they take 8 bytes each, and fit into the L2 cache."""

_BYTES = np.arange(256)
_PAIRS = (np.stack([_BYTES & 15, _BYTES >> 4], axis=-1) - OFFSET).astype(np.float32).view(np.uint64).reshape(-1)
"""The float32 bits of the two values of each byte."""


@dataclass(frozen=True)
class Int4Weight:
    """A matrix in int4.

    Attributes:
        codes: `weight_packed`.
        scales: `weight_scale`.
        extents: `weight_shape`, whose values are checked when the weight is read.
        zero_points: `weight_zero_point`; None if the scheme is symmetric.
    """

    codes: TensorInfo
    scales: Scales
    extents: TensorInfo
    zero_points: TensorInfo | None

    @property
    def info(self) -> TensorInfo:
        name = self.codes.name.removesuffix(CODES_SUFFIX)
        return TensorInfo(name, self.scales.shape, "bfloat16", self.codes.file)

    @property
    def others(self) -> tuple[TensorInfo, ...]:
        return (self.scales.info, self.extents, *([self.zero_points] if self.zero_points else []))

    def parts(self, box: Box) -> Sequence[tuple[TensorInfo, Box]]:
        wide = self._widened(box)
        grid = self.scales.around(wide)
        zero_points = [(self.zero_points, _rows_packed(grid))] if self.zero_points else []
        return [
            (self.codes, _words(wide)),
            self.scales.stored(grid),
            *zero_points,
            (self.extents, whole(self.extents.shape)),
        ]

    def read(self, source: Source, box: Box) -> Array:
        self._check_extents(source)
        wide = self._widened(box)
        part = self.scales.around(wide)
        scales = self.scales.read(source, part)
        shifts = None if self.zero_points is None else self._zero_points(source, part)
        packed = source.read(self.codes.name, _words(wide)).view(np.uint8)
        rows, columns = box_shape(wide)
        result = np.empty((rows, columns), ml_dtypes.bfloat16)
        step = max(1, LOOKED_UP // max(columns, 1))
        for row in range(0, rows, step):
            some = slice(row, row + step)
            values = _PAIRS.take(packed[some]).view(np.float32)[:, :columns]
            grouped = values.reshape(len(values), scales.shape[1], -1)
            if shifts is not None:
                grouped -= shifts[some, :, None]
            with np.errstate(over="ignore"):  # a value that is too large becomes infinite, as in the reference
                grouped *= scales[some, :, None]
                if self.scales.info.dtype == "float16":
                    grouped = grouped.astype(np.float16)
            result[some] = grouped.reshape(len(values), columns)
        return result[:, box[1][0] - wide[1][0] : box[1][1] - wide[1][0]]

    def _widened(self, box: Box) -> Box:
        """Returns `box` with its columns widened to whole groups and whole words."""
        extent, group = self.scales.shape[1], self.scales.block[1]
        unit = PER_WORD if group == extent else math.lcm(group, PER_WORD)
        start, stop = box[1]
        return box[0], (start // unit * unit, min(-(-stop // unit) * unit, extent))

    def _zero_points(self, source: Source, part: Box) -> Array:
        """Reads the zero points of `part` of the grid in float32, minus the offset that the values have too."""
        assert self.zero_points is not None
        first, last = part[0]
        words = source.read(self.zero_points.name, _rows_packed(part))
        halves = (words[:, None, :] >> (4 * np.arange(PER_WORD, dtype=np.int32))[:, None]) & 15
        start = first % PER_WORD
        rows = halves.reshape(-1, words.shape[1])[start : start + last - first]
        return rows.astype(np.float32) - OFFSET

    def _check_extents(self, source: Source) -> None:
        """Raises BadInput if weight_shape is not the shape that follows from the headers."""
        found, expected = source.read(self.extents.name).tolist(), list(self.scales.shape)
        if found != expected:
            raise BadInput(
                f"{self.extents.file}: {self.extents.name} is {found}, but {self.codes.name} {list(self.codes.shape)} "
                f"and {self.scales.info.name} {list(self.scales.info.shape)} give {expected}"
            )


def int4_weight(tensors: Mapping[str, TensorInfo], codes: TensorInfo, group: int | None, symmetric: bool) -> Int4Weight:
    """Returns the weight of int4 codes.

    Args:
        tensors: The stored tensors.
        codes: The weight's `weight_packed`.
        group: Values of a row that share a scale; None: the whole row.
        symmetric: Whether there are no zero points.

    Raises:
        BadInput: A stored part of the weight is missing, or has another shape or dtype.
    """
    require_matrix(codes)
    plain = codes.name.removesuffix(CODES_SUFFIX)
    scale = companion(tensors, codes, f"{plain}_scale")
    extents = companion(tensors, codes, f"{plain}_shape")
    rows, words = codes.shape
    # the headers do not say how many values the last word has, but groups are whole
    columns = words * PER_WORD if group is None or len(scale.shape) != 2 else scale.shape[1] * group
    if codes.dtype != "int32" or words != -(-columns // PER_WORD):
        raise BadInput(
            f"{codes.file}: {codes.name} is {codes.dtype} {list(codes.shape)}, expected int32 "
            f"{[rows, -(-columns // PER_WORD)]}: {scale.name} {list(scale.shape)} with groups of {group} gives "
            f"{[rows, columns]}, eight values in a word"
        )
    scales = Scales(scale, (rows, columns), (1, group or max(columns, 1))).checked()
    if extents.shape != (2,) or extents.dtype not in ("int32", "int64"):
        raise BadInput(f"{extents.file}: {extents.name} is {extents.dtype} {list(extents.shape)}, expected int64 [2]")
    zero_points = None if symmetric else companion(tensors, codes, f"{plain}_zero_point")
    expected = (-(-rows // PER_WORD), scales.grid[1])
    if zero_points is not None and (zero_points.shape != expected or zero_points.dtype != "int32"):
        raise BadInput(
            f"{zero_points.file}: {zero_points.name} is {zero_points.dtype} {list(zero_points.shape)}, expected int32 "
            f"{list(expected)}: eight rows in a word"
        )
    return Int4Weight(codes, scales, extents, zero_points)


def _words(box: Box) -> Box:
    """Returns the box of the words of `box`, whose columns start at a whole word."""
    return box[0], (box[1][0] // PER_WORD, -(-box[1][1] // PER_WORD))


def _rows_packed(part: Box) -> Box:
    """Returns the box of the words with the zero points of `part` of the grid."""
    return (part[0][0] // PER_WORD, -(-part[0][1] // PER_WORD)), part[1]
