"""The forward pass against transformers, on checkpoints that the converter had no part in."""

from __future__ import annotations

import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits import weights as weights_module
from conversion_lib.logits.compare import compare_layer, compare_logits
from conversion_lib.logits.config import parse_config
from conversion_lib.logits.forward import EMBEDDING_LAYER, forward
from tests.logits.conftest import MemoryCheckpoint
from tests.logits.models import CONFIGS, build_model
from tests.maxtext_by_hand import maxtext_leaves

MAX_KL = 1e-9
"""float32 on both sides, on the same bits: three or more orders below the check's own threshold."""


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers(name, scanned, model_dir, reference_of):
    reference = reference_of(name)
    config = parse_config(reference.config)
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir(name), scanned=scanned), scanned)
    layers = []

    def observe(layer, stream):
        layers.append(compare_layer(layer, reference.hidden[layer + 1], stream))

    result = forward(checkpoint, config, reference.prompts, observe=observe)
    comparison = compare_logits(reference.logits, result.logits)
    assert comparison.max_kl < MAX_KL
    assert comparison.top1 == 1.0
    assert [entry.layer for entry in layers] == [EMBEDDING_LAYER, *range(config.layers)]
    assert max(entry.relative for entry in layers) < 1e-4
    assert {logits.dtype.name for logits in result.logits} == {"float32"}
    # every leaf was looked at
    assert set(checkpoint.reads) == set(checkpoint.tensors)


def test_slices_change_nothing_but_rounding(monkeypatch, model_dir, reference_of):
    reference = reference_of("deepseek_v3")
    config = parse_config(reference.config)
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir("deepseek_v3"), scanned=True), True)
    # a few rows, one expert, a few queries at a time
    monkeypatch.setattr(weights_module, "SLICE_BYTES", 4096)
    monkeypatch.setattr("conversion_lib.logits.moe.SLICE_BYTES", 4096)
    monkeypatch.setattr("conversion_lib.logits.attention.SCORE_BYTES", 1 << 20)
    result = forward(checkpoint, config, reference.prompts)
    assert compare_logits(reference.logits, result.logits).max_kl < MAX_KL


def test_sparse_attention_in_blocks_of_queries(monkeypatch, model_dir, reference_of):
    reference = reference_of("deepseek_v32")
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir("deepseek_v32"), scanned=True), True)
    monkeypatch.setattr("conversion_lib.logits.attention.SCORE_BYTES", 1 << 20)
    result = forward(checkpoint, parse_config(reference.config), reference.prompts)
    assert compare_logits(reference.logits, result.logits).max_kl < MAX_KL


def test_halves_in_deepseek_when_the_config_says_so(tmp_path):
    from conversion_lib.logits.prompts import fixed_prompts
    from conversion_lib.logits.reference import transformers_reference

    directory = build_model("deepseek_v3_plain", tmp_path / "hf", rope_interleave=False)
    reference = transformers_reference(directory, fixed_prompts(128, 512, 1024))
    config = parse_config(reference.config)
    assert not config.rope.pairs
    checkpoint = MemoryCheckpoint(maxtext_leaves(directory, scanned=False), False)
    result = forward(checkpoint, config, reference.prompts)
    assert compare_logits(reference.logits, result.logits).max_kl < MAX_KL


def test_layout_is_seen_from_the_leaves_without_metadata(model_dir, reference_of):
    reference = reference_of("llama_tied")
    for scanned in (True, False):
        checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir("llama_tied"), scanned=scanned), None)
        result = forward(checkpoint, parse_config(reference.config), reference.prompts)
        assert compare_logits(reference.logits, result.logits).max_kl < MAX_KL


def test_experts_without_a_token_are_counted(model_dir, reference_of):
    reference = reference_of("deepseek_v3")
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir("deepseek_v3"), scanned=True), True)
    prompts = [np.full_like(prompt, 5) for prompt in reference.prompts]
    result = forward(checkpoint, parse_config(reference.config), prompts)
    # the same token throughout attends to nothing but itself: two of eight experts in each of three layers
    assert result.idle_experts == 18


