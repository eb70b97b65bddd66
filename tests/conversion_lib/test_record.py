"""What a record keeps of the source's dtypes: short, and right for every tensor."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conversion_lib.record import SourceDtypes

NAMES = st.lists(
    st.sampled_from(["model", "layers", "0", "1", "17", "experts", "A_log", "weight", "norm"]), min_size=1, max_size=5
).map(".".join)


@given(st.dictionaries(NAMES, st.sampled_from(["bfloat16", "float32", "float16"]), max_size=20))
def test_every_tensor_has_its_dtype_again(dtypes):
    packed = SourceDtypes.of_tensors(dtypes)
    if packed is None:
        assert not dtypes
        return
    found = SourceDtypes.model_validate_json(packed.model_dump_json()).by_name()
    assert {name: found(name) for name in dtypes} == dtypes


def test_layers_and_experts_alike_are_one_name():
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight" for layer in range(61) for expert in range(256)
    ]
    bias = [f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(61)]
    packed = SourceDtypes.of_tensors({**dict.fromkeys(names, "bfloat16"), **dict.fromkeys(bias, "float32")})
    assert packed == SourceDtypes(
        rest="bfloat16", named={"float32": ["model.layers.*.mlp.gate.e_score_correction_bias"]}
    )


def test_one_layer_that_differs_is_named_by_its_number():
    dtypes = {f"model.layers.{layer}.norm.weight": "float32" if layer == 3 else "bfloat16" for layer in range(9)}
    packed = SourceDtypes.of_tensors(dtypes)
    assert packed == SourceDtypes(rest="bfloat16", named={"float32": ["model.layers.3.norm.weight"]})
