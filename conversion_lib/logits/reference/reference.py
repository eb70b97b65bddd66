"""Reference logits: the original weights, run by transformers in float32 with eager attention.

The model's code is transformers' own. Its weights are fetched while it runs (`streaming.py`), so that memory does not
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
from conversion_lib.models.hf_config import DTYPE_KEYS, ModelConfig, load_config
from conversion_lib.models.transformers_library import MODEL_TYPES, quiet
from conversion_lib.progress import Task
from conversion_lib.sources.heads import own_head, untied
from conversion_lib.sources.quantization import dequantized
from conversion_lib.sources.renamed import plainly_named
from conversion_lib.sources.safetensors import SafetensorsSource

MASKS_WITHOUT_POSITIONS = {"gpt_oss"}
"""`model_type` of text models that ignore where positions restart at 0: the mask is made for them."""

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
"""Names of a layer's modules in transformers' models, and the block that each one is."""

FACTOR_DTYPES = {"gemma3_text": "bfloat16"}
"""Dtype that the embedding's factor, sqrt(hidden), is rounded to, by `model_type` of the text model. transformers takes
the dtype of the weights, and here these are float32 even where the original's are not."""

NOT_FOR_THE_REFERENCE = ("quantization_config", *DTYPE_KEYS)
"""Keys of config.json: weights are dequantized by us, and everything runs in float32."""

LayerObserver = Callable[[int, blocks.States], None]
"""Called with the number of a layer and the outputs of its blocks."""


@dataclass(frozen=True)
class Reference:
    """The logits that a checkpoint is compared with.

    Attributes:
        config: The contents of config.json.
        prompts: Token ids, int32 (tokens,) each.
        logits: float32 (tokens, vocabulary) for each prompt.
        origin: Where the logits come from, as text for display.
        dtype: Dtype of most of the original's weights, such as `bfloat16`. Empty: unknown.
    """

    config: dict[str, Any]
    prompts: list[Array]
    logits: list[Array]
    origin: dict[str, str] = field(default_factory=dict)
    dtype: str = ""


def open_reference(directory: Path) -> Source:
    """Opens the weights in `directory` under their model's names, dequantized if they are quantized.

    Ferry dequantizes them itself: transformers infers the block size of fp8 scales from shapes, which is wrong where
    the last block is not full.

    Raises:
        BadInput: There are no safetensors, config.json is wrong, or the quantization is not supported.
    """
    # a conversion refuses an untied model without an embedding
    return dequantized(plainly_named(SafetensorsSource(directory), tied=True), load_config(directory))


def reference_config(directory: Path) -> ModelConfig:
    """Returns the config.json in `directory`; not tied if the head has other values, as in transformers.

    Raises:
        BadInput: As for `open_reference`, or transformers refuses the config.
    """
    config = load_config(directory)
    tied = _settings(config).get_text_config().tie_word_embeddings
    return untied(config) if tied and own_head(open_reference(directory)) is not None else config


def dtype_of(source: Source) -> str:
    """Returns the dtype of most of a checkpoint's bytes, such as `bfloat16`."""
    sizes: dict[str, int] = {}
    for info in source.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype])


def require_libraries() -> None:
    """Checks that torch and transformers are installed.

    Raises:
        BadInput: One of them is missing; the message says how to install it.
    """
    transformers_library.require_libraries("reference logits need")


def transformers_reference(
    directory: Path,
    prompts: Sequence[Array],
    *,
    memory: Memory | None = None,
    observe: LayerObserver | None = None,
    task: Task | None = None,
) -> Reference:
    """Computes the logits of the original with transformers.

    Args:
        directory: config.json and safetensors.
        prompts: Token ids, int (tokens,) each.
        memory: How many bytes to hold at a time.
        observe: Called after each layer, the embedding first.
        task: Advanced by the bytes read.

    Raises:
        BadInput: torch or transformers is missing, transformers does not accept config.json, or a tensor is missing or
            has another shape.
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

    config, source, memory = reference_config(directory), open_reference(directory), memory or Memory()
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


def _settings(config: ModelConfig) -> Any:
    """Makes transformers' config object from a config.json, without a dtype: everything runs in float32."""
    require_libraries()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING

    known = {key: value for key, value in config.for_transformers().items() if key not in NOT_FOR_THE_REFERENCE}
    kind = MODEL_TYPES.get(config.model_type, config.model_type)
    if kind not in CONFIG_MAPPING:
        raise BadInput(f"{config.path}: transformers has no model_type {config.model_type!r}")
    try:
        return CONFIG_MAPPING[kind].from_dict(known | {"model_type": kind})
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
        raise _no_model(config, error) from error


