"""The forward pass against transformers, on weights put into MaxText's layout by hand."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.attention import _choose
from conversion_lib.logits.forward.forward import ForwardPass
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.forward.weights import Weights
from conversion_lib.logits.reference.prompts import fixed_prompts
from conversion_lib.logits.reference.reference import transformers_reference
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import compare_logits, relative_difference
from conversion_lib.logits.verdict.rounding import BFLOAT16_BITS, SUM_BITS, Dither
from tests.support.logit_models import CONFIGS, build_model
from tests.support.maxtext_by_hand import BF16, maxtext_leaves
from tests.support.memory_checkpoint import MemoryCheckpoint

MAX_KL = 1e-9
"""float32 on both sides, on the same bits: three or more orders below the check's own threshold."""


def max_kl(checkpoint, reference, **options):
    found = ForwardPass(checkpoint, parse_config(reference.config), reference.prompts, **options).run()
    return compare_logits(reference.logits, found).max_kl


@pytest.mark.parametrize("scanned", [True, False], ids=["scanned", "unscanned"])
@pytest.mark.parametrize("name", CONFIGS)
def test_agrees_with_transformers(name, scanned, model_dir, reference_of):
    seen = reference_of(name)
    reference, config = seen.reference, parse_config(seen.reference.config)
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir(name), scanned=scanned), scanned)
    run = ForwardPass(checkpoint, config, reference.prompts)
    numbers = []
    for number, states in run.layers():
        wanted = seen.states[number]
        assert set(states) == set(wanted) - {blocks.INDEXER}  # which is heard, not compared
        for block in states:
            assert relative_difference((wanted[block], states[block])).largest < 3e-5, (number, block)
        numbers.append(number)
    logits = run.logits()
    comparison = compare_logits(reference.logits, logits)
    assert comparison.max_kl < MAX_KL
    assert comparison.top1 == 1.0
    assert numbers == [blocks.EMBEDDING_LAYER, *range(len(config.layers))]
    assert {array.dtype.name for array in logits} == {"float32"}
    # every leaf was looked at
    assert set(checkpoint.reads) == set(checkpoint.tensors)


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "llama_tied"])
def test_slices_change_nothing_but_rounding(name, model_dir, reference_of):
    """A few rows, one expert, a few queries at a time."""
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir(name), scanned=True), True)
    memory = Memory(slice_bytes=4096, score_bytes=1 << 20)
    assert max_kl(checkpoint, reference_of(name).reference, memory=memory) < MAX_KL
    assert max(checkpoint.reads.count(name) for name in checkpoint.tensors) > 8


def test_halves_in_deepseek_when_the_config_says_so(tmp_path):
    directory = build_model("deepseek_v3_plain", tmp_path / "hf", rope_interleave=False)
    reference = transformers_reference(directory, fixed_prompts(128, 512, 1024))
    assert not parse_config(reference.config).layers[0].attention.rope.pairs
    assert max_kl(MemoryCheckpoint(maxtext_leaves(directory, scanned=False), False), reference) < MAX_KL


def test_layout_is_seen_from_the_leaves_without_metadata(model_dir, reference_of):
    for scanned in (True, False):
        checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir("llama_tied"), scanned=scanned), None)
        assert max_kl(checkpoint, reference_of("llama_tied").reference) < MAX_KL


def test_experts_without_a_token_are_counted(model_dir, reference_of):
    reference = reference_of("deepseek_v3").reference
    checkpoint = MemoryCheckpoint(maxtext_leaves(model_dir("deepseek_v3"), scanned=True), True)
    prompts = [np.full_like(prompt, 5) for prompt in reference.prompts]
    run = ForwardPass(checkpoint, parse_config(reference.config), prompts)
    run.run()
    # the same token throughout attends to nothing but itself: two of eight experts in each of three layers
    assert run.idle_experts == 18


@pytest.mark.parametrize("bits", [BFLOAT16_BITS, SUM_BITS])
def test_dither_is_half_a_unit_in_the_last_place(bits, model_dir, reference_of):
    reference = reference_of("llama_tied").reference
    leaves = {name: array.astype(BF16) for name, array in maxtext_leaves(model_dir("llama_tied"), scanned=True).items()}
    leaves["decoder/layers/mlp/wo/kernel"][:3] = 0
    checkpoint = MemoryCheckpoint(leaves, True)
    name = "params/params/decoder/layers/mlp/wo/kernel"
    plain = Weights(checkpoint, parse_config(reference.config))
    dithered = Weights(checkpoint, parse_config(reference.config), dither=Dither(frozenset({name}), bits))
    box = tuple((0, size) for size in checkpoint.tensors[name].shape)
    a, b = (np.asarray(weights.read(name, box)) for weights in (plain, dithered))
    assert (b[a == 0] == 0).all()
    half_units = np.exp2(np.frexp(a)[1] - (bits + 1.0))
    np.testing.assert_array_equal(np.abs(b - a)[a != 0], half_units[a != 0])
    assert 0.45 < (b > a)[a != 0].mean() < 0.55
    other = "params/params/decoder/decoder_norm/scale"
    assert (np.asarray(dithered.read(other, ((0, 64),))) == np.asarray(plain.read(other, ((0, 64),)))).all()


