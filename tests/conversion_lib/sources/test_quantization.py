"""fp8 by blocks and by tensor, against the formula: bf16(float32(x) · float32(scale)), edges clipped."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.core.boxes import slices
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.quantization import dequantized, left_out
from tests.support.memory_source import MemorySource, boxes_in

FP8 = ml_dtypes.float8_e4m3fn


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
    box = data.draw(boxes_in(shape))
    arrays = quantized(*shape, block)
    source = dequantized(MemorySource(arrays), config(weight_block_size=list(block)))
    expected = by_formula(arrays, block)[slices(box)]
    np.testing.assert_array_equal(source.read("w", box).view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.float8_e8m0fnu, ml_dtypes.bfloat16])
def test_scales_that_are_powers_of_two_in_any_form(stored):
    """ue8m0: DeepSeek-V3.1 stores them as float32; as bytes they are the exponents."""
    arrays = quantized(200, 300, (128, 128))
    powers = np.exp2(np.random.default_rng(1).integers(-140, 120, (2, 3)).astype(np.float32))
    arrays["w_scale_inv"] = powers.astype(ml_dtypes.float8_e8m0fnu).astype(stored)
    expected = by_formula(arrays | {"w_scale_inv": arrays["w_scale_inv"].astype(np.float32)}, (128, 128))
    found = dequantized(MemorySource(arrays), config(scale_fmt="ue8m0")).read("w")
    np.testing.assert_array_equal(found.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("block", [[128, 128], None])
@pytest.mark.parametrize("stored", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_scales_of_any_dtype_multiply_in_float32(stored, block, suffix):
    """Only compressed-tensors multiplies in the dtype of the scale: in float16 products of small scales lose bits."""
    arrays = quantized(200, 300, (128, 128) if block else (1, 300))
    scales = (arrays["w_scale_inv"] * 0.01).astype(stored)
    assert (scales.astype(np.float32) < 2**-14).any()  # the smallest normal number of float16
    arrays["w_scale_inv"] = scales.astype(np.float32)
    expected = by_formula(arrays, (128, 128) if block else (1, 300))
    found = dequantized(MemorySource({"w": arrays["w"], f"w{suffix}": scales}), config(weight_block_size=block))
    np.testing.assert_array_equal(found.read("w").view(np.uint16), expected.view(np.uint16))


def test_exponents_without_a_dtype_of_their_own():
    """As transformers reads them: a byte is an exponent, biased by 127, and 255 is none."""
    arrays = quantized(200, 300, (128, 128))
    exponents = np.random.default_rng(1).integers(110, 130, (2, 3), np.uint8)
    expected = by_formula(arrays | {"w_scale_inv": np.exp2(exponents.astype(np.float32) - 127)}, (128, 128))
    source = dequantized(MemorySource(arrays | {"w_scale_inv": exponents}), config(scale_fmt="ue8m0"))
    np.testing.assert_array_equal(source.read("w").view(np.uint16), expected.view(np.uint16))
    exponents[1, 2] = 255
    with pytest.raises(BadInput, match=r"w_scale_inv\[1, 2\]"):
        source.read("w")


def test_a_scale_beyond_float32_is_refused():
    arrays = quantized(4, 4, (128, 128)) | {"w_scale_inv": np.array([[1e300]])}
    with pytest.raises(BadInput, match=r"w_scale_inv\[0, 0\] is inf"):
        dequantized(MemorySource(arrays), config()).read("w")


FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("shape", [(37, 50), (1, 50), (130, 1)])
@pytest.mark.parametrize("flat", [False, True])
def test_fbgemm_has_a_scale_for_each_row(shape, stored, flat):
    """Meta's own fp8 of Llama 3.1 405B; FBGEMM makes float32 of the scales before it multiplies."""
    codes = quantized(*shape, (128, 128))["w"]
    scales = np.random.default_rng(3).uniform(1e-5, 3e-3, (shape[0], 1)).astype(stored)
    expected = (codes.astype(np.float32) * scales.astype(np.float32)).astype(ml_dtypes.bfloat16)
    stored_scales = scales[:, 0] if flat else scales
    arrays = {"m.weight": codes, "m.weight_scale": stored_scales, "m.input_scale_ub": np.ones(1, np.float32)}
    plain = {"o.weight": np.ones((2, 2), ml_dtypes.bfloat16)}
    source = dequantized(MemorySource(arrays | plain), config(**FBGEMM))
    assert list(source.tensors) == ["m.weight", "o.weight"]
    assert "1 tensors left out" in left_out(source)[0]
    np.testing.assert_array_equal(source.read("m.weight").view(np.uint16), expected.view(np.uint16))
    box = ((0, shape[0] // 2 + 1), (shape[1] // 3, shape[1]))
    part = expected[: box[0][1], box[1][0] :]
    np.testing.assert_array_equal(source.read("m.weight", box).view(np.uint16), part.view(np.uint16))


@pytest.mark.parametrize(
    ("scales", "words"),
    [
        ({}, "has no m.weight_scale"),
        ({"m.weight_scale": np.ones((1, 1), np.float32)}, "expected float32 [4, 1]"),
        ({"m.weight_scale": np.ones((4, 6), np.float32)}, "expected float32 [4, 1]"),
        ({"m.weight_scale": np.ones((4, 1), np.int32)}, "m.weight_scale is int32"),
        ({"m.weight_scale": np.ones((4, 1), np.float32), "o.weight_scale": np.ones(1)}, "o.weight_scale scales"),
    ],
)
def test_what_fbgemm_does_not_write_is_refused(scales, words):
    arrays = {"m.weight": quantized(4, 6, (128, 128))["w"], **scales}
    with pytest.raises(BadInput) as raised:
        dequantized(MemorySource(arrays), config(**FBGEMM))
    assert words in str(raised.value)


def by_transformers(arrays: dict[str, np.ndarray]) -> np.ndarray:
    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    codes = torch.from_numpy(arrays["w"].view(np.uint8)).view(torch.float8_e4m3fn)
    scales = torch.from_numpy(arrays["w_scale_inv"])
    result = Fp8Dequantize(None)._dequantize_one(codes, scales, output_dtype=torch.bfloat16)
    return result.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(256, 384), (128, 128)])
