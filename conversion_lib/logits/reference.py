"""Reference logits: the original weights, run by transformers in float32 with eager attention.

The model's code is transformers' own; its weights are fetched as it runs (`streaming.py`), so that memory does not
grow with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.config import ModelConfig, load_config
from conversion_lib.errors import BadInput
from conversion_lib.logits import blocks
from conversion_lib.logits.memory import Memory
from conversion_lib.progress import Task
from conversion_lib.sources.base import Array, Source
from conversion_lib.sources.quantization import dequantized
from conversion_lib.sources.safetensors import SafetensorsSource

INSTALL = "pip install ferry[check]"

MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
"""config.json's `model_type` where transformers knows the architecture by another one."""

NO_PACKING = {"gpt_oss", "qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"}
"""Text models whose prompts cannot stand one after the other in one sequence, by `model_type`: gpt-oss makes its masks
without looking at positions, the others carry a state from token to token."""

BLOCKS = {
    "input_layernorm": blocks.NORM_BEFORE_ATTENTION,
    "self_attn": blocks.ATTENTION,
    "linear_attn": blocks.ATTENTION,
    "pre_feedforward_layernorm": blocks.NORM_BEFORE_MLP,
    "mlp.shared_experts": blocks.SHARED_EXPERT,
    "mlp": blocks.MLP,
    "post_feedforward_layernorm": blocks.NORM_AFTER_MLP,
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
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"reference logits need {error.name}, which is not installed: {INSTALL}") from error


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

    config, source = load_config(directory), open_reference(directory)
    with _quiet_transformers(), torch.no_grad():
        model, watch = _model(config, source, memory or Memory(), task)
        packing = _Packing(model.config, prompts)
        if observe is not None:
            watch.start(model, packing, observe)
        logits = model(**packing.inputs(), use_cache=False).logits
    origin = {
        "reference": str(directory),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "commit": str(config.raw.get("_commit_hash") or ""),
    }
    kept = {key: text for key, text in origin.items() if text}
    return Reference(config.raw, list(prompts), packing.split(logits), kept, dtype_of(source))


def _model(config: ModelConfig, source: Source, memory: Memory, task: Task | None) -> tuple[Any, _Watch]:
    """transformers' model for a config, without weights of its own."""
    import torch
    from huggingface_hub.errors import StrictDataclassError
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from conversion_lib.logits.fetching import Fetcher
    from conversion_lib.logits.streaming import stream_weights

    raw = {key: value for key, value in config.raw.items() if key != "quantization_config"}
    kind = MODEL_TYPES.get(config.model_type, config.model_type)
    if kind not in CONFIG_MAPPING:
        raise BadInput(f"{config.path}: transformers has no model_type {config.model_type!r}")
    try:
        settings = CONFIG_MAPPING[kind].from_dict(raw | {"model_type": kind}).get_text_config()
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                settings, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
            ).eval()
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        first_line = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{config.path}: transformers makes no model of it: {first_line}") from error
    base = model.base_model_prefix
    tied = {"lm_head.weight": f"{base}.embed_tokens.weight"} if settings.tie_word_embeddings else {}
    watch = _Watch()
    stream_weights(model, Fetcher(source, base, tied, task), memory.slice_bytes, watch.experts)
    if (dtype := FACTOR_DTYPES.get(settings.model_type)) is not None:
        factor = model.base_model.embed_tokens.embed_scale
        factor.copy_(factor.to(getattr(torch, dtype)))
    return model, watch


class _Packing:
    """Prompts as one batch: one after the other in a single sequence, positions starting anew, which transformers
    takes as sequences that do not see each other; or, where a model does not, side by side, the shorter ones
    filled up behind their end, which a causal model does not look at."""

    def __init__(self, settings: Any, prompts: Sequence[Array]) -> None:
        self._lengths = [len(prompt) for prompt in prompts]
        self._packed = settings.model_type not in NO_PACKING
        longest = max(self._lengths)
        if self._packed:
            self._ids = np.concatenate(list(prompts))[None]
            self._rows = np.arange(self._ids.size)
        else:
            self._ids = np.stack([np.pad(prompt, (0, longest - len(prompt))) for prompt in prompts])
            starts = longest * np.arange(len(prompts))
            pairs = zip(starts, self._lengths, strict=True)
            self._rows = np.concatenate([start + np.arange(length) for start, length in pairs])

    def inputs(self) -> dict[str, Any]:
        import torch

        inputs = {"input_ids": torch.from_numpy(self._ids.astype(np.int64))}
        if self._packed:
            positions = np.concatenate([np.arange(length) for length in self._lengths])[None]
            inputs["position_ids"] = torch.from_numpy(positions)
        return inputs

    def tokens(self, states: Any) -> Array:
        """Float32 (all prompts' tokens, width) of a tensor with the batch's tokens on its leading axes."""
        array: Array = states.reshape(-1, states.shape[-1]).float().numpy()
        return array if self._packed else array[self._rows]

    def split(self, states: Any) -> list[Array]:
        return np.split(self.tokens(states), np.cumsum(self._lengths)[:-1])


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
            for name, block in {**BLOCKS, "post_attention_layernorm": second}.items():
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


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers: progress is Ferry's own, on standard error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
