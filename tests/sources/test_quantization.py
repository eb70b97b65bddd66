"""fp8 by blocks, against the formula: bf16(float32(x) · float32(scale)), edges clipped."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.boxes import slices
from conversion_lib.config import ModelConfig
from conversion_lib.errors import BadInput
from conversion_lib.sources.base import TensorInfo
from conversion_lib.sources.quantization import dequantized

FP8 = ml_dtypes.float8_e4m3fn


class MemorySource:
    """A source over arrays in memory."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.tensors = {name: TensorInfo(name, a.shape, a.dtype.name, "shard") for name, a in arrays.items()}

    def read(self, name, box=None):
        array = self.arrays[name]
        return np.ascontiguousarray(array if box is None else array[slices(box)])

    def stored_bytes(self, name, box):
        return self.read(name, box).nbytes


def config(**quantization) -> ModelConfig:
    settings = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]} | quantization
    return ModelConfig({"quantization_config": settings}, Path("config.json"))


def quantized(rows: int, columns: int, block: tuple[int, int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (rows, columns), dtype=np.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # NaN, which no converter writes
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    return {"w": codes.view(FP8), "w_scale_inv": rng.uniform(0, 3e-3, grid).astype(np.float32)}


def by_formula(arrays: dict[str, np.ndarray], block: tuple[int, int]) -> np.ndarray:
    rows, columns = arrays["w"].shape
    scale = arrays["w_scale_inv"][np.arange(rows)[:, None] // block[0], np.arange(columns)[None, :] // block[1]]
    return (arrays["w"].astype(np.float32) * scale).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(576, 256), (192, 128), (128, 128), (1, 1), (129, 257), (130, 5)])
def test_whole_tensors_with_ragged_edges(shape):
    arrays = quantized(*shape, (128, 128))
    source = dequantized(MemorySource(arrays), config())
    assert source.tensors == {"w": TensorInfo("w", shape, "bfloat16", "shard")}
    np.testing.assert_array_equal(source.read("w").view(np.uint16), by_formula(arrays, (128, 128)).view(np.uint16))


@settings(deadline=None)
@given(st.data())
def test_any_slice_equals_that_slice_of_the_whole(data):
    block = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    shape = data.draw(st.tuples(st.integers(1, 17), st.integers(1, 17)))
    box = tuple(sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in shape)
    box = tuple((a, b) if a < b else (0, n) for (a, b), n in zip(box, shape, strict=True))
    arrays = quantized(*shape, block)
    source = dequantized(MemorySource(arrays), config(weight_block_size=list(block)))
    expected = by_formula(arrays, block)[slices(box)]
    np.testing.assert_array_equal(source.read("w", box).view(np.uint16), expected.view(np.uint16))


def test_a_zero_scale_gives_zeros():
    arrays = quantized(4, 4, (128, 128))
    arrays["w_scale_inv"][:] = 0
    assert not dequantized(MemorySource(arrays), config()).read("w").astype(np.float32).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1e-3])
def test_a_scale_that_is_none_is_found_when_it_is_read(bad):
    arrays = quantized(256, 256, (128, 128))
    arrays["w_scale_inv"][1, 0] = bad
    source = dequantized(MemorySource(arrays), config())
    source.read("w", ((0, 128), (0, 256)))
    with pytest.raises(BadInput, match=r"w_scale_inv\[1, 0\]"):
        source.read("w", ((128, 256), (0, 256)))


def without_scale(arrays):
    del arrays["w_scale_inv"]


def wrong_grid(arrays):
    arrays["w_scale_inv"] = arrays["w_scale_inv"][:1]


def not_float(arrays):
    arrays["w_scale_inv"] = arrays["w_scale_inv"].astype(np.int32)


def plain_weight(arrays):
    arrays["w"] = arrays["w"].astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("damage", [without_scale, wrong_grid, not_float, plain_weight])
def test_weights_and_scales_must_fit(damage):
    arrays = quantized(256, 256, (128, 128))
    damage(arrays)
    with pytest.raises(BadInput, match="w_scale_inv"):
        dequantized(MemorySource(arrays), config())


@pytest.mark.parametrize(
    "quantization",
    [{"quant_method": "awq"}, {"fmt": "e5m2"}, {"weight_block_size": None}, {"weight_block_size": [128]}],
)
def test_an_unknown_quantization_is_refused(quantization):
    with pytest.raises(BadInput, match=r"config\.json"):
        dequantized(MemorySource(quantized(4, 4, (128, 128))), config(**quantization))


def test_fp8_without_a_quantization_config_is_refused():
    with pytest.raises(BadInput, match="quantization_config"):
        dequantized(MemorySource(quantized(4, 4, (128, 128))), ModelConfig({}, Path("config.json")))


def test_a_plain_source_is_left_as_it_is():
    source = MemorySource({"w": np.zeros((2, 2), ml_dtypes.bfloat16)})
    assert dequantized(source, ModelConfig({}, Path("config.json"))) is source