def test_transformers_agrees_where_blocks_divide_the_shape(shape):
    arrays = quantized(*shape, (128, 128))
    found = dequantized(MemorySource(arrays), config()).read("w")
    np.testing.assert_array_equal(found.view(np.uint16), by_transformers(arrays).view(np.uint16))


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
@pytest.mark.parametrize("grid", [(), (1,), (1, 1), (37, 1), (37,)])
def test_without_a_block_size_there_is_a_scale_for_all_or_for_each_row(grid, suffix):
    arrays = quantized(37, 50, (128, 128))
    scales = np.random.default_rng(2).uniform(0, 3e-3, grid).astype(np.float32)
    expected = (arrays["w"].astype(np.float32) * scales.reshape(-1, 1)).astype(ml_dtypes.bfloat16)
    stored = {"w": arrays["w"], f"w{suffix}": scales, "w.input_scale": np.ones(1, np.float32)}
    source = dequantized(MemorySource(stored), config(weight_block_size=None, activation_scheme="static"))
    assert list(source.tensors) == ["w"]
    assert "1 tensors left out" in left_out(source)[0]
    np.testing.assert_array_equal(source.read("w").view(np.uint16), expected.view(np.uint16))
    box = ((3, 30), (7, 11))
    np.testing.assert_array_equal(source.read("w", box).view(np.uint16), expected[3:30, 7:11].view(np.uint16))


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
    [
        {"quant_method": "awq"},
        {"quant_method": None},
        {"fmt": "e5m2"},
        {"scale_fmt": "e4m3"},
        {"weight_block_size": 128},
        {"weight_block_size": [128]},
    ],
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
