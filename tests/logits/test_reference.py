"""The reference's own duties: float32, nothing missing, nothing that transformers dequantizes."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion_lib.errors import BadInput
from conversion_lib.logits.prompts import fixed_prompts
from conversion_lib.logits.reference import transformers_reference
from tests.maxtext_by_hand import read_weights

PROMPTS = fixed_prompts(128, 24, 1024)


def test_prompts_are_fixed_and_within_the_vocabulary():
    again = fixed_prompts(128, 24, 1024)
    assert [len(prompt) for prompt in again] == [16, 16, 16, 24]
    assert all((a == b).all() for a, b in zip(PROMPTS, again, strict=True))
    assert all(prompt.min() >= 0 and prompt.max() < 128 for prompt in again)
    assert [len(prompt) for prompt in fixed_prompts(128, 512, 8)] == [8, 8, 8, 8]


def test_streams_and_logits(model_dir):
    reference = transformers_reference(model_dir("llama_tied"), PROMPTS)
    assert [logits.shape for logits in reference.logits] == [(16, 128)] * 3 + [(24, 128)]
    assert [hidden.shape for hidden in reference.hidden] == [(72, 64)] * 3
    assert {array.dtype.name for array in (*reference.logits, *reference.hidden)} == {"float32"}
    embedding = read_weights(model_dir("llama_tied"))["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(reference.hidden[0], embedding[np.concatenate(PROMPTS)])


def test_a_missing_weight_is_not_drawn_at_random(model_dir, tmp_path):
    weights = read_weights(model_dir("llama_tied"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model_dir("llama_tied") / "config.json", tmp_path)
    with pytest.raises(BadInput, match=r"lacks weights of the model: model\.layers\.1\.mlp\.up_proj\.weight"):
        transformers_reference(tmp_path, PROMPTS)


def test_a_quantized_model_is_dequantized_by_us(model_dir, tmp_path, monkeypatch):
    quantized = tmp_path / "fp8"
    shutil.copytree(model_dir("llama_tied"), quantized)
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (quantized / "config.json").write_text(json.dumps(config))
    calls = []

    def dequantize(source_dir, destination, **_):
        calls.append((source_dir, destination))
        shutil.copytree(model_dir("llama_tied"), destination)

    monkeypatch.setattr("conversion_lib.convert.dequantize", dequantize)
    reference = transformers_reference(quantized, PROMPTS, scratch=tmp_path)
    plain = transformers_reference(model_dir("llama_tied"), PROMPTS)
    np.testing.assert_array_equal(reference.logits[0], plain.logits[0])
    assert reference.origin["reference"] == str(quantized)
    assert calls[0][0] == quantized
    assert not calls[0][1].exists()


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_the_libraries(library, model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInput, match=rf"need {library}.*pip install ferry\[check\]"):
        transformers_reference(model_dir("llama_tied"), PROMPTS)


def test_plots_are_asked_for_first(monkeypatch, tmp_path):
    from conversion_lib.logits.check import run_check

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"matplotlib.*pip install ferry\[check\]"):
        run_check(tmp_path, tmp_path)
