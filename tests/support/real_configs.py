"""The sizes of published models, as their config.json on the Hub gives them, and their parameter counts."""

from __future__ import annotations

from typing import Any

from tests.support.sparse_checkpoints import DEEPSEEK_V3_CONFIG


def _qwen3(hidden: int, mlp: int, layers: int, heads: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
    }


def _llama(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    """As on the Hub: neither head_dim nor tie_word_embeddings is always there."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
    }


DEEPSEEK_V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 102400,
    "tie_word_embeddings": False,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

DEEPSEEK_V32_CONFIG = {
    **DEEPSEEK_V3_CONFIG,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
}

KIMI_K2_CONFIG = {
    **DEEPSEEK_V3_CONFIG,
    "model_type": "kimi_k2",
    "first_k_dense_replace": 1,
    "n_group": 1,
    "n_routed_experts": 384,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "num_nextn_predict_layers": 0,
    "routed_scaling_factor": 2.827,
    "topk_group": 1,
    "vocab_size": 163840,
}

# by MaxText's name: config, parameters (the embedding once where it is tied; without multi-token prediction)
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "qwen3-0.6b": (_qwen3(1024, 3072, 28, 16, True), 596_049_920),
    "qwen3-1.7b": (_qwen3(2048, 6144, 28, 16, True), 1_720_574_976),
    "qwen3-4b": (_qwen3(2560, 9728, 36, 32, True), 4_022_468_096),
    "qwen3-8b": (_qwen3(4096, 12288, 36, 32, False), 8_190_735_360),
    "qwen3-14b": (_qwen3(5120, 17408, 40, 40, False), 14_768_307_200),
    "qwen3-32b": (_qwen3(5120, 25600, 64, 64, False), 32_762_123_264),
    "llama3.1-8b": (_llama(4096, 14336, 32, 32), 8_030_261_248),
    "llama3.1-70b": (_llama(8192, 28672, 80, 64), 70_553_706_496),
    "llama3.1-405b": (_llama(16384, 53248, 126, 128), 405_853_388_800),
    "deepseek2-16b": (DEEPSEEK_V2_LITE, 15_706_484_224),
    "deepseek3-671b": (DEEPSEEK_V3_CONFIG, 671_026_419_200),
    "deepseek3.2-671b": (DEEPSEEK_V32_CONFIG, 671_877_944_064),
    "kimi-k2-1t": (KIMI_K2_CONFIG, 1_026_408_232_448),
}

SAME_SIZES = {"deepseek3.1-671b": "deepseek3-671b", "kimi-k2-thinking-1t": "kimi-k2-1t"}
"""Models of the catalogue that differ from another in what they were trained on and how they are quantized alone."""
