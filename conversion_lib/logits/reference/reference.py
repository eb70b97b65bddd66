"""Reference logits: the original weights, run by transformers in float32 with eager attention.

The model's code is transformers' own; its weights are fetched as it runs (`streaming.py`), so that memory does not
grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.core.tensors import Array, Source
from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.verdict import blocks
from conversion_lib.models import transformers_library
from conversion_lib.models.hf_config import ModelConfig, load_config
from conversion_lib.models.transformers_library import MODEL_TYPES, quiet
from conversion_lib.progress import Task
from conversion_lib.sources.quantization import dequantized
from conversion_lib.sources.safetensors import SafetensorsSource

MASKS_WITHOUT_POSITIONS = {"gpt_oss"}
"""Text models that do not see by positions that start anew where a prompt begins, by `model_type`: their masks are made
for them."""

BLOCKS = {
    "input_layernorm": blocks.NORM_BEFORE_ATTENTION,
    "self_attn": blocks.ATTENTION,
    "self_attn.indexer": blocks.INDEXER,
    "linear_attn": blocks.ATTENTION,
    "pre_feedforward_layernorm": blocks.NORM_BEFORE_MLP,
    "mlp.shared_experts": blocks.SHARED_EXPERT,
    "mlp.shared_expert": blocks.SHARED_EXPERT,
    "mlp": blocks.MLP,
    "pre_feedforward_layernorm_2": blocks.NORM_BEFORE_EXPERTS,
    "post_feedforward_layernorm_1": blocks.NORM_AFTER_SHARED_EXPERT,
    "post_feedforward_layernorm_2": blocks.NORM_AFTER_EXPERTS,
    "post_feedforward_layernorm": blocks.NORM_AFTER_MLP,
    "per_layer_projection": blocks.PER_LAYER_INPUT,
    "post_per_layer_input_norm": blocks.NORM_AFTER_PER_LAYER_INPUT,
}
"""What a layer's modules are called in transformers' models, and which block each is."""

FACTOR_DTYPES = {"gemma3_text": "bfloat16"}
"""The dtype that the embedding's factor, sqrt(hidden), is rounded to, by the `model_type` of the text model, where the
original has it in another one than float32: transformers takes that of the weights, which here are float32."""

LayerObserver = Callable[[int, blocks.States], None]


@dataclass(frozen=True)
class Reference:
    """What a checkpoint is compared with.

    config: the contents of config.json; prompts: int32 (tokens,) each; logits: float32 (tokens, vocabulary) for each
    prompt; origin: what a person wants to know of where it came from; dtype: that of the original's weights.
    """

    config: dict[str, Any]
    prompts: list[Array]
    logits: list[Array]
    origin: dict[str, str] = field(default_factory=dict)
    dtype: str = ""


def open_reference(directory: Path) -> Source:
    """The weights in `directory`, dequantized by us where they are quantized: transformers infers the blocks of fp8
    scales from shapes, which is wrong where a block is cut off at an edge."""
    return dequantized(SafetensorsSource(directory), load_config(directory))


def dtype_of(source: Source) -> str:
    """The dtype that most of a checkpoint's bytes have."""
    sizes: dict[str, int] = {}
    for info in source.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def require_libraries() -> None:
    """Raises BadInput where torch or transformers is missing."""
    transformers_library.require_libraries("reference logits need")


def transformers_reference(
    directory: Path,
    prompts: Sequence[Array],
    *,
    memory: Memory | None = None,
    observe: LayerObserver | None = None,
    task: Task | None = None,
) -> Reference:
    """Runs the model in `directory` (config.json and safetensors) on `prompts`.

    observe: called with the number of each layer and what its blocks put out, the embedding first, as soon as the
    layer is done.

    Raises BadInput where torch or transformers is missing, or the directory is not a whole model.
    """
    require_libraries()
    import torch
    import transformers

    from conversion_lib.logits.reference.streaming import (
        attention_in_blocks,
        indexers_in_blocks,
        one_prompt_at_a_time,
        token_by_token,
    )

    config, source, memory = load_config(directory), open_reference(directory), memory or Memory()
    with quiet(), torch.no_grad():
        model, watch = _model(config, source, memory, task)
        packing = _Packing(model.config, prompts)
        one_prompt_at_a_time(model, packing.lengths)
        indexers_in_blocks(model, memory.score_bytes)
        if observe is not None:
            watch.start(model, packing, observe)
        with attention_in_blocks(model, memory.score_bytes), token_by_token(model):
            logits = model(**packing.inputs(), use_cache=False).logits
    origin = {
        "reference": str(directory),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "commit": str(config.raw.get("_commit_hash") or ""),
    }
    kept = {key: text for key, text in origin.items() if text}
    return Reference(config.raw, list(prompts), packing.split(logits), kept, dtype_of(source))


def full_config(raw: dict[str, Any]) -> dict[str, Any]:
    """A config.json with the defaults of transformers' class. Raises BadInput where there is none, or it refuses it."""
    return dict(_settings(raw).to_dict())


def _settings(raw: dict[str, Any]) -> Any:
    """transformers' object of a config.json."""
    require_libraries()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    known = {key: value for key, value in raw.items() if key != "quantization_config"}
    given = str(raw.get("model_type"))
    kind = MODEL_TYPES.get(given, given)
    if kind not in CONFIG_MAPPING:
        raise BadInput(f"config.json: transformers has no model_type {given!r}")
    try:
        return CONFIG_MAPPING[kind].from_dict(known | {"model_type": kind})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _no_model(error) from error


