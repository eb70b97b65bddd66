"""The logit check of single families: what `check_tests.py`, which looks at each of them, does not ask."""

from __future__ import annotations

import functools
import json
import shutil

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.errors import BadInput
from conversion_lib.logits.check import Options, run_check
from conversion_lib.logits.forward.architectures import READERS, parse_config
from conversion_lib.logits.verdict import blocks
from conversion_lib.record import Target
from tests.support.tiny_models import make_tiny


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