def _no_model(config: ModelConfig, error: Exception) -> BadInput:
    first_line = " ".join(str(error).split()) or type(error).__name__
    return BadInput(f"{config.path}: transformers cannot make a model from it: {first_line}")


def _model(config: ModelConfig, source: Source, memory: Memory, task: Task | None) -> tuple[Any, _Watch]:
    """Makes transformers' model for a config, without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from conversion_lib.logits.reference.fetching import Fetcher
    from conversion_lib.logits.reference.streaming import stream_weights

    settings = _settings(config).get_text_config()
    _require_a_key_for_each_head(config, settings)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise _no_model(config, error) from error
    base = model.base_model_prefix
    tied = {"lm_head.weight": f"{base}.embed_tokens.weight"} if settings.tie_word_embeddings else {}
    watch = _Watch()
    stream_weights(model, Fetcher(source, base, tied, task), memory.slice_bytes, watch.experts)
    if (dtype := FACTOR_DTYPES.get(settings.model_type)) is not None:
        factor = model.base_model.embed_tokens.embed_scale
        factor.copy_(factor.to(getattr(torch, dtype)))
    return model, watch


def _require_a_key_for_each_head(config: ModelConfig, settings: Any) -> None:
    """Raises BadInput if a config says that latent attention shares keys: transformers would repeat each key.

    Other families are not checked: Gemma 4's config refuses to give one number of keys for all layers.
    """
    if not getattr(settings, "kv_lora_rank", None):
        return
    heads, keys = settings.num_attention_heads, settings.num_key_value_heads
    if keys != heads:
        raise BadInput(
            f"{config.path}: num_key_value_heads is {keys}, expected {heads}, as num_attention_heads: latent attention "
            "has a key for each head, and transformers fails with any other number; correct config.json"
        )


class _Packing:
    """Prompts packed into one sequence. Positions restart at 0, which transformers takes as a new sequence."""

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
        """Makes the masks of both kinds of layer with transformers' own functions."""
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
        """A tensor with tokens on its leading axes as float32 (all prompts' tokens, width)."""
        array: Array = states.reshape(-1, states.shape[-1]).float().numpy()
        return array

    def split(self, states: Any) -> list[Array]:
        return np.split(self.tokens(states), np.cumsum(self.lengths)[:-1])


class _Watch:
    """Collects the outputs of a layer's blocks and passes them to the observer after the layer."""

    def __init__(self) -> None:
        self._packing: _Packing | None = None
        self._states: dict[str, Array] = {}

    def start(self, model: Any, packing: _Packing, observe: LayerObserver) -> None:
        self._packing = packing

        def pass_on(number: int, block: str) -> Callable[..., None]:
            def hook(_module: Any, _inputs: Any, output: Any) -> None:
                self._keep(block, output)
                states, self._states = self._states, {}
                observe(number, states)

            return hook

        def keep(block: str) -> Callable[..., None]:
            return lambda _module, _inputs, output: self._keep(block, output)

        base = model.base_model
        base.embed_tokens.register_forward_hook(pass_on(blocks.EMBEDDING_LAYER, blocks.EMBEDDING))
        for number, layer in enumerate(base.layers):
            modules = dict(layer.named_modules())
            # if another norm is before the MLP, or none is before attention, this one is applied to attention's output
            after = "pre_feedforward_layernorm" in modules or "input_layernorm" not in modules
            second = blocks.NORM_AFTER_ATTENTION if after else blocks.NORM_BEFORE_MLP
            names = {**BLOCKS, "post_attention_layernorm": second}
            if "experts" in modules:  # next to an MLP that every token goes to
                names["mlp"] = blocks.SHARED_EXPERT
            for name, block in names.items():
                if name in modules:
                    modules[name].register_forward_hook(keep(block))
            layer.register_forward_hook(pass_on(number, blocks.STREAM))

    def experts(self, shares: Any, out: Any) -> None:
        if self._packing is not None:
            self._keep(blocks.ROUTER, shares)
            self._keep(blocks.EXPERTS, out)

    def _keep(self, block: str, output: Any) -> None:
        assert self._packing is not None
        states = output[0] if isinstance(output, tuple) else output
        self._states[block] = self._packing.tokens(states).copy()
