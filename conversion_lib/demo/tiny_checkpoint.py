"""A small checkpoint of DeepSeek-V3's architecture, stored like the real one.

It has what the real one has: latent attention (MLA) with compressed queries, a dense layer before the expert layers,
grouped routing with a correction bias, a shared expert, YaRN, a multi-token-prediction (MTP) layer after the last
decoder layer, fp8 weights with a float32 scale for each block of 128 × 128, and several shards. The weights are random
and the sizes small. Some sizes are not multiples of a block, so that rows, columns or both have a partial block at the
end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

Array = np.ndarray[Any, Any]

BLOCK = 128
FP8_MAX = 448.0
"""The largest finite float8_e4m3fn."""
SHARD_BYTES = 3 << 20

CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 320,
    "kv_lora_rank": 128,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 160,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 192,
    "qk_nope_head_dim": 80,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "v_head_dim": 96,
    "vocab_size": 512,
}
"""config.json with the keys of the published one."""

GENERATION_CONFIG = {
    "_from_model_config": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.95,
    "transformers_version": "4.33.1",
}

SENTENCES = [
    "The ferry leaves the northern shore at seven and reaches the southern shore before the tide turns.",
    "A checkpoint is a large cargo: it is loaded once, counted twice, and unloaded where it is needed.",
    "Nobody sees half a cargo; either the whole of it lies on the quay, or nothing does.",
    "The crew reads the manifest first, and what the manifest does not name stays on the shore.",
    "In fog the captain sounds the horn, waits, and tries the crossing again a little later.",
    "Numbers such as 1, 12, 128 and 4096 are written in chalk on every crate.",
    "El transbordador cruza el río por la mañana. Die Fähre fährt am Abend zurück. 渡し船は夜に戻る。",
    "def cross(shore):\n    return 'south' if shore == 'north' else 'north'\n",
]
"""What the tokenizer is trained on."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tiny_deepseek_v3(destination: Path, *, seed: int = 0) -> Path:
    """Writes the checkpoint, about 12 MB in four shards.

    Needs the `tokenizers` package, which transformers installs.

    Args:
        destination: The directory to write; created if missing.
        seed: The same seed gives the same files, byte for byte.

    Returns:
        `destination`.
    """
    destination.mkdir(parents=True, exist_ok=True)
    _write_json(destination / "config.json", CONFIG)
    _write_json(destination / "generation_config.json", GENERATION_CONFIG)
    _write_tokenizer(destination)
    _write_shards(destination, _stored_tensors(np.random.default_rng(seed)))
    return destination


def quantize_block_fp8(weight: Array, block: int = BLOCK) -> tuple[Array, Array]:
    """Quantizes a weight to fp8 with one scale for each block, as DeepSeek-V3 is published.

    The largest absolute value of a block maps to 448, the largest float8_e4m3fn. A block of zeros gets the scale 1.

    Args:
        weight: float32 (rows, columns).
        block: Rows and columns of a block.

    Returns:
        The values, float8_e4m3fn (rows, columns), and the inverse scales, float32 (ceil(rows / block),
        ceil(columns / block)): `values[i, j] * scales[i // block, j // block]` restores the weight.
    """
    rows, columns = weight.shape
    edges = (-rows % block, -columns % block)
    padded = np.pad(weight.astype(np.float32), ((0, edges[0]), (0, edges[1])))
    blocks = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block)
    largest = np.abs(blocks).max(axis=(1, 3))
    scales = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1)).astype(np.float32)
    # the division may round to slightly above 448, which float8_e4m3fn would turn into NaN
    scaled = np.clip(blocks / scales[:, None, :, None], -FP8_MAX, FP8_MAX)
    values = scaled.reshape(padded.shape)[:rows, :columns].astype(ml_dtypes.float8_e4m3fn)
    return np.ascontiguousarray(values), scales


