"""Small checkpoints with random weights, as transformers writes them, and what transformers computes from them.

The architectures are the real ones, with few layers and narrow ones. torch is imported only where it is used, so that
tests which need no model do not pay for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

FAMILIES = ("qwen3", "llama3.1", "deepseek_v2", "deepseek_v3", "deepseek_v32")

# No two sizes of one model are alike, so that swapped axes show; layers are more than one and unlike the experts.
DENSE = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
}
LATENT = {
    "vocab_size": 500,
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 44,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 10240,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 256,  # fewer than a long prompt has tokens
}
GROUPED_ROUTER = {
    "q_lora_rank": 52,
    "n_routed_experts": 20,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0},
}
INDEXER = {"index_n_heads": 12, "index_head_dim": 24, "index_topk": 8}

# The head dimension 32 makes Llama's query scale 1/sqrt(32) inexact in bfloat16, as the real 1/sqrt(128) is.
SIZES: dict[str, dict[str, Any]] = {
    "qwen3": DENSE
    | {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "llama3.1": DENSE
    | {
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "deepseek_v2": LATENT
    | {
        "q_lora_rank": None,
        "n_routed_experts": 10,
        "num_experts_per_tok": 3,
        "n_shared_experts": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "rope_parameters": YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "deepseek_v3": LATENT | GROUPED_ROUTER,
    "deepseek_v32": LATENT | GROUPED_ROUTER | INDEXER,
}


def make_tiny(
    family: str,
    destination: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    single_shard: bool = False,
    **config: Any,
) -> Path:
    """Writes a checkpoint of `family` with random weights to `destination`, which it returns.

    `config` takes any key of the family's config.json, such as `num_key_value_heads=1`, `vocab_size=509`,
    `tie_word_embeddings=False`, `n_routed_experts=24`, `q_lora_rank=None`, `first_k_dense_replace=0`. `dtype` is that
    of the weights; DeepSeek's router correction bias is float32 whatever the others are, as in the real checkpoints.
    """
    import torch
    from transformers import AutoModelForCausalLM

    sizes = SIZES[family] | ({} if layers is None else {"num_hidden_layers": layers}) | config
    model = AutoModelForCausalLM.from_config(_config(family, sizes), dtype=torch.float32)
    _randomise(model, seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(("e_score_correction_bias", "inv_freq")):
            tensor.data = tensor.data.to(getattr(torch, dtype))
    model.config.dtype = dtype
    model.save_pretrained(destination, max_shard_size="5GB" if single_shard else "150KB")
    return destination


def reference_logits(path: Path, tokens: np.ndarray) -> np.ndarray:
    """What transformers computes from the checkpoint at `path` for one prompt, in float32: (tokens, vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor(tokens[None].astype(np.int64)), use_cache=False).logits[0]
    return logits.float().numpy()


def prompt(length: int, vocabulary: int, seed: int = 1234) -> np.ndarray:
    """`length` random token ids, int32."""
    return np.random.default_rng(seed).integers(3, vocabulary, length).astype(np.int32)


def _config(family: str, sizes: dict[str, Any]) -> PretrainedConfig:
    import transformers

    classes = {
        "qwen3": transformers.Qwen3Config,
        "llama3.1": transformers.LlamaConfig,
        "deepseek_v2": transformers.DeepseekV2Config,
        "deepseek_v3": transformers.DeepseekV3Config,
        "deepseek_v32": transformers.DeepseekV32Config,
    }
    return classes[family](**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _randomise(model: PreTrainedModel, seed: int) -> None:
    """Every tensor has a say in the logits: no norm is all ones, no bias zero, and scores are spread."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    biases = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            tensor.copy_(_random(name, tensor, generator))


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    import torch

    values = torch.randn(tensor.shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * values  # the router's scores lie about 0.2 apart: enough to send tokens to other experts
    if tensor.ndim == 1:
        return 1 + 0.2 * values  # norms
    if "embed_tokens" in name:
        return 0.2 * values  # where it is also the head, logits of about two
    return values / tensor.shape[-1] ** 0.5  # keeps activations near one, whatever the width
