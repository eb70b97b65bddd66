"""Weights in MXFP4, as gpt-oss is published (https://www.opencompute.org, "OCP Microscaling Formats", 5.2 and 5.4).

`W_blocks` has two e2m1 numbers in each byte, the first in the low half. `W_scales` has an exponent, biased by 127, for
each 32 numbers. The codes are stored as (experts, out, in / 32, 16). The source shows `W` as (experts, in, out), as in
the bfloat16 checkpoint. Each value is exact in bfloat16 unless it is out of range.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from conversion_lib.core.boxes import Box, box_shape
from conversion_lib.core.tensors import Array, Source, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.quantization.weights import companion

CODES_SUFFIX, SCALE_SUFFIX = "_blocks", "_scales"
GROUP = 32
"""Values that share a scale; they take 16 bytes."""

BIAS, NOT_A_NUMBER = 127, 255

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of the low three bits of a half byte; the highest bit is the sign."""

LOOKED_UP = 1 << 16
"""Bytes that are looked up in one call. Their indices, 8 bytes each, fit into the L2 cache."""


@dataclass(frozen=True)
class Mxfp4Weight:
    """The experts' matrices in MXFP4.

    Attributes:
        codes: uint8, (experts, out, in / 32, 16).
        scale: uint8 exponents, (experts, out, in / 32).
    """

    codes: TensorInfo
    scale: TensorInfo

    @property
    def info(self) -> TensorInfo:
        experts, rows, groups, _ = self.codes.shape
        name = self.codes.name.removesuffix(CODES_SUFFIX)
        return TensorInfo(name, (experts, groups * GROUP, rows), "bfloat16", self.codes.file, order=(0, 2, 1))

    @property
    def others(self) -> tuple[TensorInfo, ...]:
        return (self.scale,)

    def parts(self, box: Box) -> Sequence[tuple[TensorInfo, Box]]:
        part = _stored(box)
        return (self.codes, (*part, (0, GROUP // 2))), (self.scale, part)

    def read(self, source: Source, box: Box) -> Array:
        part = _stored(box)
        codes = source.read(self.codes.name, (*part, (0, GROUP // 2)))
        exponents = source.read(self.scale.name, part)
        self._check(exponents, part)
        pairs = np.empty(codes.shape, np.uint32)
        _look_up(exponents.reshape(-1), codes.reshape(-1, GROUP // 2), pairs.reshape(-1, GROUP // 2))
        values = pairs.view(np.uint16).reshape(*box_shape(part[:2]), -1)
        inside = slice(box[1][0] - part[2][0] * GROUP, box[1][1] - part[2][0] * GROUP)
        return values[:, :, inside].swapaxes(1, 2).view(ml_dtypes.bfloat16)

    def _check(self, exponents: Array, part: Box) -> None:
        """Raises BadInput for an exponent that means NaN."""
        wrong = exponents == NOT_A_NUMBER
        if wrong.any():
            position = [start + int(at) for (start, _), at in zip(part, np.argwhere(wrong)[0], strict=True)]
            raise BadInput(
                f"{self.scale.file}: {self.scale.name}{position} is {NOT_A_NUMBER}, which means NaN. "
                "The file is damaged, or was quantized wrongly"
            )


def weights(tensors: Mapping[str, TensorInfo], config: ModelConfig, quantization: dict[str, Any]) -> list[Mxfp4Weight]:
    """Finds the weights of a checkpoint whose `quant_method` is mxfp4.

    Args:
        tensors: The stored tensors.
        config: Not used: the scheme has no settings.
        quantization: Not used.

    Raises:
        BadInput: Codes have no scales, scales have no codes, or either has the wrong shape or dtype.
    """
    found = []
    for name, info in tensors.items():
        if name.endswith(CODES_SUFFIX):
            scale = companion(tensors, info, name.removesuffix(CODES_SUFFIX) + SCALE_SUFFIX)
            _check_shapes(info, scale)
            found.append(Mxfp4Weight(info, scale))
        elif name.endswith(SCALE_SUFFIX):
            companion(tensors, info, name.removesuffix(SCALE_SUFFIX) + CODES_SUFFIX)
    return found


def _check_shapes(codes: TensorInfo, scale: TensorInfo) -> None:
    if len(codes.shape) != 4 or codes.shape[3] != GROUP // 2 or codes.dtype != "uint8":
        raise BadInput(
            f"{codes.file}: {codes.name} is {codes.dtype} {list(codes.shape)}, expected uint8 "
            f"[experts, out, in / {GROUP}, {GROUP // 2}]: two values a byte"
        )
    if scale.shape != codes.shape[:3] or scale.dtype != "uint8":
        raise BadInput(
            f"{scale.file}: {scale.name} is {scale.dtype} {list(scale.shape)}, expected uint8 {list(codes.shape[:3])}: "
            f"one exponent for each {GROUP} values"
        )


def _stored(box: Box) -> Box:
    """Returns the box of (experts, out, in / 32) with all groups of `box`, which is a box of (experts, in, out)."""
    experts, inputs, outputs = box
    return experts, outputs, (inputs[0] // GROUP, -(-inputs[1] // GROUP))


def _look_up(exponents: Array, codes: Array, pairs: Array) -> None:
    """Sets pairs[g, b] to the two values of codes[g, b] under exponents[g], some groups at a time."""
    table, step = _table(), LOOKED_UP // codes.shape[1]
    for group in range(0, len(codes), step):
        index = codes[group : group + step].astype(np.uint16)
        index |= exponents[group : group + step, None].astype(np.uint16) << 8
        # every index is in range; with "clip", numpy writes into `out` without a temporary copy
        table.take(index.astype(np.intp), out=pairs[group : group + step], mode="clip")


@cache
def _table() -> Array:
    """Returns the bfloat16 bits of the two values of each exponent and byte, the first in the lower half: 256 KiB."""
    half = np.array([*E2M1, *(-value for value in E2M1)], np.float32)
    byte = np.arange(256)
    values = np.stack([half[byte & 15], half[byte >> 4]], axis=-1)
    with np.errstate(over="ignore", invalid="ignore"):  # too large values become infinite; 255 is refused earlier
        factors = np.ldexp(np.float32(1), np.arange(256) - BIAS)
        products = values[None] * factors[:, None, None]
    return products.astype(ml_dtypes.bfloat16).view(np.uint32).reshape(-1)
