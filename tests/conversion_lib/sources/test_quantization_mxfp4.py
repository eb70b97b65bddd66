"""MXFP4 against transformers' own dequantization, bit for bit, and what is refused."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.core.boxes import slices, whole
from conversion_lib.core.tensors import TensorInfo, stored_bytes
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.pieces import Piece, bands
from conversion_lib.plan.plan import ArrayPlan, SourceSlice
from conversion_lib.sources.quantization import dequantized
from tests.support.memory_source import MemorySource, bits, boxes_in

CONFIG = ModelConfig({"quantization_config": {"quant_method": "mxfp4"}}, Path("config.json"))


def quantized(experts: int, out: int, groups: int, seed: int = 0, exponents: tuple[int, int] = (0, 255)):
    rng = np.random.default_rng(seed)
    return {
        "w_blocks": rng.integers(0, 256, (experts, out, groups, 16), dtype=np.uint8),
        "w_scales": rng.integers(*exponents, (experts, out, groups), dtype=np.uint8),
    }


def by_transformers(arrays) -> np.ndarray:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    result = convert_moe_packed_tensors(torch.from_numpy(arrays["w_blocks"]), torch.from_numpy(arrays["w_scales"]))
    return result.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 2), (2, 130, 5)])
def test_every_byte_under_every_exponent_is_transformers_s(shape):
    """Exponents from 0, whose values lie below what bfloat16 has as normal numbers, to 254, where they overflow."""
    arrays = quantized(*shape)
    source = dequantized(MemorySource(arrays), CONFIG)
    expected = by_transformers(arrays)
    assert source.tensors == {"w": TensorInfo("w", expected.shape, "bfloat16", "shard", order=(0, 2, 1))}
    np.testing.assert_array_equal(bits(source.read("w")), bits(expected))


def test_the_256_bytes_under_all_255_exponents():
    codes = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    arrays = {
        "w_blocks": np.broadcast_to(codes, (1, 255, 16, 16)).copy(),
        "w_scales": np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (1, 255, 16)).copy(),
    }
    found = dequantized(MemorySource(arrays), CONFIG).read("w")
    np.testing.assert_array_equal(bits(found), bits(by_transformers(arrays)))


@settings(deadline=None)
@given(st.data())
def test_any_slice_equals_that_slice_of_the_whole(data):
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 4)))
    arrays = quantized(*shape, exponents=(100, 140))
    source = dequantized(MemorySource(arrays), CONFIG)
    box = data.draw(boxes_in(source.tensors["w"].shape))
    np.testing.assert_array_equal(bits(source.read("w", box)), bits(source.read("w")[slices(box)]))
    groups = (box[1][0] // 32, -(-box[1][1] // 32))
    needed = (box[0][1] - box[0][0]) * (box[2][1] - box[2][0]) * (groups[1] - groups[0])
    assert stored_bytes(source, "w", box) == needed * 17


def test_a_band_reads_every_code_once():
    """The codes lie by output, so an array is made of bands of outputs, which are read without what lies between."""
    info = TensorInfo("w", (2, 2880, 1000), "bfloat16", "shard", order=(0, 2, 1))
    array = ArrayPlan("w", info.shape, "bfloat16", info.shape, (), (SourceSlice("w", info.shape, (0, 0, 0)),))
    reads = [band.read for band in bands(array, Piece(0, whole(info.shape)), 2 << 20, {"w": info})]
    assert len(reads) > info.shape[0]
    assert {read[1] for read in reads} == {(0, 2880)}


def without_scales(arrays):
    del arrays["w_scales"]


def without_blocks(arrays):
    del arrays["w_blocks"]


def three_dimensions(arrays):
    arrays["w_blocks"] = arrays["w_blocks"].reshape(2, 3, 64)


def half_groups(arrays):
    arrays["w_blocks"] = arrays["w_blocks"][..., :8]


def signed(arrays):
    arrays["w_blocks"] = arrays["w_blocks"].view(np.int8)


def fewer_scales(arrays):
    arrays["w_scales"] = arrays["w_scales"][:, :, :3]


def float_scales(arrays):
    arrays["w_scales"] = arrays["w_scales"].astype(np.float32)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without_scales, r"w_blocks has no w_scales"),
        (without_blocks, r"w_scales has no w_blocks"),
        (three_dimensions, r"w_blocks is uint8 \[2, 3, 64\], expected uint8 \[experts"),
        (half_groups, r"w_blocks is uint8 \[2, 3, 4, 8\]"),
        (signed, r"w_blocks is int8"),
        (fewer_scales, r"w_scales is uint8 \[2, 3, 3\], expected uint8 \[2, 3, 4\]"),
        (float_scales, r"w_scales is float32"),
    ],
)
def test_codes_and_scales_must_fit(damage, said):
    arrays = quantized(2, 3, 4)
    damage(arrays)
    with pytest.raises(BadInput, match=f"shard: .*{said}"):
        dequantized(MemorySource(arrays), CONFIG)


def test_a_scale_that_stands_for_nan_is_found_when_it_is_read():
    arrays = quantized(2, 3, 4)
    arrays["w_scales"][1, 2, 3] = 255
    source = dequantized(MemorySource(arrays), CONFIG)
    source.read("w", ((0, 1), (0, 128), (0, 3)))
    with pytest.raises(BadInput, match=r"shard: w_scales\[1, 2, 3\] is 255"):
        source.read("w", ((1, 2), (96, 97), (1, 3)))


def test_codes_without_a_quantization_config_are_refused():
    with pytest.raises(BadInput, match=r"w_blocks is uint8, but config\.json has no quantization_config"):
        dequantized(MemorySource(quantized(2, 3, 4)), ModelConfig({}, Path("config.json")))
