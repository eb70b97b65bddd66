"""Shows quantized weights in bfloat16, and checks and reads the scales that all schemes have."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import ml_dtypes
import numpy as np

from conversion_lib.core.boxes import Box, Shape, box_shape, whole
from conversion_lib.core.tensors import Array, Source, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.sources.quantization.activations import REASON, is_of_activations

SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")


class Weight(Protocol):
    """One quantized weight."""

    @property
    def info(self) -> TensorInfo:
        """The dequantized tensor: the plain name and shape, bfloat16, and the file of the codes."""
        ...

    @property
    def codes(self) -> TensorInfo:
        """The stored tensor with the quantized values."""
        ...

    @property
    def others(self) -> Sequence[TensorInfo]:
        """The other stored tensors of the weight: scales, zero points, shapes."""
        ...

    def read(self, source: Source, box: Box) -> Array:
        """Reads `box` of the dequantized tensor.

        Args:
            source: The source that has the stored tensors.
            box: A box of `info`'s shape.

        Returns:
            bfloat16 values.

        Raises:
            BadInput: The stored data are not valid, such as a scale that is NaN.
        """
        ...

    def parts(self, box: Box) -> Sequence[tuple[TensorInfo, Box]]:
        """Returns the boxes that reading `box` needs, one of `codes` and one of each of `others`."""
        ...


class DequantizedSource:
    """Shows `source` with `weights` in bfloat16 in place of their codes, and without their scales.

    Attributes:
        tensors: The shown tensors.
        left_out: A line for each kind of tensor that is hidden although no weight needs it.
    """

    def __init__(self, source: Source, weights: Iterable[Weight]) -> None:
        self._source = source
        by_codes, self._weights = {}, {}
        for weight in weights:
            info = by_codes[weight.codes.name] = weight.info
            self._weights[info.name] = weight
        hidden = {other.name for weight in self._weights.values() for other in weight.others}
        activations = [name for name in source.tensors if is_of_activations(name) and name not in hidden]
        hidden.update(activations)
        shown = [by_codes.get(name, info) for name, info in source.tensors.items() if name not in hidden]
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in shown}
        self.left_out: tuple[str, ...] = ()
        if activations:
            self.left_out = (f"activation scales: {len(activations)} tensors left out; {REASON}",)

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        weight = self._weights.get(name)
        if weight is None:
            return self._source.requires(name, box)
        if box is None:
            return [one for part in (weight.codes, *weight.others) for one in self._source.requires(part.name)]
        return [one for part, needed in weight.parts(box) for one in self._source.requires(part.name, needed)]

    def read(self, name: str, box: Box | None = None) -> Array:
        weight = self._weights.get(name)
        if weight is None:
            return self._source.read(name, box)
        return weight.read(self._source, box or whole(weight.info.shape))


class Scales(NamedTuple):
    """The scales of a matrix: one for each block.

    Attributes:
        info: The stored grid of scales. Trailing axes of size 1 may be missing.
        shape: The matrix's (rows, columns).
        block: (rows, columns) of a block. Blocks at the edges may be smaller.
    """

    info: TensorInfo
    shape: Shape
    block: tuple[int, int]

    @property
    def grid(self) -> Shape:
        """The number of blocks along each axis."""
        return _grids(self.shape, self.block)[0]

    def checked(self, dtypes: Collection[str] = SCALE_DTYPES) -> Scales:
        """Returns itself after a check.

        Raises:
            BadInput: The stored tensor has another shape, or a dtype that is not one of `dtypes`.
        """
        alike = _grids(self.shape, self.block)
        if self.info.shape not in alike or self.info.dtype not in dtypes:
            rows, columns = self.block
            raise BadInput(
                f"{self.info.file}: {self.info.name} is {self.info.dtype} {list(self.info.shape)}, expected float32 "
                f"{list(self.grid)}: one scale for each {rows} × {columns} block of {list(self.shape)}"
            )
        return self

    def around(self, box: Box) -> Box:
        """Returns the box of the grid whose blocks overlap `box` of the matrix."""
        (top, bottom), (left, right) = box
        rows, columns = self.block
        return (top // rows, -(-bottom // rows)), (left // columns, -(-right // columns))

    def stored(self, part: Box) -> tuple[TensorInfo, Box]:
        """Returns the stored tensor and the box of it that reading `part` of the grid needs."""
        return self.info, part[: len(self.info.shape)]

    def read(self, source: Source, part: Box) -> Array:
        """Reads the scales of `part`, a box of the grid.

        Returns:
            float32 values, always with two axes.

        Raises:
            BadInput: A scale is NaN, infinite or negative. Zero is allowed.
        """
        stored = source.read(self.info.name, part[: len(self.info.shape)])
        if stored.dtype == np.uint8:
            stored = stored.view(ml_dtypes.float8_e8m0fnu)
        with np.errstate(over="ignore"):  # what is too large becomes infinite, and is refused
            scales = stored.astype(np.float32).reshape(box_shape(part))
        wrong = ~(np.isfinite(scales) & (scales >= 0))
        if wrong.any():
            i, j = (int(n) for n in np.argwhere(wrong)[0])
            position = [start + at for (start, _), at in zip(part, (i, j), strict=True)][: len(self.info.shape)]
            raise BadInput(
                f"{self.info.file}: {self.info.name}{position or ''} is {scales[i, j]}; "
                "a scale must be finite and not negative. The file is damaged, or was quantized wrongly"
            )
        return scales


@cache
def _grids(shape: Shape, block: tuple[int, int]) -> tuple[Shape, ...]:
    """Returns the shapes that the scales of a matrix may have in a file. The full grid is the first."""
    grid = tuple(-(-extent // step) for extent, step in zip(shape, block, strict=True))
    return (grid, *([grid[:1]] if grid[1] == 1 else []), *([()] if grid == (1, 1) else []))


def companion(tensors: Mapping[str, TensorInfo], codes: TensorInfo, name: str) -> TensorInfo:
    """Returns the tensor `name`, which belongs to `codes`.

    Raises:
        BadInput: There is no such tensor.
    """
    info = tensors.get(name)
    if info is None:
        raise BadInput(f"{codes.file}: {codes.dtype} tensor {codes.name} has no {name}, which is needed for its values")
    return info


def require_matrix(codes: TensorInfo) -> None:
    """Refuses a weight that is not a matrix.

    Raises:
        BadInput: It does not have two dimensions.
    """
    if len(codes.shape) != 2:
        raise BadInput(
            f"{codes.file}: {codes.dtype} tensor {codes.name} has shape {list(codes.shape)}, expected two dimensions"
        )