def _no_model(error: Exception) -> BadInput:
    first_line = " ".join(str(error).split()) or type(error).__name__
    return BadInput(f"config.json: transformers makes no model of it: {first_line}")


def _model(config: ModelConfig, source: Source, memory: Memory, task: Task | None) -> tuple[Any, _Watch]:
    """transformers' model for a config, without weights of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    from conversion_lib.logits.reference.fetching import Fetcher
    from conversion_lib.logits.reference.streaming import stream_weights

    settings = _settings(config.raw).get_text_config()
    _require_a_key_for_each_head(settings)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise _no_model(error) from error
    base = model.base_model_prefix
    tied = {"lm_head.weight": f"{base}.embed_tokens.weight"} if settings.tie_word_embeddings else {}
    watch = _Watch()
    stream_weights(model, Fetcher(source, base, tied, task), memory.slice_bytes, watch.experts)
    if (dtype := FACTOR_DTYPES.get(settings.model_type)) is not None:
        factor = model.base_model.embed_tokens.embed_scale
        factor.copy_(factor.to(getattr(torch, dtype)))
    return model, watch


def _require_a_key_for_each_head(settings: Any) -> None:
    """Raises BadInput where latent attention is said to share keys: transformers then repeats what is there already.

    Settings of other families are not asked: Gemma 4's refuse to name one number of keys for all layers.
    """
    if not getattr(settings, "kv_lora_rank", None):
        return
    heads, keys = settings.num_attention_heads, settings.num_key_value_heads
    if keys != heads:
        raise BadInput(
            f"config.json: num_key_value_heads is {keys}, expected {heads}, as num_attention_heads: latent attention "
            "has a key for each head, and transformers fails with any other number; write it into the config"
        )


class _Packing:
    """Prompts one after the other in a single sequence, positions starting anew, which transformers takes as sequences
    that do not see each other."""

    def __init__(self, settings: Any, prompts: Sequence[Array]) -> None:
        self._settings = settings
        self._ids = np.concatenate(list(prompts))
        self.lengths = [len(prompt) for prompt in prompts]

    def inputs(self) -> dict[str, Any]:
        import torch

        positions = torch.from_numpy(np.concatenate([np.arange(length) for length in self.lengths])[None])
        inputs: dict[str, Any] = {
            "input_ids": torch.from_numpy(self._ids.astype(np.int64)[None]),
            "position_ids": positions,
        }
        if self._settings.model_type in MASKS_WITHOUT_POSITIONS:
            inputs["attention_mask"] = self._masks(positions)
        return inputs

    def _masks(self, positions: Any) -> dict[str, Any]:
        """transformers' own masks for both kinds of layer."""
        import torch
        from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

        known = {
            "config": self._settings,
            "inputs_embeds": torch.empty((*positions.shape, 1)),
            "attention_mask": None,
            "past_key_values": None,
            "position_ids": positions,
        }
        return {
            "full_attention": create_causal_mask(**known),
            "sliding_attention": create_sliding_window_causal_mask(**known),
        }

    def tokens(self, states: Any) -> Array:
        """Float32 (all prompts' tokens, width) of a tensor with the batch's tokens on its leading axes."""
        array: Array = states.reshape(-1, states.shape[-1]).float().numpy()
        return array

    def split(self, states: Any) -> list[Array]:
        return np.split(self.tokens(states), np.cumsum(self.lengths)[:-1])


class _Watch:
    """Hands on what the blocks of each layer put out, when the layer is done."""

    def __init__(self) -> None:
        self._packing: _Packing | None = None
        self._states: dict[str, Array] = {}

    def start(self, model: Any, packing: _Packing, observe: LayerObserver) -> None:
        self._packing = packing

        def hand_on(number: int, block: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                self._keep(block, output)
                states, self._states = self._states, {}
                observe(number, states)

            return hook

        def keep(block: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: self._keep(block, output)

        base = model.base_model
        base.embed_tokens.register_forward_hook(hand_on(blocks.EMBEDDING_LAYER, blocks.EMBEDDING))
        for number, layer in enumerate(base.layers):
            modules = dict(layer.named_modules())
            # with a norm before the MLP of its own, or none before attention, this one is on what attention puts out
            after = "pre_feedforward_layernorm" in modules or "input_layernorm" not in modules
            second = blocks.NORM_AFTER_ATTENTION if after else blocks.NORM_BEFORE_MLP
            names = {**BLOCKS, "post_attention_layernorm": second}
            if "experts" in modules:  # beside the MLP, which every token goes to
                names["mlp"] = blocks.SHARED_EXPERT
            for name, block in names.items():
                if name in modules:
                    modules[name].register_forward_hook(keep(block))
            layer.register_forward_hook(hand_on(number, blocks.STREAM))

    def experts(self, shares: Any, out: Any) -> None:
        if self._packing is not None:
            self._keep(blocks.ROUTER, shares)
            self._keep(blocks.EXPERTS, out)

    def _keep(self, block: str, output: Any) -> None:
        assert self._packing is not None
        states = output[0] if isinstance(output, tuple) else output
        self._states[block] = self._packing.tokens(states).copy()
