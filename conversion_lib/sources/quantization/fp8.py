"""Weights in fp8: a byte x is an e4m3 number, and its value is bf16(float32(x) · float32(scale)).

There is one scale for each block (DeepSeek-V3: `W_scale_inv`, with smaller blocks at the edges), for each row
(channel), or for the whole matrix. The value is rounded to bfloat16 before any other cast, so a separate dequantize
step and a fused one give the same bits. Scales that are powers of two (ue8m0) are stored as float32 (DeepSeek-V3.1) or
as bytes that are exponents. Only compressed-tensors multiplies in the dtype of the scales,
so that products with float16 scales are rounded to float16 first.

A byte has 256 values, so a block has at most 256 results. Each block's table is computed once, and its bytes are looked
up in it. This gives the same bits as multiplying, several times faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from conversion_lib.core.boxes import Box, box_shape
from conversion_lib.core.tensors import Array, Source, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.quantization.activations import is_of_activations
from conversion_lib.sources.quantization.weights import SCALE_DTYPES, Scales, companion, require_matrix

DTYPE = "float8_e4m3fn"

SCALE_SUFFIXES = ("_scale_inv", "_scale")
"""DeepSeek's suffix, for the inverse of the quantizer's scale, and the common one. Both kinds are multiplied."""

FP8_SCALE_DTYPES = (*SCALE_DTYPES, "float64", "uint8")
"""Of bytes, each is an exponent: ue8m0 under the dtype that every reader has."""

LOOKED_UP = 1 << 17
"""Elements that are looked up in one call. Their indices, 8 bytes each, fit into the L2 cache."""

TABLES = 512
"""Tables that one call uses. At half a KiB each, they also fit into the L2 cache."""

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


class Fp8Weight(NamedTuple):
    """A matrix in fp8: its e4m3 bytes and its scales.

    Attributes:
        codes: The stored matrix.
        scales: Its scales.
        in_scale_dtype: Whether the product is first rounded to the dtype of the scales.
    """

    codes: TensorInfo
    scales: Scales
    in_scale_dtype: bool = False

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.codes.name, self.codes.shape, "bfloat16", self.codes.file)

    @property
    def others(self) -> tuple[TensorInfo, ...]:
        return (self.scales.info,)

    def parts(self, box: Box) -> Sequence[tuple[TensorInfo, Box]]:
        return (self.codes, box), self.scales.stored(self.scales.around(box))

    def read(self, source: Source, box: Box) -> Array:
        (row0, row1), (column0, column1) = box
        rows, columns = self.scales.block
        part = self.scales.around(box)
        first, last = part[0]
        scales = self.scales.read(source, part)
        codes = source.read(self.codes.name, box).view(np.uint8)
        result = np.empty(box_shape(box), np.uint16)
        across = scales.shape[1]
        # the start of each column's table among the tables of its row of blocks
        column_starts = (np.arange(column0, column1) // columns - part[1][0]) * 256
        step = max(1, min(LOOKED_UP // max(rows * codes.shape[1], 1), TABLES // max(across, 1)))
        for above in range(first, last, step):
            below = min(above + step, last)
            top, bottom = max(above * rows, row0), min(below * rows, row1)
            row_starts = (np.arange(top, bottom) // rows - above)[:, None] * (across * 256)
            tables = self._tables(scales[above - first : below - first])
            kept = slice(top - row0, bottom - row0)
            _look_up(tables, row_starts if below - above > 1 else None, column_starts, codes[kept], result[kept])
        return result.view(ml_dtypes.bfloat16)

    def _tables(self, scales: Array) -> Array:
        """Returns the bfloat16 bits of each byte's value in each block: 256 for each scale, block after block."""
        with np.errstate(over="ignore"):  # a value that is too large becomes infinite, as in the formula
            values = _VALUES * scales[:, :, None]
            # of the other dtypes, bfloat16 rounds to the same bits at once, and the rest have more than it
            if self.in_scale_dtype and self.scales.info.dtype == "float16":
                values = values.astype(np.float16)
            bits: Array = values.astype(ml_dtypes.bfloat16).view(np.uint16)
            return bits.reshape(-1)


