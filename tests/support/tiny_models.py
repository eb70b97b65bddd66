"""Small checkpoints with random weights, as transformers writes them, and what transformers computes from them.

The architectures are the real ones, with few layers and narrow ones. torch is imported only where it is used, so that
tests which need no model do not pay for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.tiny_sizes import GEMMA4_VISION, QWEN3_5_VISION, SIZES, VISION

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel


def make_tiny(
    family: str,
    destination: Path,
    *,
    layers: int | None = None,
    seed: int = 0,
    dtype: str = "bfloat16",
    single_shard: bool = False,
    own_names: bool | None = None,
    **config: Any,
) -> Path:
    """Writes a checkpoint of `family` with random weights to `destination`, which it returns.

    `config` takes any key of the family's config.json, such as `num_key_value_heads=1`, `vocab_size=509`,
    `tie_word_embeddings=False`, `n_routed_experts=24`, `q_lora_rank=None`, `first_k_dense_replace=0`. `dtype` is that
    of the weights; DeepSeek's router correction bias is float32 whatever the others are, as in the real checkpoints.
    `own_names`: whether under the names of transformers' class, not those that it writes; None: as published.
    """
    import torch

    sizes = SIZES[family] | ({} if layers is None else {"num_hidden_layers": layers}) | config
    model = _model(_config(family, sizes))
    _randomise(model, seed, around_zero=family in ("gemma2", "gemma3"))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(("e_score_correction_bias", "inv_freq")):
            tensor.data = tensor.data.to(getattr(torch, dtype))
    model.config.dtype = dtype
    own_names = family == "qwen3.5" if own_names is None else own_names
    shards = "5GB" if single_shard else "150KB"
    model.save_pretrained(destination, max_shard_size=shards, save_original_format=not own_names)
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


def _model(config: PretrainedConfig) -> PreTrainedModel:
    import torch
    import transformers

    classes = {
        "gemma3": transformers.Gemma3ForConditionalGeneration,
        "gemma4": transformers.Gemma4ForConditionalGeneration,
        "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
    }
    if with_towers := classes.get(config.model_type):
        return with_towers._from_config(config, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _config(family: str, sizes: dict[str, Any]) -> PretrainedConfig:
    import transformers

    if family == "gemma3":
        tokens = {"boi_token_index": 0, "eoi_token_index": 1, "image_token_index": 2}
        tied = sizes["tie_word_embeddings"]
        return transformers.Gemma3Config(
            text_config=sizes, vision_config=VISION, mm_tokens_per_image=4, tie_word_embeddings=tied, **tokens
        )
    if family == "qwen3.5":
        return transformers.Qwen3_5MoeConfig(text_config=sizes, vision_config=QWEN3_5_VISION)
    if family.startswith("gemma4"):
        return transformers.Gemma4Config(text_config=sizes, vision_config=GEMMA4_VISION, audio_config=None)
    classes = {
        "qwen2.5": transformers.Qwen2Config,
        "qwen3": transformers.Qwen3Config,
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "llama3.1": transformers.LlamaConfig,
        "mixtral": transformers.MixtralConfig,
        "gpt_oss": transformers.GptOssConfig,
        "gemma2": transformers.Gemma2Config,
        "qwen3_next": transformers.Qwen3NextConfig,
        "olmo3": transformers.Olmo3Config,
        "deepseek_v2": transformers.DeepseekV2Config,
        "deepseek_v3": transformers.DeepseekV3Config,
        "deepseek_v32": transformers.DeepseekV32Config,
    }
    return classes[family](**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _randomise(model: PreTrainedModel, seed: int, around_zero: bool) -> None:
    """Every tensor has a say in the logits: no norm is all ones, no bias zero, and scores are spread.

    around_zero: norms multiply by 1 + weight.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    biases = [(name, tensor) for name, tensor in model.named_buffers() if name.endswith("e_score_correction_bias")]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *biases]:
            tensor.copy_(_random(name, tensor, generator, around_zero))


def _random(name: str, tensor: torch.Tensor, generator: torch.Generator, around_zero: bool) -> torch.Tensor:
    import torch

    values = torch.randn(tensor.shape, generator=generator)
    if name.endswith("bias"):
        return 0.1 * values  # the router's scores lie about 0.2 apart: enough to send tokens to other experts
    if name.endswith("sinks"):
        return values
    if tensor.ndim == 1:
        return 0.2 * values if around_zero else 1 + 0.2 * values  # norms
    if "embed_tokens" in name:
        return 0.2 * values  # where it is also the head, logits of about two
    return values / tensor.shape[-1] ** 0.5  # keeps activations near one, whatever the width
