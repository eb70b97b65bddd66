"""The sizes of published models, and the tensors that transformers' own classes have at those sizes.

The configs are as the Hub gives them, also where they leave out what equals a default. Names and shapes come from
transformers' classes on the meta device, which takes no memory, and from its own way back to a checkpoint's names:
nothing here knows the families' tables.
"""

from __future__ import annotations

from typing import Any

from conversion_lib.core.tensors import TensorInfo


def _qwen25(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "rope_theta": 1000000.0,
        "use_sliding_window": False,
        "torch_dtype": "bfloat16",
    }


def _qwen3_moe(
    hidden: int, mlp: int, moe: int, layers: int, heads: int, kv_heads: int, experts: int = 128
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "moe_intermediate_size": moe,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "head_dim": 128,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "vocab_size": 151936,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _mixtral(hidden: int, mlp: int, layers: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def _gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
        "num_hidden_layers": layers,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "num_experts_per_tok": 4,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    }


def _gemma2(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": 256000,
        "torch_dtype": "float32",
    }


def _gemma3(hidden: int, mlp: int, layers: int, **other: int) -> dict[str, Any]:
    """The Hub's text_config have no more than what is not the class's default."""
    text = {
        "model_type": "gemma3_text",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
        **other,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    }
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "mm_tokens_per_image": 256,
        "text_config": text,
        "vision_config": vision,
        "torch_dtype": "bfloat16",
    }


def _olmo3(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": 100278,
        "tie_word_embeddings": False,
        "rope_theta": 500000,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
    }