def _look_up(tables: Array, row_starts: Array | None, column_starts: Array, codes: Array, out: Array) -> None:
    """out[r, c] = tables[row_starts[r] + column_starts[c] + codes[r, c]], some rows at a time; None: all of them 0.

    Calls are few and long, because each one releases and takes the interpreter's lock. With two threads and a call for
    each block, a third of the time went into that.
    """
    step = max(1, LOOKED_UP // max(codes.shape[1], 1))
    indices = np.empty((min(step, len(codes)), codes.shape[1]), np.intp)
    for row in range(0, len(codes), step):
        some = codes[row : row + step]
        index = np.add(some, column_starts, out=indices[: len(some)])
        if row_starts is not None:
            index += row_starts[row : row + step]
        # every index is in range; with "clip", numpy writes into `out` without a temporary copy
        tables.take(index, out=out[row : row + step], mode="clip")


def weights(tensors: Mapping[str, TensorInfo], config: ModelConfig, quantization: dict[str, Any]) -> list[Fp8Weight]:
    """Finds the weights of a checkpoint whose `quant_method` is fp8.

    Args:
        tensors: The stored tensors.
        config: The checkpoint's config.json, for messages.
        quantization: Its `quantization_config`. Without `weight_block_size`, the shape of the scales tells whether
            there is one for each row or one for the whole matrix.

    Raises:
        BadInput: A setting is not supported, a weight has no scales, scales have no weight, or scales have the wrong
            shape or dtype.
    """
    block = _block(config, quantization)
    found = []
    for codes in _codes(tensors):
        scale = tensors.get(codes.name + SCALE_SUFFIXES[0]) or tensors.get(codes.name + SCALE_SUFFIXES[1])
        if scale is None:
            raise BadInput(f"{codes.file}: fp8 tensor {codes.name} has no {codes.name}{SCALE_SUFFIXES[0]}")
        require_matrix(codes)
        scales = Scales(scale, codes.shape, block or _block_of(codes, scale))
        found.append(Fp8Weight(codes, scales.checked(FP8_SCALE_DTYPES)))
    _refuse_orphans(tensors)
    return found


def row_weights(
    tensors: Mapping[str, TensorInfo], config: ModelConfig, quantization: dict[str, Any]
) -> list[Fp8Weight]:
    """Returns the weights of a checkpoint whose `quant_method` is fbgemm_fp8, which has one scale for each row.

    FBGEMM multiplies in float32. A weight is quantized if its dtype is fp8; `modules_to_not_convert` is not used.

    Raises:
        BadInput: As for `weights`.
    """
    found = []
    for codes in _codes(tensors):
        scale = companion(tensors, codes, codes.name + SCALE_SUFFIXES[1])
        found.append(Fp8Weight(codes, Scales(scale, codes.shape, (1, whole_block(codes)[1])).checked(FP8_SCALE_DTYPES)))
    _refuse_orphans(tensors)
    return found


def in_scale_dtype(codes: TensorInfo, scale: TensorInfo, block: tuple[int, int]) -> Fp8Weight:
    """Returns a weight of compressed-tensors, whose product has the dtype of the scales.

    Args:
        codes: The stored matrix.
        scale: The stored scales.
        block: (rows, columns) that share a scale.

    Raises:
        BadInput: `codes` is not a matrix, or `scale` does not have one scale for each block.
    """
    require_matrix(codes)
    return Fp8Weight(codes, Scales(scale, codes.shape, block).checked(), in_scale_dtype=True)


def whole_block(codes: TensorInfo) -> tuple[int, int]:
    """Returns the block of a matrix with a single scale, at least (1, 1).

    Raises:
        BadInput: `codes` is not a matrix.
    """
    require_matrix(codes)
    return max(codes.shape[0], 1), max(codes.shape[1], 1)


def _refuse_orphans(tensors: Mapping[str, TensorInfo]) -> None:
    """Raises BadInput for a scale whose weight is missing or not fp8."""
    for name, info in tensors.items():
        if not name.endswith((SCALE_SUFFIXES[0], f".weight{SCALE_SUFFIXES[1]}")) or is_of_activations(name):
            continue
        weight = tensors.get(name.removesuffix(SCALE_SUFFIXES[0]).removesuffix(SCALE_SUFFIXES[1]))
        if weight is None or weight.dtype != DTYPE:
            found = "is missing" if weight is None else f"is {weight.dtype}"
            raise BadInput(f"{info.file}: {name} scales a tensor that {found}; expected {DTYPE}")


def _codes(tensors: Mapping[str, TensorInfo]) -> Iterator[TensorInfo]:
    for name, info in tensors.items():
        if info.dtype == DTYPE:
            yield info
        elif info.dtype.startswith("float8") and not name.endswith(SCALE_SUFFIXES):
            raise BadInput(f"{info.file}: tensor {name} is {info.dtype}; the only supported fp8 dtype is {DTYPE}")


def _block(config: ModelConfig, quantization: dict[str, Any]) -> tuple[int, int] | None:
    """Returns `weight_block_size`; None if there is none."""
    fmt, scale_fmt = quantization.get("fmt", "e4m3"), quantization.get("scale_fmt") or "float"
    if fmt not in ("e4m3", "float8_e4m3fn") or scale_fmt not in ("float", "ue8m0"):
        raise BadInput(f"{config.path}: fp8 of fmt {fmt!r} with scales {scale_fmt!r} is not supported; e4m3 is")
    size = quantization.get("weight_block_size")
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise BadInput(f"{config.path}: weight_block_size should be two positive integers, not {size!r}")
    return size[0], size[1]


def _block_of(codes: TensorInfo, scale: TensorInfo) -> tuple[int, int]:
    """Returns the block without `weight_block_size`: a row if there is a scale for each, else the whole matrix."""
    rows, columns = whole_block(codes)
    return (1, columns) if scale.shape in ((rows,), (rows, 1)) and rows > 1 else (rows, columns)
