"""The logit check of single families: what `check_tests.py`, which looks at each of them, does not ask."""

from __future__ import annotations

import functools
import json
import re
import shutil

import numpy as np
import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.errors import BadInput
from conversion_lib.logits.check import Options, run_check
from conversion_lib.logits.forward.architectures import READERS, parse_config
from conversion_lib.logits.verdict import blocks
from conversion_lib.record import Target
from tests.support.config_values import ABSENT
from tests.support.family import descriptions
from tests.support.maxtext_by_hand import read_weights
from tests.support.tiny_models import make_tiny, tiny_config


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return functools.cache(lambda family: make_tiny(family, tmp_path_factory.mktemp(family) / "hf"))


def converted(hf, destination, *, scan, dtype):
    convert(hf, destination, Target(scan_layers=scan, save_dtype=dtype))
    return destination


def test_a_short_window_is_seen(source, tmp_path):
    """Sliding attention one token too wide: only prompts longer than the window show it."""
    hf = tmp_path / "hf"
    shutil.copytree(source("gemma3"), hf)
    root = converted(source("gemma3"), tmp_path / "ckpt", scan=True, dtype="float32")
    for directory in (hf, root / "hf"):
        raw = json.loads((directory / "config.json").read_text())
        raw.get("text_config", raw)["sliding_window"] += 1
        (directory / "config.json").write_text(json.dumps(raw))
    golden = tmp_path / "golden.npz"
    run_check(root, hf, options=Options(save_golden=golden))
    (root / "hf" / "config.json").write_text((source("gemma3") / "config.json").read_text())
    result = run_check(root, source("gemma3"), report_dir=tmp_path / "right")
    assert result.verdict == "pass"
    with pytest.raises(BadInput, match=r"of another model than .*window 24 against 25"):
        run_check(root, golden, report_dir=tmp_path / "wrong")


@pytest.mark.parametrize("layers", [12, 15])
def test_layers_left_over_from_the_scan(layers, tmp_path):
    """Gemma 3 scans six at a time: none left over, and three."""
    hf = make_tiny("gemma3", tmp_path / "hf", layers=layers)
    result = run_check(converted(hf, tmp_path / "ckpt", scan=True, dtype="float32"), hf)
    assert result.verdict == "pass"
    assert len(result.layers) == layers + 1
    assert result.max_kl < 1e-10


@pytest.mark.parametrize(("family", "vocabulary", "rows"), [("gemma2", 256000, 256128), ("gemma3", 262208, 262144)])
def test_a_vocabulary_that_maxtext_pads_or_cuts(family, vocabulary, rows, tmp_path):
    hf = make_tiny(family, tmp_path / "hf", layers=2 if family == "gemma2" else 6, vocab_size=vocabulary)
    result = run_check(converted(hf, tmp_path / "ckpt", scan=True, dtype="float32"), hf, options=Options(tokens=24))
    assert result.verdict == "pass"
    config = parse_config(json.loads((hf / "config.json").read_text()))
    assert (config.vocab, config.rows, config.tokens) == (vocabulary, rows, min(vocabulary, rows))


def test_kimi_k2_is_read_as_deepseek_v3(tmp_path):
    hf = make_tiny("deepseek_v3", tmp_path / "hf", layers=2)
    raw = json.loads((hf / "config.json").read_text()) | {"model_type": "kimi_k2"}
    (hf / "config.json").write_text(json.dumps(raw))
    result = run_check(converted(hf, tmp_path / "ckpt", scan=True, dtype="float32"), hf)
    assert result.verdict == "pass"
    assert blocks.ROUTER in result.layers[-1].blocks
    assert set(READERS) >= {"kimi_k2"}


@pytest.mark.parametrize(
    ("family", "sizes", "changes"),
    [
        # the class's own RoPE and eps hold
        ("mixtral", {}, {"rope_parameters": ABSENT, "rms_norm_eps": None}),
        # as training frameworks write it
        (
            "qwen3",
            {"layers": 2},
            {"dtype": ABSENT, "torch_dtype": "torch.bfloat16", "architectures": ["FSDPQwen3ForCausalLM"]},
        ),
        # a query that is divided by another root than head_dim's
        ("gemma2", {"layers": 2, "query_pre_attn_scalar": 36}, {}),
    ],
    ids=["left out", "other spellings", "query_pre_attn_scalar"],
)
def test_a_config_as_people_publish_it(family, sizes, changes, tmp_path):
    """Converted, checked against transformers, and exported."""
    hf = make_tiny(family, tmp_path / "hf", **sizes)
    raw = json.loads((hf / "config.json").read_text()) | changes
    kept = {key: value for key, value in raw.items() if value is not ABSENT}
    (hf / "config.json").write_text(json.dumps(kept))
    result = run_check(converted(hf, tmp_path / "ckpt", scan=True, dtype="float32"), hf)
    assert (result.verdict, result.max_kl < 1e-10) == ("pass", True)
    export(tmp_path / "ckpt", tmp_path / "back", dtype="float32")
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not back["architectures"][0].startswith("FSDP")
    before, after = read_weights(hf), read_weights(tmp_path / "back")
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name], tensor.astype(np.float32), rtol=3e-7, atol=1e-7, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types has sliding_attention, and there is no window"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, expected 4"),
        ({"layer_types": ["dense_attention"] * 4}, "layer_types has 'dense_attention'; the logit check supports"),
        ({"num_key_value_heads": 4}, "num_attention_heads 6 should be a multiple of num_key_value_heads 4"),
        ({"head_dim": 33}, "RoPE would turn 33 dimensions of a head, and it turns them in pairs"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_parameters.rope_type asks for RoPE scaling 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "has no rope_parameters.factor"),
        ({"rope_parameters": {"full_attention": {}}}, "RoPE for full_attention alone"),
        ({"rope_theta": 1.0, "rope_parameters": None}, "rope_theta should be a number above 1, not 1.0"),
        ({"hidden_act": "swish-ish"}, "hidden_act 'swish-ish'; the logit check supports only 'silu'"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(changes, said):
    """Before transformers is asked, which would fail midway."""
    with pytest.raises(BadInput, match=re.escape(said)):
        parse_config(tiny_config(descriptions()["qwen3"]).to_dict() | changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": True, "max_window_layers": 4, "sliding_window": 64},
        {"use_sliding_window": True, "sliding_window": None},
    ],
)
def test_windows_that_no_layer_has(changes):
    plain = tiny_config(descriptions()["qwen3"]).to_dict() | {"layer_types": None}
    assert parse_config(plain | changes) == parse_config(plain)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2.5", {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}),
        ("qwen3_moe", {"use_sliding_window": True, "norm_topk_prob": True}),
        ("mixtral", {}),
    ],
)
def test_sliding_windows_are_the_originals_and_not_maxtexts(tmp_path, family, changes):
    hf = make_tiny(family, tmp_path / "hf", layers=2, sliding_window=5, **changes)
    convert(hf, tmp_path / "ckpt", Target(save_dtype="float32"))
    result = run_check(tmp_path / "ckpt", hf, options=Options(tokens=40))
    assert (result.weights, result.model.verdict) == ("pass", "fail")
    assert result.max_kl < 1e-9 and "sliding_window" in result.model.differs
