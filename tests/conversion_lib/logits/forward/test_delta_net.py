"""Qwen 3 Next, Qwen 3.5 and Gemma 4: what carries a state, has a gate, or takes in more than the stream."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.check import Options, run_check
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.delta_net import _recur
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.forward.moe import _choose_experts
from conversion_lib.logits.reference.prompts import fixed_prompts
from conversion_lib.logits.reference.reference import transformers_reference
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import Spot, compare_logits, first_departing
from conversion_lib.logits.verdict.rounding import EXACT_KL
from conversion_lib.record import Target
from conversion_lib.sources.orbax import open_orbax
from tests.conversion_lib.logits.conftest import Seen, findings
from tests.support.memory_checkpoint import MemoryCheckpoint
from tests.support.tiny_models import make_tiny, reference_logits

DENSE = {"enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None}
E4B = {
    "layers": 12,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 6,
    "use_double_wide_mlp": False,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2,
}
MODELS = {
    "qwen3_next": ("qwen3_next", {"layers": 4}),
    "qwen3_next-left_over": ("qwen3_next", {"layers": 7, "linear_num_key_heads": 1, "linear_conv_kernel_dim": 3}),
    "qwen3.5": ("qwen3.5", {"layers": 8}),
    "gemma4": ("gemma4", {"layers": 6}),
    "gemma4-31b": ("gemma4", {"layers": 12, **DENSE}),
    "gemma4-e2b": ("gemma4_small", {}),
    "gemma4-e4b": ("gemma4_small", E4B),
}
SCANNED = [name for name in MODELS if MODELS[name][0] != "gemma4_small"]


def with_layer_scalars(directory):
    """Gemma 4's factors at the end of each layer, which a new model has as ones, at random."""
    generator = torch.Generator().manual_seed(0)
    for path in sorted(directory.glob("*.safetensors")):
        tensors = load_file(path)
        for name in sorted(name for name in tensors if name.endswith("layer_scalar")):
            tensors[name] = (0.5 + torch.rand(1, generator=generator)).to(tensors[name].dtype)
        save_file(tensors, path, {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    def make(name):
        family, sizes = MODELS[name]
        return with_layer_scalars(make_tiny(family, tmp_path_factory.mktemp(name) / "hf", **sizes))

    return functools.cache(make)


@pytest.mark.parametrize(
    ("name", "scan"), [*((name, True) for name in SCANNED), *((name, False) for name in MODELS)], ids=str
)
def test_the_same_function_in_both_layouts(name, scan, source, tmp_path):
    convert(source(name), tmp_path / "ckpt", Target(scan_layers=scan, save_dtype="float32"))
    result = run_check(tmp_path / "ckpt", source(name), options=Options(tokens=100))
    assert (result.verdict, result.threshold) == ("pass", EXACT_KL), "so few layers magnify little"
    assert result.mean_threshold == (EXACT_KL if name.startswith("qwen") else None)
    assert result.max_kl < 1e-6
    assert not [block for layer in result.layers for block in layer.blocks.values() if block.departs]


def test_delta_nets_as_deep_as_real_ones(tmp_path):
    """Float32 alone moves these 48 layers by a KL of 1e-4. A wrong tensor among them is found all the same."""
    hf = make_tiny("qwen3_next", tmp_path / "hf", layers=48, seed=1)
    convert(hf, tmp_path / "ckpt", Target(scan_layers=False, save_dtype="float32"))
    result = run_check(tmp_path / "ckpt", hf)
    assert result.verdict == "pass"
    assert result.threshold > 10 * EXACT_KL, "or this shows nothing; how far they move is the processor's too"
    assert "float32" in result.threshold_rests_on

    weights = {path.name: load_file(path) for path in hf.glob("*.safetensors")}
    for file, tensors in weights.items():
        if (name := "model.layers.30.linear_attn.dt_bias") in tensors:
            tensors[name] = tensors[name].flip(0)
            save_file(tensors, hf / file, {"format": "pt"})
    wrong = run_check(tmp_path / "ckpt", hf, options=Options(tokens=100))
    assert (wrong.verdict, wrong.first_departing) == ("fail", Spot(layer=30, block=blocks.ATTENTION))


@pytest.mark.parametrize("name", MODELS)
def test_streamed_weights_are_the_whole_models(name, source):
    """Block by block of queries, prompt by prompt of a delta net: the same as the model that holds all its weights."""
    prompts = fixed_prompts(500, 100, 1024)
    small = Memory(slice_bytes=20_000, score_bytes=20_000)
    reference = transformers_reference(source(name), prompts, memory=small)
    whole = [reference_logits(source(name), prompt) for prompt in prompts]
    assert compare_logits(whole, reference.logits).max_kl < 1e-7


@pytest.fixture(scope="module")
def leaves_of(source, tmp_path_factory):
    """The leaves of a right checkpoint, unscanned."""

    @functools.cache
    def read(name):
        root = tmp_path_factory.mktemp(f"{name}-right")
        convert(source(name), root, Target(scan_layers=False, save_dtype="float32"))
        checkpoint = open_orbax(root)
        prefix = "params/params/"
        return {
            path.removeprefix(prefix): checkpoint.read(path) for path in checkpoint.tensors if path.startswith(prefix)
        }

    return lambda name: {path: array.copy() for path, array in read(name).items()}


@pytest.fixture(scope="module")
def original_of(source):
    """transformers' logits, and what its layers put out."""

    @functools.cache
    def run(name):
        states = {}
        return transformers_reference(source(name), fixed_prompts(500, 48, 1024), observe=states.__setitem__), states

    return run


NET = "decoder/layers_1/attention"


def decay(leaves):
    leaves[f"{NET}/A_log"] = leaves[f"{NET}/A_log"][::-1].copy()


def step_bias(leaves):
    leaves[f"{NET}/dt_bias"] = np.zeros_like(leaves[f"{NET}/dt_bias"])


def taps_in_reverse(leaves):
    leaves[f"{NET}/conv1d/kernel"] = leaves[f"{NET}/conv1d/kernel"][::-1].copy()


def by_kind_instead_of_by_head(leaves):
    """All queries, then all keys, values and gates, as Qwen 3.5's own tensors have them."""
    kernel = leaves[f"{NET}/in_proj_qkvz/kernel"]
    by_head = kernel.reshape(len(kernel), 2, -1)
    parts = np.split(by_head, np.cumsum([24, 24, 56]), axis=-1)
    leaves[f"{NET}/in_proj_qkvz/kernel"] = np.concatenate([part.reshape(len(kernel), -1) for part in parts], axis=-1)


def net_norm_less_one(leaves):
    leaves[f"{NET}/norm/rms_norm/scale"] -= 1


def gate_before_query(leaves):
    name = "decoder/layers_3/attention/attention/query/kernel"
    leaves[name] = np.roll(leaves[name], 32, axis=-1)


def norm_plus_one(leaves):
    leaves["decoder/layers_3/attention/attention/key_norm/scale"] += 1


def shared_gate(leaves):
    leaves["decoder/layers_2/mlp/shared_expert_gate/kernel"] *= -1


def layer_scalar(leaves):
    leaves["decoder/layers_3/layer_scalar"] = np.ones(1, np.float32)


def router_scale(leaves):
    leaves["decoder/layers_2/mlp/pre_forward_scale_2"] = np.ones(64, np.float32)


def expert_scale(leaves):
    leaves["decoder/layers_1/mlp/moe_block/MoeBlock_0/per_expert_scale"] = np.ones(10, np.float32)


def swapped_norms(leaves):
    after = "decoder/layers_4/mlp/post_feedforward_layernorm_{}/scale"
    leaves[after.format(1)], leaves[after.format(2)] = leaves[after.format(2)], leaves[after.format(1)]


def swapped_per_layer_embedding(leaves):
    name = "decoder/per_layer_embedder/embed_tokens_per_layer"
    by_layer = leaves[name].reshape(500, 10, 20)
    leaves[name] = by_layer[:, [0, 1, 2, 3, 5, 4, 6, 7, 8, 9]].reshape(500, 200)


def keys_that_are_shared(leaves):
    """Layer 3's, which the sliding layers from 5 on take, in an order that its own attention shows first."""
    leaves["decoder/layers_3/self_attention/key/kernel"] *= -1


PLANTED = [
    ("qwen3_next", decay, 1, blocks.ATTENTION),
    ("qwen3_next", step_bias, 1, blocks.ATTENTION),
    ("qwen3_next", taps_in_reverse, 1, blocks.ATTENTION),
    ("qwen3_next", by_kind_instead_of_by_head, 1, blocks.ATTENTION),
    ("qwen3_next", net_norm_less_one, 1, blocks.ATTENTION),
    ("qwen3_next", gate_before_query, 3, blocks.ATTENTION),
    ("qwen3_next", norm_plus_one, 3, blocks.ATTENTION),
    ("qwen3_next", shared_gate, 2, blocks.MLP),
    ("gemma4", layer_scalar, 3, blocks.STREAM),
    ("gemma4", router_scale, 2, blocks.ROUTER),
    ("gemma4", expert_scale, 1, blocks.ROUTER),
    ("gemma4", swapped_norms, 4, blocks.NORM_AFTER_EXPERTS),
    ("gemma4-e2b", layer_scalar, 3, blocks.STREAM),
    ("gemma4-e2b", swapped_per_layer_embedding, 4, blocks.PER_LAYER_INPUT),
    ("gemma4-e2b", keys_that_are_shared, 3, blocks.ATTENTION),
]


@pytest.mark.parametrize(
    ("name", "plant", "layer", "block"), PLANTED, ids=[f"{name}-{plant.__name__}" for name, plant, *_ in PLANTED]
)
def test_planted_mistakes(name, plant, layer, block, original_of, leaves_of):
    leaves = leaves_of(name)
    plant(leaves)
    reference, states = original_of(name)
    found = findings(MemoryCheckpoint(leaves, False), Seen(reference, states))
    assert first_departing(found.layers) == Spot(layer=layer, block=block)
    assert compare_logits(reference.logits, found.logits).max_kl > found.allowed


def test_the_recurrence_by_hand():
    """Two tokens of one head: what is under the key is replaced by a share of beta, after the state decayed."""
    query, key = np.array([[[1.0, 0.0]], [[0.5, 1.0]]]), np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    value, decays, beta = np.array([[[3.0]], [[5.0]]]), np.array([[0.9], [0.5]]), np.array([[0.5], [0.25]])
    first = np.array([True, False])
    out = _recur(*(jnp.asarray(part, jnp.float32) for part in (query, key, value, decays, beta)), jnp.asarray(first))
    # after the first token the state holds 1.5 under (1, 0); then 0.75 there, and 1.25 under (0, 1)
    np.testing.assert_allclose(np.asarray(out).ravel(), [1.5, 0.5 * 0.75 + 1.25], rtol=1e-6)


class TestEqualExperts:
    """Of experts whose scores float32 cannot tell apart, the original's are taken; of others, the own."""

    LOGITS = np.array([[2.0, 1.0, 1.0 - 1e-6, 0.0]], np.float32)

    def chosen(self, wanted, tie=1e-4, **more):
        config = parse_config({**QWEN3_MOE, **more}).layers[0].feed_forward
        shares = np.zeros((1, 4), np.float32)
        shares[0, wanted] = 0.5
        chosen, _ = _choose_experts(jnp.asarray(self.LOGITS), jnp.zeros(4), config, shares, tie)
        return sorted(np.asarray(chosen)[0].tolist())

    def test_a_tie_is_decided_as_the_original_does(self):
        assert self.chosen([0, 2]) == [0, 2]
        assert self.chosen([0, 1]) == [0, 1]

    def test_a_worse_choice_is_not_followed(self):
        assert self.chosen([0, 3]) == [0, 1]
        assert self.chosen([1, 2]) == [0, 1]
        assert self.chosen([0, 2], tie=1e-8) == [0, 1]

    @pytest.mark.parametrize("bias", [-0.7, 0.0, 40.0])
    def test_a_bias_on_the_scores_says_nothing_of_what_is_equal(self, bias):
        """A sigmoid's scores of about 0.7: 3e-6 apart, and 1e-3 apart."""
        config = parse_config({**DEEPSEEK_V2, **DEEPSEEK_V3}).layers[0].feed_forward
        biases = jnp.full(4, bias, jnp.float32)
        for logits, theirs, found in (([1.0, 0.99999], 1, 1), ([1.0, 0.995], 1, 0), ([1.0, 0.995], 0, 0)):
            shares = np.zeros((1, 4), np.float32)
            shares[0, theirs] = 1
            scores = jnp.asarray([[*logits, -3.0, -3.0]], jnp.float32)
            chosen, _ = _choose_experts(scores, biases, config, shares, 5e-4)
            assert np.asarray(chosen)[0].tolist() == [found]

    def test_ties_of_groups(self):
        """Two groups, of which the second's best is as good as the first's but for the last bits."""
        config = parse_config(DEEPSEEK_V2).layers[0].feed_forward
        logits = jnp.asarray([[1.0, 0.5, 1.0 - 1e-6, 0.4]], jnp.float32)
        for theirs, found in (([0], [0]), ([2], [2]), ([3], [0]), ([1], [0])):
            shares = np.zeros((1, 4), np.float32)
            shares[0, theirs] = 1
            chosen, _ = _choose_experts(logits, jnp.zeros(4), config, shares, 1e-4)
            assert np.asarray(chosen)[0].tolist() == found


QWEN3_MOE = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
DEEPSEEK_V2 = {
    **QWEN3_MOE,
    "model_type": "deepseek_v2",
    "intermediate_size": 8,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "q_lora_rank": 4, "n_group": 1, "first_k_dense_replace": 0}