def _stored_tensors(rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """Every tensor as stored on disk, in the order of the layers."""
    for name, weight in _weights(rng):
        if _is_quantized(name):
            values, scales = quantize_block_fp8(weight)
            yield name, values
            yield f"{name}_scale_inv", scales
        elif name.endswith("e_score_correction_bias"):
            yield name, weight
        else:
            yield name, weight.astype(ml_dtypes.bfloat16)


def _is_quantized(name: str) -> bool:
    """Linear layers are quantized, except the router, the two heads and the MTP layer's input projection."""
    plain = ("embed_tokens.", "lm_head.", "head.weight", "norm.", "mlp.gate.", "eh_proj.")
    return not any(word in name for word in plain)


def _weights(rng: np.random.Generator) -> Iterator[tuple[str, Array]]:
    """Every weight in float32, under the names of the real checkpoint."""
    hidden, vocab, layers = CONFIG["hidden_size"], CONFIG["vocab_size"], CONFIG["num_hidden_layers"]
    yield "model.embed_tokens.weight", _linear(rng, vocab, hidden)
    for layer in range(layers):
        yield from _decoder_layer(rng, layer)
    yield "model.norm.weight", _norm(rng, hidden)
    yield "lm_head.weight", _linear(rng, vocab, hidden)
    mtp = f"model.layers.{layers}."
    yield f"{mtp}embed_tokens.weight", _linear(rng, vocab, hidden)
    yield f"{mtp}enorm.weight", _norm(rng, hidden)
    yield f"{mtp}hnorm.weight", _norm(rng, hidden)
    yield f"{mtp}eh_proj.weight", _linear(rng, hidden, 2 * hidden)
    yield from _decoder_layer(rng, layers)
    yield f"{mtp}shared_head.norm.weight", _norm(rng, hidden)
    yield f"{mtp}shared_head.head.weight", _linear(rng, vocab, hidden)


def _decoder_layer(rng: np.random.Generator, layer: int) -> Iterator[tuple[str, Array]]:
    hidden, experts = CONFIG["hidden_size"], CONFIG["n_routed_experts"]
    heads, nope, rope = (CONFIG[key] for key in ("num_attention_heads", "qk_nope_head_dim", "qk_rope_head_dim"))
    q_rank, kv_rank, value = (CONFIG[key] for key in ("q_lora_rank", "kv_lora_rank", "v_head_dim"))
    name = f"model.layers.{layer}."
    yield f"{name}input_layernorm.weight", _norm(rng, hidden)
    attention = f"{name}self_attn."
    yield f"{attention}q_a_proj.weight", _linear(rng, q_rank, hidden)
    yield f"{attention}q_a_layernorm.weight", _norm(rng, q_rank)
    yield f"{attention}q_b_proj.weight", _linear(rng, heads * (nope + rope), q_rank)
    yield f"{attention}kv_a_proj_with_mqa.weight", _linear(rng, kv_rank + rope, hidden)
    yield f"{attention}kv_a_layernorm.weight", _norm(rng, kv_rank)
    yield f"{attention}kv_b_proj.weight", _linear(rng, heads * (nope + value), kv_rank)
    yield f"{attention}o_proj.weight", _linear(rng, hidden, heads * value)
    yield f"{name}post_attention_layernorm.weight", _norm(rng, hidden)
    if layer < CONFIG["first_k_dense_replace"]:
        yield from _mlp(rng, f"{name}mlp.", CONFIG["intermediate_size"])
        return
    yield f"{name}mlp.gate.weight", _linear(rng, experts, hidden)
    bias = 0.1 * rng.standard_normal(experts, dtype=np.float32)
    yield f"{name}mlp.gate.e_score_correction_bias", bias.astype(np.float32)
    for expert in range(experts):
        yield from _mlp(rng, f"{name}mlp.experts.{expert}.", CONFIG["moe_intermediate_size"])
    shared = CONFIG["moe_intermediate_size"] * CONFIG["n_shared_experts"]
    yield from _mlp(rng, f"{name}mlp.shared_experts.", shared)


def _mlp(rng: np.random.Generator, name: str, width: int) -> Iterator[tuple[str, Array]]:
    hidden = CONFIG["hidden_size"]
    yield f"{name}gate_proj.weight", _linear(rng, width, hidden)
    yield f"{name}up_proj.weight", _linear(rng, width, hidden)
    yield f"{name}down_proj.weight", _linear(rng, hidden, width)


def _linear(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))


def _norm(rng: np.random.Generator, size: int) -> Array:
    return np.float32(1) + np.float32(0.2) * rng.standard_normal(size, dtype=np.float32)


def _write_shards(destination: Path, tensors: Iterator[tuple[str, Array]]) -> None:
    """Fills shards up to SHARD_BYTES in the given order. A weight's scales may be in the next shard."""
    shards: list[dict[str, Array]] = [{}]
    filled = 0
    for name, array in tensors:
        if filled and filled + array.nbytes > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = array
        filled += array.nbytes
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_safetensors(destination / file, shard)
        weight_map |= dict.fromkeys(shard, file)
        total += sum(array.nbytes for array in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(destination / "model.safetensors.index.json", index)


def _write_safetensors(path: Path, tensors: dict[str, Array]) -> None:
    specs = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=list(array.shape), data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in tensors.items()
    }
    safetensors.serialize_file(specs, path, {"format": "pt"})


def _write_tokenizer(destination: Path) -> None:
    """A byte-level BPE tokenizer, special tokens first, with at most `vocab_size` entries."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<|begin_of_sentence|>", "<|end_of_sentence|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], 0)]
    )
    tokenizer.save(str(destination / "tokenizer.json"))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": special[0],
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": special[1],
        "model_max_length": CONFIG["max_position_embeddings"],
        "pad_token": special[4],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    _write_json(destination / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
