"""The reference: transformers' own code on streamed weights, nothing missing, nothing that it dequantizes itself."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.reference.prompts import RANDOM_TOKENS, choose_prompts, fixed_prompts
from conversion_lib.logits.reference.reference import transformers_reference
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import compare_logits
from conversion_lib.progress import Reporter
from tests.support.logit_models import CONFIGS
from tests.support.maxtext_by_hand import read_weights
from tests.support.tiny_models import reference_logits

PROMPTS = fixed_prompts(128, 24, 1024)
TINY_SLICES = Memory(slice_bytes=20_000, score_bytes=200_000)


def test_prompts_are_fixed_and_within_the_vocabulary():
    again = fixed_prompts(128, 24, 1024)
    assert [len(prompt) for prompt in again] == [16, 16, 16, 24]
    assert all((a == b).all() for a, b in zip(PROMPTS, again, strict=True))
    assert all(prompt.min() >= 0 and prompt.max() < 128 for prompt in again)
    assert [len(prompt) for prompt in fixed_prompts(128, 512, 8)] == [8, 8, 8, 8]


@pytest.mark.parametrize("name", CONFIGS)
def test_streamed_weights_are_the_whole_models(name, model_dir):
    """The same as the model that holds all its weights, prompt by prompt: also no prompt sees another."""
    prompts = fixed_prompts(128, 300, 1024)
    reference = transformers_reference(model_dir(name), prompts, memory=TINY_SLICES)
    whole = [reference_logits(model_dir(name), prompt) for prompt in prompts]
    comparison = compare_logits(whole, reference.logits)
    assert comparison.max_kl < 1e-10
    assert comparison.max_abs_diff < 3e-5


def test_what_the_layers_put_out(model_dir):
    states: dict[int, blocks.States] = {}
    reference = transformers_reference(model_dir("llama_tied"), PROMPTS, observe=states.__setitem__)
    assert [logits.shape for logits in reference.logits] == [(16, 128)] * 3 + [(24, 128)]
    assert list(states) == [-1, 0, 1]
    assert {array.dtype.name for seen in states.values() for array in seen.values()} == {"float32"}
    embedding = read_weights(model_dir("llama_tied"))["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(states[-1][blocks.EMBEDDING], embedding[np.concatenate(PROMPTS)])
    assert {array.shape for array in states[1].values()} == {(72, 64)}


def test_weights_are_let_go_of(model_dir, monkeypatch):
    """At no time is more than a slice, one expert or a layer's norms in memory."""
    import torch

    from conversion_lib.logits.reference import streaming

    models = []
    stream = streaming.stream_weights
    monkeypatch.setattr(streaming, "stream_weights", lambda model, *more: (models.append(model), stream(model, *more)))
    held = []

    def observe(*_):
        held.append(sum(p.numel() for p in models[0].parameters() if not p.is_meta))

    transformers_reference(model_dir("deepseek_v3"), PROMPTS, memory=TINY_SLICES, observe=observe)
    total = sum(array.size for array in read_weights(model_dir("deepseek_v3")).values())
    used = len(np.unique(np.concatenate(PROMPTS)))
    assert max(held) <= used * 64 + 64  # the embedding's rows and the final norm
    assert max(held) < 0.06 * total
    assert torch.is_grad_enabled()


def test_a_missing_weight_is_not_drawn_at_random(model_dir, tmp_path):
    weights = read_weights(model_dir("llama_tied"))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model_dir("llama_tied") / "config.json", tmp_path)
    with pytest.raises(BadInput, match=r"lacks weights of the model: model\.layers\.1\.mlp\.up_proj\.weight"):
        transformers_reference(tmp_path, PROMPTS)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [("llama_tied", "model.norm.weight"), ("deepseek_v3", "model.layers.2.mlp.experts.3.up_proj.weight")],
)
def test_a_weight_of_another_shape(name, tensor, model_dir, tmp_path):
    weights = read_weights(model_dir(name))
    weights[tensor] = weights[tensor][..., :-1].copy()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(model_dir(name) / "config.json", tmp_path)
    with pytest.raises(BadInput, match=rf"tensor {tensor} has shape \[.*config.json requires \["):
        transformers_reference(tmp_path, PROMPTS)


def test_a_quantized_model_is_dequantized_by_us(tmp_path):
    """Blocks that are cut off at an edge too, which transformers gets wrong."""
    quantized, plain = tmp_path / "fp8", tmp_path / "bf16"
    make_tiny_deepseek_v3(quantized)
    dequantize(quantized, plain)
    prompts = fixed_prompts(64, 24, 64)
    a, b = (transformers_reference(directory, prompts) for directory in (quantized, plain))
    for wanted, found in zip(a.logits, b.logits, strict=True):
        np.testing.assert_array_equal(wanted, found)
    assert a.dtype == b.dtype == "bfloat16"


