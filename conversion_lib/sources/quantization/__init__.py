"""Dequantizes quantized checkpoints during the read. Each scheme has a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conversion_lib.core.dtypes import FLOATS
from conversion_lib.core.tensors import Source, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.quantization import compressed_tensors, fp8, mxfp4, packed
from conversion_lib.sources.quantization.weights import DequantizedSource, Weight

SCHEMES: dict[str, Callable[[Mapping[str, TensorInfo], ModelConfig, dict[str, Any]], Sequence[Weight]]] = {
    "fp8": fp8.weights,
    "fbgemm_fp8": fp8.row_weights,
    "compressed-tensors": compressed_tensors.weights,
    "mxfp4": mxfp4.weights,
}
"""Functions that find a checkpoint's quantized weights, by `quant_method`."""


def dequantized(source: Source, config: ModelConfig) -> Source:
    """Shows a source with its quantized weights in bfloat16.

    Returns:
        `source` itself if it is not quantized.

    Raises:
        BadInput: The quantization is not supported, a weight lacks its scales, scales belong to no weight, or a shape
            or dtype does not fit.
    """
    quantization = config.quantization
    if quantization is None:
        _refuse_quantized(source, config)
        return source
    method = quantization.get("quant_method")
    if method not in SCHEMES:
        raise BadInput(
            f"{config.path}: quantization {method!r} is not supported; supported are fp8 and fbgemm_fp8 (e4m3), "
            "compressed-tensors (fp8 and int4) and mxfp4"
        )
    result = DequantizedSource(source, SCHEMES[method](source.tensors, config, quantization))
    _refuse_quantized(result, config)
    return result


def left_out(source: Source) -> tuple[str, ...]:
    """Returns a line for each kind of tensor that dequantizing left out."""
    return source.left_out if isinstance(source, DequantizedSource) else ()


def _refuse_quantized(source: Source, config: ModelConfig) -> None:
    """Raises BadInput if `source` still has quantized weights."""
    for info in source.tensors.values():
        if info.dtype in FLOATS:
            continue
        integers = info.name.endswith((packed.CODES_SUFFIX, mxfp4.CODES_SUFFIX)) and info.dtype.startswith(("u", "i"))
        if integers or info.dtype.startswith("float8"):
            raise BadInput(
                f"{info.file}: tensor {info.name} is {info.dtype}, "
                f"but {config.path} has no quantization_config that describes it"
            )
