"""A source whose quantized weights are shown in bfloat16, and what its schemes share: scales and their checks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from conversion_lib.core.boxes import Box, Shape, box_shape, whole
from conversion_lib.core.tensors import Array, Source, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput

SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu")

ACTIVATION_SUFFIXES = tuple(
    f".{what}_{kind}"
    for what in ("input", "output", "activation", "q", "k", "v")
    for kind in ("scale", "zero_point", "global_scale")
)
"""Names of what a runtime quantizes activations and its cache with; weights do not depend on them."""


class Weight(Protocol):
    """One quantized weight.

    info: as it is shown: its plain name, its plain shape, bfloat16, and the file of its codes.
    codes: the stored tensor that holds them. others: those that belong to it: scales, zero points, shapes.
    """

    @property
    def info(self) -> TensorInfo: ...

    @property
    def codes(self) -> TensorInfo: ...

    @property
    def others(self) -> Sequence[TensorInfo]: ...

    def read(self, source: Source, box: Box) -> Array:
        """The elements of `box` in bfloat16. Raises BadInput for data that no quantizer writes."""
        ...

    def parts(self, box: Box) -> Sequence[tuple[TensorInfo, Box]]:
        """What reading `box` takes of `codes` and of each of `others`."""
        ...


class DequantizedSource:
    """`source` with `weights` in bfloat16 in place of their codes, without what belongs to them.

    left_out: a line for each kind of tensor that is not shown though no weight needs it.
    """

    def __init__(self, source: Source, weights: Iterable[Weight]) -> None:
        self._source = source
        by_codes, self._weights = {}, {}
        for weight in weights:
            info = by_codes[weight.codes.name] = weight.info
            self._weights[info.name] = weight
        hidden = {other.name for weight in self._weights.values() for other in weight.others}
        activations = [name for name in source.tensors if name.endswith(ACTIVATION_SUFFIXES) and name not in hidden]
        hidden.update(activations)
        shown = [by_codes.get(name, info) for name, info in source.tensors.items() if name not in hidden]
        self.tensors: Mapping[str, TensorInfo] = {info.name: info for info in shown}
        self.left_out: tuple[str, ...] = ()
        if activations:
            reason = "they quantize what goes through a layer, not its weights"
            self.left_out = (f"activation scales: {len(activations)} tensors left out; {reason}",)

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
    """One scale for each block of `block` elements of a matrix of `shape`, edges clipped.

    Stored as `info`: a grid of scales, of which axes of size one at the end may be missing.
    """

    info: TensorInfo
    shape: Shape
    block: tuple[int, int]

    @property
    def grid(self) -> Shape:
        return _grids(self.shape, self.block)[0]

    def checked(self) -> Scales:
        """Itself. Raises BadInput where the stored tensor is of another shape or dtype."""
        alike = _grids(self.shape, self.block)
        if self.info.shape not in alike or self.info.dtype not in SCALE_DTYPES:
            rows, columns = self.block
            raise BadInput(
                f"{self.info.file}: {self.info.name} is {self.info.dtype} {list(self.info.shape)}, expected float32 "
                f"{list(self.grid)}: one scale for each {rows} × {columns} block of {list(self.shape)}"
            )
        return self

    def around(self, box: Box) -> Box:
        """The part of the grid whose blocks meet `box` of the matrix."""
        (top, bottom), (left, right) = box
        rows, columns = self.block
        return (top // rows, -(-bottom // rows)), (left // columns, -(-right // columns))

    def stored(self, part: Box) -> tuple[TensorInfo, Box]:
        """What reading `part` of the grid takes."""
        return self.info, part[: len(self.info.shape)]

    def read(self, source: Source, part: Box) -> Array:
        """The scales of `part` of the grid in float32.

        Raises BadInput for one that is NaN, infinite or negative; zero is fine.
        """
        stored = source.read(self.info.name, part[: len(self.info.shape)])
        scales = stored.astype(np.float32).reshape(box_shape(part))
        wrong = ~(np.isfinite(scales) & (scales >= 0))
        if wrong.any():
            i, j = (int(n) for n in np.argwhere(wrong)[0])
            place = [start + at for (start, _), at in zip(part, (i, j), strict=True)][: len(self.info.shape)]
            raise BadInput(
                f"{self.info.file}: {self.info.name}{place or ''} is {scales[i, j]}; "
                "a scale is finite and not negative. The file is damaged, or was quantized wrongly"
            )
        return scales


@cache
def _grids(shape: Shape, block: tuple[int, int]) -> tuple[Shape, ...]:
    """The shapes that the scales of a matrix may be stored in, the whole grid first."""
    grid = tuple(-(-extent // step) for extent, step in zip(shape, block, strict=True))
    return (grid, *([grid[:1]] if grid[1] == 1 else []), *([()] if grid == (1, 1) else []))


def companion(tensors: Mapping[str, TensorInfo], codes: TensorInfo, name: str) -> TensorInfo:
    """The tensor `name` that belongs to `codes`. Raises BadInput where there is none."""
    info = tensors.get(name)
    if info is None:
        raise BadInput(f"{codes.file}: {codes.dtype} tensor {codes.name} has no {name}, which its values need")
    return info


def require_matrix(codes: TensorInfo) -> None:
    """Raises BadInput where a weight has not two dimensions."""
    if len(codes.shape) != 2:
        raise BadInput(
            f"{codes.file}: {codes.dtype} tensor {codes.name} has shape {list(codes.shape)}, expected two dimensions"
        )