class TestGateBias:
    """The scanned correction bias of DeepSeek-V3: (layers, experts) or (experts, layers)."""

    @pytest.mark.parametrize("order", ["layers_first", "experts_first"])
    @pytest.mark.parametrize("known", [True, False])
    def test_both_orders(self, order, known, model_dir, reference_of):
        reference = reference_of("deepseek_v3")
        leaves = maxtext_leaves(model_dir("deepseek_v3"), scanned=True, bias_order=order)
        checkpoint = MemoryCheckpoint(leaves, True)
        bias_order = order if known else None
        result = forward(checkpoint, parse_config(reference.config), reference.prompts, bias_order=bias_order)
        assert compare_logits(reference.logits, result.logits).max_kl < MAX_KL

    def test_wrong_order_is_refused_where_the_shape_tells(self, model_dir, reference_of):
        config = parse_config(reference_of("deepseek_v3").config)
        leaves = maxtext_leaves(model_dir("deepseek_v3"), scanned=True, bias_order="experts_first")
        with pytest.raises(BadInput, match=r"gate/bias is \(8, 3\).*asks for \(3, 8\)"):
            forward(MemoryCheckpoint(leaves, True), config, [np.array([1])], bias_order="layers_first")

    def test_as_many_experts_as_layers(self, tmp_path):
        from conversion_lib.logits.prompts import fixed_prompts
        from conversion_lib.logits.reference import transformers_reference

        directory = build_model("deepseek_v3", tmp_path / "hf", num_hidden_layers=9)
        reference = transformers_reference(directory, fixed_prompts(128, 512, 1024))
        config = parse_config(reference.config)
        kl = {}
        for order in ("layers_first", "experts_first"):
            leaves = maxtext_leaves(directory, scanned=True, bias_order=order)
            checkpoint = MemoryCheckpoint(leaves, True)
            with pytest.raises(BadInput, match="whether layers or experts come first"):
                forward(checkpoint, config, reference.prompts)
            for said in ("layers_first", "experts_first"):
                result = forward(checkpoint, config, reference.prompts, bias_order=said)
                kl[order, said] = compare_logits(reference.logits, result.logits).max_kl
        assert kl["layers_first", "layers_first"] < MAX_KL
        assert kl["experts_first", "experts_first"] < MAX_KL
        assert kl["layers_first", "experts_first"] > 1e-3
        assert kl["experts_first", "layers_first"] > 1e-3


class TestLeaves:
    """What is wrong with a checkpoint's leaves is said before anything is computed, by name."""

    @pytest.fixture
    def leaves(self, model_dir):
        return maxtext_leaves(model_dir("llama"), scanned=False)

    @pytest.fixture
    def config(self, reference_of):
        return parse_config(reference_of("llama").config)

    def refused(self, leaves, config, match):
        with pytest.raises(BadInput, match=match):
            forward(MemoryCheckpoint(leaves, False), config, [np.array([1])])

    def test_missing(self, leaves, config):
        del leaves["decoder/layers_3/mlp/wo/kernel"]
        self.refused(leaves, config, "no leaf params/params/decoder/layers_3/mlp/wo/kernel")

    def test_shape(self, leaves, config):
        leaves["decoder/layers_1/mlp/wo/kernel"] = leaves["decoder/layers_1/mlp/wo/kernel"].T
        self.refused(leaves, config, r"layers_1/mlp/wo/kernel is \(64, 96\), .* \(96, 64\)")

    def test_vocabulary(self, leaves, config):
        leaves["token_embedder/embedding"] = leaves["token_embedder/embedding"][:200]
        self.refused(leaves, config, r"token_embedder/embedding is \(200, 64\)")

    def test_left_over(self, leaves, config):
        leaves["decoder/layers_4/mlp/wo/kernel"] = leaves["decoder/layers_3/mlp/wo/kernel"]
        self.refused(leaves, config, "layers_4/mlp/wo/kernel has no place")

    def test_dtype(self, leaves, config):
        leaves["decoder/decoder_norm/scale"] = np.ones(64, np.int32)
        self.refused(leaves, config, "decoder_norm/scale has dtype int32")

    def test_metadata_that_disagrees(self, leaves, config):
        with pytest.raises(BadInput, match="no leaf params/params/decoder/layers/"):
            forward(MemoryCheckpoint(leaves, True), config, [np.array([1])])
