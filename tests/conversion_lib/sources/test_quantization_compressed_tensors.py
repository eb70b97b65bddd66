"""compressed-tensors' fp8 and int4 against what the library itself writes and decompresses, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.core.boxes import slices
from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.quantization import dequantized, left_out
from tests.support.memory_source import MemorySource, bits, boxes_in

FP8 = {"num_bits": 8, "type": "float"}
INT4 = {"num_bits": 4, "type": "int"}
CHANNEL, TENSOR = {"strategy": "channel"}, {"strategy": "tensor"}
MODULE = "model.layers.0.mlp.up_proj"

SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8 by tensor": ("float-quantized", FP8 | TENSOR),
    "fp8 by channel": ("float-quantized", FP8 | CHANNEL),
    "fp8 by block": ("float-quantized", FP8 | {"strategy": "block", "block_structure": [4, 3]}),
    "fp8 by group": ("naive-quantized", FP8 | {"strategy": "group", "group_size": 4}),
    "int4 by group": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 32}),
    "int4 by small groups": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 4}),
    "int4 by odd groups": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 6}),
    "int4 by channel": ("pack-quantized", INT4 | CHANNEL),
    "int4 with zero points": ("pack-quantized", INT4 | {"strategy": "group", "group_size": 8, "symmetric": False}),
    "int4 by channel with zero points": ("pack-quantized", INT4 | CHANNEL | {"symmetric": False}),
}


def config(form: str, arguments: dict[str, Any], **others: Any) -> ModelConfig:
    group = {"targets": ["Linear"], "weights": arguments, "input_activations": None}
    quantization = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return ModelConfig({"quantization_config": quantization | others}, Path("config.json"))


def columns_of(arguments: dict[str, Any], wanted: int) -> int:
    """The nearest width that the library packs: whole groups; without them whole words of int4."""
    unit = arguments.get("group_size") or (8 if arguments["type"] == "int" else 1)
    return max(unit, wanted // unit * unit)


def compressed(form: str, arguments: dict[str, Any], rows: int, columns: int, dtype: str, seed: int = 0):
    """A random matrix as the library stores it, and as it decompresses that."""
    import torch
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(seed)
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    grid = {
        "tensor": (1,),
        "channel": (rows, 1),
        "group": (rows, columns // arguments.get("group_size", 1)),
        "block": tuple(
            -(-n // size) for n, size in zip((rows, columns), arguments.get("block_structure", (1, 1)), strict=True)
        ),
    }[arguments["strategy"]]
    scale = (torch.rand(grid) * 0.02 + 1e-3).to(getattr(torch, dtype))
    state = {"weight": torch.randn(rows, columns) * 0.1, "weight_scale": scale}
    if not arguments.get("symmetric", True):
        state["weight_zero_point"] = torch.randint(-8, 8, grid, dtype=torch.int8)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    plain = compressor.decompress(stored, scheme)["weight"].to(torch.bfloat16)
    arrays = {f"{MODULE}.{name}": as_array(tensor) for name, tensor in stored.items()}
    return arrays, as_array(plain)


def as_array(tensor) -> np.ndarray:
    import torch

    kinds = {
        torch.bfloat16: (torch.uint16, ml_dtypes.bfloat16),
        torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    }
    if tensor.dtype not in kinds:
        return tensor.numpy()
    raw, kind = kinds[tensor.dtype]
    return tensor.contiguous().view(raw).numpy().view(kind)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("scheme", SCHEMES)
@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_any_slice_is_the_library_s(scheme, dtype, data):
    form, arguments = SCHEMES[scheme]
    # the library cannot unpack the zero points of eight rows or fewer
    rows, wanted = data.draw(st.integers(9 if "zero" in scheme else 1, 40)), data.draw(st.integers(1, 100))
    arrays, expected = compressed(form, arguments, rows, columns_of(arguments, wanted), dtype)
    source = dequantized(MemorySource(arrays), config(form, arguments))
    assert [(info.name, info.shape, info.dtype) for info in source.tensors.values()] == [
        (f"{MODULE}.weight", expected.shape, "bfloat16")
    ]
    np.testing.assert_array_equal(bits(source.read(f"{MODULE}.weight")), bits(expected))
    box = data.draw(boxes_in(expected.shape))
    np.testing.assert_array_equal(bits(source.read(f"{MODULE}.weight", box)), bits(expected[slices(box)]))


def test_groups_of_two_kinds_take_the_modules_that_they_name():
    """fp8 for what a pattern names, int4 for every other linear layer; what `ignore` names is plain."""
    eight, narrow = SCHEMES["fp8 by channel"], SCHEMES["int4 by group"]
    groups = {
        "group_0": {"targets": ["Linear"], "weights": narrow[1], "format": narrow[0]},
        "group_1": {"targets": ["re:.*self_attn.*"], "weights": eight[1], "format": eight[0]},
    }
    stored, expected = {}, {}
    for number, (module, (form, arguments)) in enumerate({"a.self_attn.q": eight, "a.mlp.up": narrow}.items()):
        arrays, plain = compressed(form, arguments, 6, 64, "bfloat16", seed=number)
        stored |= {name.replace(MODULE, module): array for name, array in arrays.items()}
        expected[f"{module}.weight"] = plain
    stored["lm_head.weight"] = expected["lm_head.weight"] = np.ones((3, 4), ml_dtypes.bfloat16)
    settings = config("mixed-precision", {}, config_groups=groups, ignore=["lm_head"])
    source = dequantized(MemorySource(stored), settings)
    assert source.tensors.keys() == expected.keys()
    for name, plain in expected.items():
        np.testing.assert_array_equal(bits(source.read(name)), bits(plain))


def test_scales_of_activations_are_left_out_with_a_line():
    form, arguments = SCHEMES["fp8 by tensor"]
    arrays, _ = compressed(form, arguments, 6, 8, "bfloat16")
    arrays |= {f"{MODULE}.input_scale": np.ones(1, np.float32), "a.self_attn.k_scale": np.ones(1, np.float32)}
    source = dequantized(MemorySource(arrays), config(form, arguments))
    assert list(source.tensors) == [f"{MODULE}.weight"]
    assert left_out(source) == (
        "activation scales: 2 tensors left out; they quantize the input or output of a layer or its cache, not its "
        "weights",
    )


def removed(part):
    return lambda arrays: arrays.pop(f"{MODULE}.{part}")


def changed(part, change):
    def damage(arrays):
        arrays[f"{MODULE}.{part}"] = change(arrays[f"{MODULE}.{part}"])

    return damage


def added(part):
    return lambda arrays: arrays.update({f"{MODULE}.{part}": np.zeros(2, np.int32)})


@pytest.mark.parametrize(
    ("scheme", "damage", "said"),
    [
        ("fp8 by channel", removed("weight_scale"), "weight has no .*weight_scale"),
        ("fp8 by channel", removed("weight"), "weight_scale belongs to no known quantized weight"),
        ("fp8 by channel", changed("weight_scale", lambda a: a[:-1]), r"weight_scale is bfloat16 \[15, 1\], expected"),
        ("fp8 by channel", changed("weight_scale", lambda a: a.astype(np.int32)), r"weight_scale is int32"),
        ("fp8 by channel", changed("weight", lambda a: a[None]), "expected two dimensions"),
        ("fp8 by block", changed("weight_scale", lambda a: a.T), r"expected float32 \[4, 22\]"),
        ("int4 by group", removed("weight_scale"), "weight_packed has no .*weight_scale"),
        ("int4 by group", removed("weight_shape"), "weight_packed has no .*weight_shape"),
        ("int4 by group", removed("weight_packed"), "weight_scale belongs to no known quantized weight"),
        ("int4 by group", changed("weight_packed", lambda a: a[:, :-1]), r"weight_packed is int32 \[16, 7\], expected"),
        ("int4 by group", changed("weight_packed", lambda a: a.view(np.float32)), "weight_packed is float32"),
        ("int4 by group", changed("weight_scale", lambda a: a[1:]), r"weight_scale is bfloat16 \[15, 2\], expected"),
        ("int4 by group", changed("weight_shape", lambda a: a[:1]), r"weight_shape is int64 \[1\]"),
        ("int4 by group", added("weight_zero_point"), "weight_zero_point belongs to no known quantized weight"),
        ("int4 by group", added("weight_g_idx"), "weight_g_idx belongs to no known quantized weight"),
        ("int4 with zero points", removed("weight_zero_point"), "weight_packed has no .*weight_zero_point"),
        (
            "int4 with zero points",
            changed("weight_zero_point", lambda a: a[:1]),
            r"weight_zero_point is int32 \[1, 8\]",
        ),
    ],
)
def test_what_belongs_to_a_weight_must_be_there_and_fit(scheme, damage, said):
    form, arguments = SCHEMES[scheme]
    arrays, _ = compressed(form, arguments, 16, 64 if "int4" in scheme else 66, "bfloat16")
    damage(arrays)
    with pytest.raises(BadInput, match=f"shard: .*{said}"):
        dequantized(MemorySource(arrays), config(form, arguments))


@pytest.mark.parametrize("scheme", ["fp8 by channel", "int4 by group"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_scale_that_is_none_is_found_when_it_is_read(scheme, bad):
    form, arguments = SCHEMES[scheme]
    arrays, _ = compressed(form, arguments, 16, 64, "bfloat16")
    arrays[f"{MODULE}.weight_scale"][5, 0] = bad
    source = dequantized(MemorySource(arrays), config(form, arguments))
    source.read(f"{MODULE}.weight", ((0, 5), (0, 64)))
    with pytest.raises(BadInput, match=r"shard: .*weight_scale\[5, 0\] is"):
        source.read(f"{MODULE}.weight", ((2, 8), (0, 64)))


def test_a_shape_that_the_headers_do_not_make_is_found_when_it_is_read():
    form, arguments = SCHEMES["int4 by channel"]
    arrays, _ = compressed(form, arguments, 16, 64, "bfloat16")
    arrays[f"{MODULE}.weight_shape"][1] = 63
    source = dequantized(MemorySource(arrays), config(form, arguments))
    with pytest.raises(BadInput, match=r"weight_shape is \[16, 63\], but .* give \[16, 64\]"):
        source.read(f"{MODULE}.weight", ((0, 1), (0, 1)))


@pytest.mark.parametrize("name", ["model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.w_blocks"])
def test_codes_that_are_no_module_s_weight_are_refused(name):
    """They would go through as they are, and the result would not be plain."""
    form, arguments = SCHEMES["fp8 by channel"]
    arrays, _ = compressed(form, arguments, 6, 8, "bfloat16")
    codes = np.zeros((2, 3, 4), np.uint8)
    arrays[name] = codes if name.endswith("_blocks") else codes.view(ml_dtypes.float8_e4m3fn)
    with pytest.raises(BadInput, match=f"shard: tensor {name} is .*no quantization_config that describes it"):
        dequantized(MemorySource(arrays), config(form, arguments))


def group(**weights: Any) -> dict[str, Any]:
    return {"config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize(
    ("form", "others", "said"),
    [
        ("int-quantized", group(num_bits=8, type="int", strategy="channel"), "group_0 .*int-quantized, 8 bits int"),
        ("pack-quantized", group(num_bits=8, type="int", strategy="channel"), "group_0 .*pack-quantized, 8 bits int"),
        ("nvfp4-pack-quantized", group(num_bits=4, type="float", strategy="tensor_group"), "nvfp4-pack-quantized"),
        ("float-quantized", group(num_bits=8, type="float", strategy="token"), "by token"),
        ("float-quantized", group(num_bits=8, type="float", strategy="tensor", symmetric=False), "is not supported"),
        ("float-quantized", group(num_bits=8, type="float", strategy="group", group_size=0), "group_size of group_0"),
        ("float-quantized", group(num_bits=8, type="float", strategy="block"), "block_structure of group_0"),
        ("float-quantized", {"config_groups": None}, "quantization_config.config_groups: "),
        ("float-quantized", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("float-quantized", {"ignore": ["re:.*mlp.*"]}, "no group of config_groups"),
        ("float-quantized", {"ignore": ["re:*"]}, "ignore of quantization_config: '\\*' is not a regular expression"),
        ("float-quantized", {"ignore": ["re:a(?!b)"]}, "ignore of .*lookaheads only at the beginning"),
        ("float-quantized", {"ignore": [f"re:{i}" for i in range(1001)]}, "more than 1000 regular expressions"),
        ("float-quantized", {"ignore": ["re:^(?!x).*"]}, "no group of config_groups"),
        ("pack-quantized", group(**SCHEMES["int4 by group"][1]), "no group of config_groups"),
    ],
)
def test_what_is_not_read_is_refused_by_name(form, others, said):
    arguments = SCHEMES["fp8 by tensor"][1]
    arrays, _ = compressed("float-quantized", arguments, 6, 8, "bfloat16")
    with pytest.raises(BadInput, match=said):
        dequantized(MemorySource(arrays), config(form, arguments, **others))
