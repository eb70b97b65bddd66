"""Quantized checkpoints, dequantized where they are read.

fp8 by blocks (DeepSeek-V3): a weight `W` of dtype float8_e4m3fn comes with `W_scale_inv` in float32, one scale for
each block of `weight_block_size` elements, edges clipped. The value is bf16(float32(x) · float32(scale)), the same
whatever dtype it is cast to afterwards, so that a separate dequantize step and a fused one give the same bits.

A byte has 256 values, so a block has at most 256 results: each block's table is computed once and its bytes are
looked up in it, which gives those very bits several times faster than multiplying.
"""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np

from conversion_lib.boxes import Box, box_shape, whole
from conversion_lib.config import ModelConfig
from conversion_lib.errors import BadInput
from conversion_lib.sources.base import Array, Source, TensorInfo

SCALE_SUFFIX = "_scale_inv"
FP8 = "float8_e4m3fn"

LOOKED_UP = 1 << 17
"""Elements that are looked up in one call: their indices, eight bytes each, fit the second cache."""

_VALUES = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)


def dequantized(source: Source, config: ModelConfig) -> Source:
    """`source` itself where it holds no fp8, else a source that shows each fp8 tensor in bfloat16, without scales.

    Raises BadInput for a quantization that is not known, a weight without its scales, scales without their weight,
    or scales of the wrong grid.
    """
    weights = [info for info in source.tensors.values() if info.dtype.startswith("float8")]
    if not weights and config.quantization is None:
        return source
    return BlockFp8Source(source, _block_size(config, weights))


def _block_size(config: ModelConfig, weights: list[TensorInfo]) -> tuple[int, int]:
    quantization = config.quantization
    if quantization is None:
        raise BadInput(
            f"{weights[0].file}: tensor {weights[0].name} is {weights[0].dtype}, "
            f"but {config.path} has no quantization_config that says how"
        )
    method, fmt = quantization.get("quant_method"), quantization.get("fmt", "e4m3")
    size = quantization.get("weight_block_size")
    if method != "fp8" or fmt != "e4m3":
        raise BadInput(f"{config.path}: quantization {method!r} ({fmt}) is not supported; fp8 e4m3 by blocks is")
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) and n > 0 for n in size)):
        raise BadInput(f"{config.path}: weight_block_size should be two positive integers, not {size!r}")
    return size[0], size[1]


class BlockFp8Source:
    """A source with fp8 weights, as bfloat16. Scales are checked when read: see `_checked_scales`."""

    def __init__(self, source: Source, block: tuple[int, int]) -> None:
        self._source, self._block = source, block
        self._quantized: set[str] = set()
        tensors: dict[str, TensorInfo] = {}
        for name, info in source.tensors.items():
            if info.dtype == FP8:
                self._check_grid(info)
                self._quantized.add(name)
                tensors[name] = TensorInfo(name, info.shape, "bfloat16", info.file)
            elif info.dtype.startswith("float8"):
                raise BadInput(f"{info.file}: tensor {name} is {info.dtype}; of the fp8 dtypes only {FP8} is supported")
            elif name.endswith(SCALE_SUFFIX):
                weight = source.tensors.get(name.removesuffix(SCALE_SUFFIX))
                if weight is None or weight.dtype != FP8:
                    found = "is not there" if weight is None else f"is {weight.dtype}"
                    raise BadInput(f"{info.file}: {name} scales a tensor that {found}; expected {FP8}")
            else:
                tensors[name] = info
        self.tensors: Mapping[str, TensorInfo] = tensors

    def _check_grid(self, info: TensorInfo) -> None:
        scale = self._source.tensors.get(info.name + SCALE_SUFFIX)
        if scale is None:
            raise BadInput(f"{info.file}: fp8 tensor {info.name} has no {info.name}{SCALE_SUFFIX}")
        if len(info.shape) != 2:
            raise BadInput(f"{info.file}: fp8 tensor {info.name} has shape {list(info.shape)}, expected two dimensions")
        rows, columns = self._block
        grid = (-(-info.shape[0] // rows), -(-info.shape[1] // columns))
        if scale.shape != grid or scale.dtype not in ("float32", "bfloat16"):
            raise BadInput(
                f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected float32 {list(grid)}: "
                f"one scale for each {rows} × {columns} block of {list(info.shape)}"
            )

    def stored_bytes(self, name: str, box: Box) -> int:
        return self._source.stored_bytes(name, box)

    def read(self, name: str, box: Box | None = None) -> Array:
        if name not in self._quantized:
            return self._source.read(name, box)
        box = box or whole(self.tensors[name].shape)
        (row0, row1), (column0, column1) = box
        rows, columns = self._block
        grid = ((row0 // rows, -(-row1 // rows)), (column0 // columns, -(-column1 // columns)))
        scales = self._checked_scales(name, grid)
        codes = self._source.read(name, box).view(np.uint8)
        result = np.empty(box_shape(box), np.uint16)
        # where each column's table begins among those of its row of blocks
        starts = (np.arange(column0, column1) // columns - grid[1][0]) * 256
        for i, row in enumerate(range(*grid[0])):
            top, bottom = max(row * rows, row0) - row0, min((row + 1) * rows, row1) - row0
            # what each byte stands for in each block of the row
            with np.errstate(over="ignore"):  # what is too large becomes infinite, as the formula has it
                tables = (_VALUES[None, :] * scales[i][:, None]).astype(ml_dtypes.bfloat16).view(np.uint16).reshape(-1)
            _look_up(tables, starts, codes[top:bottom], result[top:bottom])
        return result.view(ml_dtypes.bfloat16)

    def _checked_scales(self, name: str, grid: Box) -> Array:
        """The scales of `grid` in float32. Raises BadInput for one that is NaN, infinite or negative; zero is fine."""
        info = self._source.tensors[name + SCALE_SUFFIX]
        scales = self._source.read(info.name, grid).astype(np.float32)
        wrong = ~(np.isfinite(scales) & (scales >= 0))
        if wrong.any():
            i, j = (int(n) for n in np.argwhere(wrong)[0])
            raise BadInput(
                f"{info.file}: {info.name}[{grid[0][0] + i}, {grid[1][0] + j}] is {scales[i, j]}; "
                "a scale is finite and not negative. The file is damaged, or was quantized wrongly"
            )
        return scales


def _look_up(tables: Array, starts: Array, codes: Array, out: Array) -> None:
    """out[r, c] = tables[starts[c] + codes[r, c]], some rows at a time.

    Few long calls: each gives the interpreter's lock away and takes it back, and with two threads a call for each
    block spent a third of the time on that.
    """
    step = max(1, LOOKED_UP // max(codes.shape[1], 1))
    for row in range(0, len(codes), step):
        index = codes[row : row + step].astype(np.intp)
        index += starts
        # every index is in range; "clip" is how numpy writes into `out` without a copy of it
        tables.take(index, out=out[row : row + step], mode="clip")