class TestGateBias:
    """The scanned correction bias of DeepSeek-V3: (layers, experts) or (experts, layers)."""

    @pytest.mark.parametrize("order", ["layers_first", "experts_first"])
    @pytest.mark.parametrize("known", [True, False])
    def test_both_orders(self, order, known, model_dir, reference_of):
        leaves = maxtext_leaves(model_dir("deepseek_v3"), scanned=True, bias_order=order)
        checkpoint, bias_order = MemoryCheckpoint(leaves, True), order if known else None
        assert max_kl(checkpoint, reference_of("deepseek_v3").reference, bias_order=bias_order) < MAX_KL

    def test_wrong_order_is_refused_where_the_shape_tells(self, model_dir, reference_of):
        config = parse_config(reference_of("deepseek_v3").reference.config)
        leaves = maxtext_leaves(model_dir("deepseek_v3"), scanned=True, bias_order="experts_first")
        with pytest.raises(BadInput, match=r"gate/bias has shape \(8, 3\).*requires \(3, 8\)"):
            ForwardPass(MemoryCheckpoint(leaves, True), config, [np.array([1])], bias_order="layers_first")

    def test_as_many_experts_as_layers(self, tmp_path):
        directory = build_model("deepseek_v3", tmp_path / "hf", num_hidden_layers=9)
        reference = transformers_reference(directory, fixed_prompts(128, 512, 1024))
        config = parse_config(reference.config)
        kl = {}
        for order in ("layers_first", "experts_first"):
            leaves = maxtext_leaves(directory, scanned=True, bias_order=order)
            checkpoint = MemoryCheckpoint(leaves, True)
            with pytest.raises(BadInput, match="whether layers or experts come first"):
                ForwardPass(checkpoint, config, reference.prompts)
            for said in ("layers_first", "experts_first"):
                kl[order, said] = max_kl(checkpoint, reference, bias_order=said)
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
        return parse_config(reference_of("llama").reference.config)

    def refused(self, leaves, config, match):
        with pytest.raises(BadInput, match=match):
            ForwardPass(MemoryCheckpoint(leaves, False), config, [np.array([1])])

    def test_missing(self, leaves, config):
        del leaves["decoder/layers_3/mlp/wo/kernel"]
        self.refused(leaves, config, "no leaf params/params/decoder/layers_3/mlp/wo/kernel")

    def test_shape(self, leaves, config):
        leaves["decoder/layers_1/mlp/wo/kernel"] = leaves["decoder/layers_1/mlp/wo/kernel"].T
        self.refused(leaves, config, r"layers_1/mlp/wo/kernel has shape \(64, 96\), .* \(96, 64\)")

    def test_vocabulary(self, leaves, config):
        leaves["token_embedder/embedding"] = leaves["token_embedder/embedding"][:200]
        self.refused(leaves, config, r"token_embedder/embedding has shape \(200, 64\)")

    def test_left_over(self, leaves, config):
        leaves["decoder/layers_4/mlp/wo/kernel"] = leaves["decoder/layers_3/mlp/wo/kernel"]
        self.refused(leaves, config, "layers_4/mlp/wo/kernel has no place")

    def test_dtype(self, leaves, config):
        leaves["decoder/decoder_norm/scale"] = np.ones(64, np.int32)
        self.refused(leaves, config, "decoder_norm/scale has dtype int32")

    def test_metadata_that_disagrees(self, leaves, config):
        with pytest.raises(BadInput, match="no leaf params/params/decoder/layers/"):
            ForwardPass(MemoryCheckpoint(leaves, True), config, [np.array([1])])


class TestEqualTokens:
    """Of tokens that float32 cannot tell apart, an indexer takes the original's; of others, its own."""

    SCORES = np.array([[3.0, 2.0, 2.0 - 1e-6, 0.0, -np.inf]], np.float32)
    VISIBLE = np.array([[True, True, True, True, False]])

    def chosen(self, theirs, tie=1e-4):
        places = None if theirs is None else jnp.asarray([theirs])
        return np.flatnonzero(_choose(jnp.asarray(self.SCORES), jnp.asarray(self.VISIBLE), 2, places, tie)).tolist()

    def test_alone_it_takes_the_best(self):
        assert self.chosen(None) == [0, 1]

    def test_a_tie_is_decided_as_the_original_does(self):
        assert self.chosen([0, 2]) == [0, 2]
        assert self.chosen([1, 0]) == [0, 1]

    @pytest.mark.parametrize("theirs", [[0, 3], [1, 2], [2, 3], [0, 4]])
    def test_a_worse_choice_is_not_followed(self, theirs):
        assert self.chosen(theirs) == [0, 1]

    def test_what_is_further_apart_is_no_tie(self):
        assert self.chosen([0, 2], tie=1e-8) == [0, 1]