class TestTokenizer:
    @pytest.fixture
    def directory(self, tmp_path) -> Path:
        return make_tiny_deepseek_v3(tmp_path / "hf")

    def test_texts(self, directory):
        prompts = choose_prompts(directory, 4096, 512, 4096)
        assert len(prompts[3]) == 512
        assert [len(prompt) for prompt in prompts[4:]] == [RANDOM_TOKENS]
        assert all(len(prompt) < 120 for prompt in prompts[:3])
        assert all((a == b).all() for a, b in zip(prompts, choose_prompts(directory, 4096, 512, 4096), strict=True))
        assert max(map(len, choose_prompts(directory, 4096, 512, 40))) == 40

    def test_that_disagrees_with_the_vocabulary(self, directory):
        with pytest.raises(
            BadInput, match=r"tokenizer.json makes a token of id \d+ of a text, '.*', and the model has rows for 100"
        ):
            choose_prompts(directory, 100, 512, 4096)

    def changed(self, directory: Path, **changes: Any) -> list[np.ndarray]:
        """The prompts with another tokenizer.json."""
        path = directory / "tokenizer.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return choose_prompts(directory, 4096, 512, 4096)

    def test_padding_and_truncation_are_off(self, directory):
        """What the run that tuned the model left in its file."""
        plain = choose_prompts(directory, 4096, 512, 4096)
        sides = {"direction": "Right", "pad_to_multiple_of": 64, "pad_id": 1, "pad_type_id": 0, "pad_token": "<pad>"}
        cut = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        for changes in ({"padding": {"strategy": {"Fixed": 2048}, **sides}}, {"truncation": cut}):
            found = self.changed(directory, **{"padding": None, "truncation": None} | changes)
            assert [prompt.tolist() for prompt in found] == [prompt.tolist() for prompt in plain]

    def test_ids_that_no_text_has_do_not_matter(self, directory):
        """The token for images of Gemma 3, or one that a tune added; but a token before every text does."""
        plain = choose_prompts(directory, 4096, 512, 4096)
        added = {
            "id": 262144,
            "content": "<image_soft_token>",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        model = json.loads((directory / "tokenizer.json").read_text())["model"]
        model["vocab"]["<image_soft_token>"] = 262144
        found = self.changed(directory, added_tokens=[added], model=model)
        assert [prompt.tolist() for prompt in found] == [prompt.tolist() for prompt in plain]
        before = {
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<image_soft_token>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {
                "<image_soft_token>": {"id": "<image_soft_token>", "ids": [262144], "tokens": ["<image_soft_token>"]}
            },
        }
        with pytest.raises(BadInput, match=r"token of id 262144 of a text, '<image_soft_token>', and the model has"):
            self.changed(directory, post_processor=before)

    @pytest.mark.parametrize(
        "model",
        [{"type": "WordLevel", "vocab": {"zzz": 1}, "unk_token": "<none>"}, {"type": "BPE", "vocab": {}, "merges": []}],
        ids=["it fails", "it has none"],
    )
    def test_that_has_no_tokens_for_a_text(self, directory, model, capsys):
        """Random ids alone are checked then, and that is said."""
        path = directory / "tokenizer.json"
        kept = json.loads(path.read_text()) | {"model": model, "added_tokens": [], "post_processor": None}
        path.write_text(json.dumps(kept | {"decoder": None, "pre_tokenizer": {"type": "Whitespace"}}))
        found = choose_prompts(directory, 4096, 512, 4096, Reporter())
        assert [len(prompt) for prompt in found] == [len(prompt) for prompt in fixed_prompts(4096, 512, 4096)]
        assert f"{path} makes no tokens of a text: random ids are checked instead" in capsys.readouterr().err

    def test_that_is_not_there(self, directory):
        """Other files of a tokenizer are not read."""
        (directory / "tokenizer.json").rename(directory / "tokenizer_config.json")
        found = choose_prompts(directory, 4096, 512, 4096)
        assert [len(prompt) for prompt in found] == [len(prompt) for prompt in fixed_prompts(4096, 512, 4096)]

    def test_that_is_none(self, directory):
        (directory / "tokenizer.json").write_text("{}")
        with pytest.raises(BadInput, match=r"tokenizer.json is not a tokenizer"):
            choose_prompts(directory, 4096, 512, 4096)


@pytest.mark.parametrize("change", [{"model_type": "gpt9"}, {"num_attention_heads": "many"}])
def test_a_config_that_transformers_makes_no_model_of(change, model_dir, tmp_path):
    shutil.copytree(model_dir("llama_tied"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(BadInput, match=r"config.json: transformers (has no model_type|cannot make a model)"):
        transformers_reference(tmp_path / "hf", PROMPTS)


@pytest.mark.parametrize("keys", [1, 8])
def test_latent_attention_has_a_key_for_each_head(keys, model_dir, tmp_path):
    shutil.copytree(model_dir("deepseek_v3"), tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"num_key_value_heads": keys}))
    with pytest.raises(BadInput, match=rf"num_key_value_heads is {keys}, expected 4"):
        transformers_reference(tmp_path / "hf", PROMPTS)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_the_libraries(library, model_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BadInput, match=rf"need {library}.*pip install 'ferry-checkpoints\[check\]'"):
        transformers_reference(model_dir("llama_tied"), PROMPTS)


def test_plots_are_asked_for_first(monkeypatch, tmp_path):
    from conversion_lib.logits.check import run_check

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BadInput, match=r"matplotlib.*pip install 'ferry-checkpoints\[check\]'"):
        run_check(tmp_path, tmp_path)
