"""What converters get wrong, planted: each changes the unscanned or scanned leaves of a right checkpoint."""

from __future__ import annotations

import numpy as np

from conversion_lib.logits.verdict import blocks
from tests.support.maxtext_by_hand import BF16, to_pairs

ATTENTION, ROUTED = "self_attention", "DeepSeekMoeBlock_0/MoeBlock_0"


def swap(leaves, a, b):
    leaves[a], leaves[b] = leaves[b], leaves[a]


def transposed_kernel(leaves):
    name = f"decoder/layers_2/{ATTENTION}/value/kernel"
    leaves[name] = leaves[name].reshape(64, 64).T.reshape(leaves[name].shape)


def swapped_gate_and_up(leaves):
    swap(leaves, "decoder/layers_1/mlp/wi_0/kernel", "decoder/layers_1/mlp/wi_1/kernel")


def swapped_layers(leaves):
    for name in [name for name in leaves if name.startswith("decoder/layers_1/")]:
        swap(leaves, name, name.replace("layers_1/", "layers_2/"))


def halves_for_pairs(leaves):
    for kind in ("query", "key"):
        name = f"decoder/layers_3/{ATTENTION}/{kind}/kernel"
        array = leaves[name]
        leaves[name] = np.concatenate([array[..., 0::2], array[..., 1::2]], axis=-1)


def pairs_twice(leaves):
    for kind in ("query", "key"):
        name = f"decoder/layers_0/{ATTENTION}/{kind}/kernel"
        leaves[name] = to_pairs(leaves[name])


def missing_norm(leaves):
    leaves["decoder/layers_1/post_self_attention_layer_norm/scale"] = np.ones(64, np.float32)


def unscaled_query(leaves):
    leaves[f"decoder/layers_0/{ATTENTION}/query/kernel"] *= np.float32(32**0.5)


def heads_in_another_order(leaves):
    name = f"decoder/layers_2/{ATTENTION}/out/kernel"
    leaves[name] = leaves[name][::-1]


def shifted_embedding(leaves):
    leaves["token_embedder/embedding"] = np.roll(leaves["token_embedder/embedding"], 1, axis=0)


def final_norm(leaves):
    leaves["decoder/decoder_norm/scale"] = np.ones(64, np.float32)


def not_a_number(leaves):
    leaves["decoder/layers_2/mlp/wo/kernel"][0, 0] = np.nan


def noise_of_a_percent(leaves):
    name = "decoder/layers_2/mlp/wi_1/kernel"
    noise = 1 + 0.01 * np.random.default_rng(0).standard_normal(leaves[name].shape)
    leaves[name] = (leaves[name] * noise).astype(BF16).astype(leaves[name].dtype)


def a_layer_off_by_one(leaves):
    for name in sorted(name for name in leaves if name.startswith("decoder/layers_")):
        number = int(name.split("/")[1].removeprefix("layers_"))
        if number:
            leaves[name.replace(f"layers_{number}/", f"layers_{number - 1}/")] = leaves[name]


LLAMA_MISTAKES = [
    (transposed_kernel, 2, blocks.ATTENTION),
    (swapped_gate_and_up, 1, blocks.MLP),
    (swapped_layers, 1, blocks.NORM_BEFORE_ATTENTION),
    (a_layer_off_by_one, 0, blocks.NORM_BEFORE_ATTENTION),
    (halves_for_pairs, 3, blocks.ATTENTION),
    (pairs_twice, 0, blocks.ATTENTION),
    (missing_norm, 1, blocks.NORM_BEFORE_MLP),
    (unscaled_query, 0, blocks.ATTENTION),
    (heads_in_another_order, 2, blocks.ATTENTION),
    (noise_of_a_percent, 2, blocks.MLP),
    (shifted_embedding, -1, blocks.EMBEDDING),
    (final_norm, None, None),
]


def zeroed_gate_bias(leaves):
    leaves[f"decoder/moe_layers/{ROUTED}/gate/bias"][1] = 0


def swapped_experts(leaves):
    array = leaves[f"decoder/moe_layers/{ROUTED}/wo"]
    array[[2, 3], 2] = array[[3, 2], 2]


def latent_norm(leaves):
    leaves[f"decoder/moe_layers/{ATTENTION}/kv_norm/scale"][:, 0] = 1


def routed_for_shared(leaves):
    shared, routed = leaves["decoder/moe_layers/DeepSeekMoeBlock_0/shared_experts/wi_0/kernel"], f"{ROUTED}/wi_0"
    shared[:, 1] = leaves[f"decoder/moe_layers/{routed}"][0, 1]


DEEPSEEK_MISTAKES = [
    (zeroed_gate_bias, 2, blocks.ROUTER),
    (swapped_experts, 3, blocks.EXPERTS),
    (latent_norm, 1, blocks.ATTENTION),
    (routed_for_shared, 2, blocks.SHARED_EXPERT),
]
