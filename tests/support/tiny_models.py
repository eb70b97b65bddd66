"""Small checkpoints with random weights, as transformers writes them, and what transformers computes from them.

The architectures are the real ones, with few layers and narrow ones. torch is imported only where it is used, so that
tests which need no model do not pay for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.support.family import Description, descriptions

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

    described = descriptions()[family]
    sizes = described.tiny | ({} if layers is None else {"num_hidden_layers": layers}) | config
    model = _model(described, tiny_config(described, sizes))
    _randomise(model, seed, around_zero=described.norms_from_zero)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not name.endswith(("e_score_correction_bias", "inv_freq")):
            tensor.data = tensor.data.to(getattr(torch, dtype))
    model.config.dtype = dtype
    own_names = described.own_names if own_names is None else own_names
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


def tiny_config(described: Description, sizes: dict[str, Any] | None = None) -> PretrainedConfig:
    """The config of a family's small model; `sizes`: others than its own."""
    import transformers

    sizes = described.tiny if sizes is None else sizes
    config_class = getattr(transformers, described.config_class)
    if described.towers:
        return config_class(text_config=sizes, **described.towers.beside)
    return config_class(**sizes, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _model(described: Description, config: PretrainedConfig) -> PreTrainedModel:
    import torch
    import transformers

    if described.towers:
        return getattr(transformers, described.towers.model)._from_config(config, dtype=torch.float32)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


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
