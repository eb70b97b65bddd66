"""Reference logits: the original weights, run by transformers in float32 with eager attention."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.config import load_config
from conversion_lib.errors import BadInput
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.sources.base import Array

INSTALL = "pip install ferry[check]"


@dataclass(frozen=True)
class Reference:
    """What a checkpoint is compared with.

    config: the contents of config.json; prompts: int32 (tokens,) each; logits: float32 (tokens, vocabulary)
    for each prompt; hidden: the stream behind the embedding and behind each layer, float32 (all prompts'
    tokens, hidden), empty where it was not kept; origin: what a person wants to know of where it came from.
    """

    config: dict[str, Any]
    prompts: list[Array]
    logits: list[Array]
    hidden: list[Array]
    origin: dict[str, str]


def transformers_reference(
    directory: Path, prompts: Sequence[Array], *, scratch: Path | None = None, reporter: Reporter = SILENT
) -> Reference:
    """Runs the model in `directory` (config.json and safetensors) on `prompts`; the whole model is in memory.

    A quantized model is dequantized into a temporary directory under `scratch` first: transformers infers the
    blocks of fp8 scales from shapes, which is wrong where a block is cut off at an edge.

    Raises BadInput where torch or transformers is missing, or the directory is not a whole model.
    """
    _require_libraries()
    raw = load_config(directory).raw
    if not raw.get("quantization_config"):
        return _run(directory, raw, prompts, reporter)
    from conversion_lib.convert import dequantize

    with tempfile.TemporaryDirectory(prefix="dequantized-", dir=scratch) as temporary:
        plain = Path(temporary) / "hf"
        reporter.say(f"dequantizing {directory} for the reference logits")
        dequantize(directory, plain, reporter=reporter)
        return _run(plain, load_config(plain).raw, prompts, reporter, str(directory))


def _require_libraries() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"reference logits need {error.name}, which is not installed: {INSTALL}") from error


def _run(
    directory: Path, raw: dict[str, Any], prompts: Sequence[Array], reporter: Reporter, name: str | None = None
) -> Reference:
    import torch
    import transformers

    reporter.say(f"reference logits by transformers {transformers.__version__} in float32")
    with _quiet_transformers():
        model = _load(directory)
        watch = _StreamWatch(model)
        logits = []
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.from_numpy(prompt.astype(np.int64))[None]
                logits.append(model(input_ids=ids, use_cache=False).logits[0].float().numpy())
    origin = {
        "reference": name or str(directory),
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "commit": str(raw.get("_commit_hash") or ""),
    }
    return Reference(raw, list(prompts), logits, watch.hidden(), {key: text for key, text in origin.items() if text})


class _StreamWatch:
    """Keeps what the embedding and each decoder layer of a transformers model put out."""

    def __init__(self, model: Any) -> None:
        base = model.base_model
        self._outputs: list[list[Array]] = []
        for module in (base.embed_tokens, *base.layers):
            kept: list[Array] = []
            self._outputs.append(kept)
            module.register_forward_hook(self._keep(kept))

    @staticmethod
    def _keep(kept: list[Array]) -> Any:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            kept.append(states[0].float().numpy().copy())

        return hook

    def hidden(self) -> list[Array]:
        return [np.concatenate(kept) for kept in self._outputs]


def _load(directory: Path) -> Any:
    import safetensors
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise BadInput(f"transformers cannot load {directory}: {first_line}") from error
    # what is missing would be drawn at random
    if info["missing_keys"]:
        raise BadInput(f"{directory} lacks weights of the model: {', '.join(sorted(info['missing_keys'])[:5])}")
    return model.eval()


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