def _llama32(hidden: int, layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": head_dim,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


GEMMA4_VISION = {
    "model_type": "gemma4_vision",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_hidden_layers": 27,
    "head_dim": 72,
    "global_head_dim": 72,
    "patch_size": 16,
    "position_embedding_size": 10240,
    "standardize": True,
}


def _gemma4(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, cycle: int, **other: Any) -> dict[str, Any]:
    text = {
        "model_type": "gemma4_text",
        "attention_k_eq_v": True,
        "enable_moe_block": False,
        "global_head_dim": 512,
        "head_dim": 256,
        "hidden_size": hidden,
        "hidden_size_per_layer_input": 0,
        "intermediate_size": mlp,
        "layer_types": [*["sliding_attention"] * (cycle - 1), "full_attention"] * (layers // cycle),
        "num_attention_heads": heads,
        "num_experts": None,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "num_kv_shared_layers": 0,
        "tie_word_embeddings": True,
        "top_k_experts": None,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        **other,
    }
    return {
        "architectures": ["Gemma4ForConditionalGeneration"],
        "model_type": "gemma4",
        "audio_config": None,
        "text_config": text,
        "vision_config": GEMMA4_VISION,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def _delta_nets(hidden: int, moe: int, layers: int, heads: int, experts: int, value_heads: int) -> dict[str, Any]:
    return {
        "full_attention_interval": 4,
        "head_dim": 256,
        "hidden_size": hidden,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": value_heads,
        "linear_value_head_dim": 128,
        "mlp_only_layers": [],
        "moe_intermediate_size": moe,
        "num_attention_heads": heads,
        "num_experts": experts,
        "num_experts_per_tok": 10,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "shared_expert_intermediate_size": moe,
    }


QWEN3_NEXT_80B = {
    "architectures": ["Qwen3NextForCausalLM"],
    "model_type": "qwen3_next",
    **_delta_nets(2048, 512, 48, 16, 512, 32),
    "decoder_sparse_step": 1,
    "intermediate_size": 5120,
    "tie_word_embeddings": False,
    "vocab_size": 151936,
}


def _qwen35(hidden: int, moe: int, layers: int, heads: int, experts: int, value_heads: int) -> dict[str, Any]:
    kinds = [*["linear_attention"] * 3, "full_attention"] * (layers // 4)
    text = {
        "model_type": "qwen3_5_moe_text",
        **_delta_nets(hidden, moe, layers, heads, experts, value_heads),
        "layer_types": kinds,
        "vocab_size": 248320,
        "mtp_num_hidden_layers": 1,
    }
    vision = {
        "model_type": "qwen3_5_moe",
        "depth": 27,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_heads": 16,
        "out_hidden_size": hidden,
        "patch_size": 16,
    }
    return {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"],
        "model_type": "qwen3_5_moe",
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": False,
    }


LLAMA33_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}

# by the catalogue's name: config, parameters of the text model (the embedding once where it is tied)
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "qwen2.5-1.5b": (_qwen25(1536, 8960, 28, 12, 2, 151936, True), 1_543_714_304),
    "qwen2.5-7b": (_qwen25(3584, 18944, 28, 28, 4, 152064, False), 7_615_616_512),
    "qwen2.5-14b": (_qwen25(5120, 13824, 48, 40, 8, 152064, False), 14_770_033_664),
    "qwen3-30b-a3b": (_qwen3_moe(2048, 6144, 768, 48, 32, 4), 30_532_122_624),
    "qwen3-235b-a22b": (_qwen3_moe(4096, 12288, 1536, 94, 64, 4), 235_093_634_560),
    "qwen3-480b-a35b": (_qwen3_moe(6144, 8192, 2560, 62, 96, 8, experts=160), 480_154_875_392),
    "mixtral-8x7b": (_mixtral(4096, 14336, 32, 32, 32000), 46_702_792_704),
    "mixtral-8x22b": (_mixtral(6144, 16384, 56, 48, 32768), 140_630_071_296),
    "gpt-oss-20b": (_gpt_oss(24, 32), 20_914_757_184),
    "gpt-oss-120b": (_gpt_oss(36, 128), 116_829_156_672),
    "gemma2-2b": (_gemma2(2304, 9216, 26, 8, 4, 256), 2_614_341_888),
    "gemma2-9b": (_gemma2(3584, 14336, 42, 16, 8, 256), 9_241_705_984),
    "gemma2-27b": (_gemma2(4608, 36864, 46, 32, 16, 128), 27_227_128_320),
    "gemma3-4b": (_gemma3(2560, 10240, 34), 3_880_263_168),
    "gemma3-12b": (_gemma3(3840, 15360, 48, num_attention_heads=16, num_key_value_heads=8), 11_766_034_176),
    "gemma3-27b": (
        _gemma3(5376, 21504, 62, num_attention_heads=32, num_key_value_heads=16, head_dim=128),
        27_009_346_304,
    ),
    "gemma4-26b": (
        _gemma4(
            *(2816, 2112, 30, 16, 8, 6),
            enable_moe_block=True,
            moe_intermediate_size=704,
            num_experts=128,
            num_global_key_value_heads=2,
            top_k_experts=8,
        ),
        25_233_141_790,
    ),
    "gemma4-31b": (_gemma4(5376, 21504, 60, 32, 16, 6, num_global_key_value_heads=4), 30_697_345_340),
    "gemma4-e2b": (
        _gemma4(
            *(1536, 6144, 35, 8, 1, 5),
            attention_k_eq_v=False,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=20,
            use_double_wide_mlp=True,
        ),
        4_628_569_379,
    ),
    "gemma4-e4b": (
        _gemma4(
            *(2560, 10240, 42, 8, 2, 6),
            attention_k_eq_v=False,
            hidden_size_per_layer_input=256,
            num_kv_shared_layers=18,
            use_double_wide_mlp=False,
        ),
        7_463_013_418,
    ),
    "qwen3-next-80b-a3b": (QWEN3_NEXT_80B, 79_674_391_296),
    "qwen3.5-35b-a3b": (_qwen35(2048, 512, 40, 16, 256, 32), 34_660_610_688),
    "qwen3.5-397b-a17b": (_qwen35(4096, 1024, 60, 32, 512, 64), 396_346_350_336),
    "llama3.2-1b": (_llama32(2048, 16, 32, 64), 1_235_814_400),
    "llama3.2-3b": (_llama32(3072, 28, 24, 128), 3_212_749_824),
    "llama3.3-70b": (LLAMA33_70B, 70_553_706_496),
    "olmo3-7b": (_olmo3(4096, 11008, 32, 32, 32), 7_298_011_136),
    "olmo3-32b": (_olmo3(5120, 27648, 64, 40, 8), 32_233_522_176),
}


# Published under the names that transformers' class has, not under those that it writes.
UNDER_THE_CLASSES_NAMES = ("qwen3_5_moe",)


def published_tensors(config: dict[str, Any]) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint of that config, as transformers' class writes it, in bfloat16."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    known = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(known, dtype=torch.bfloat16)
    stored = model.state_dict()
    if known.model_type not in UNDER_THE_CLASSES_NAMES:
        stored = revert_weight_conversion(model, stored)
    tied = known.tie_word_embeddings  # save_pretrained leaves the head out then
    return {
        name: TensorInfo(name, tuple(tensor.shape), "bfloat16", "shard")
        for name, tensor in stored.items()
        if not (tied and name.endswith("lm_head.weight"))
    }
