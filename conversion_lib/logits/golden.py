"""Reference logits kept in a file, so that a check needs neither the original weights nor transformers."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.errors import BadInput
from conversion_lib.files import write_atomically
from conversion_lib.logits.reference import Reference

FORMAT = 1


def save_golden(path: Path, reference: Reference) -> None:
    """Writes an .npz with `tokens_<i>` int32 (tokens,), `logits_<i>` float32 (tokens, vocabulary) for each prompt,
    and `identity`, a JSON text with the model's config and where its logits came from."""
    arrays: dict[str, Any] = {}
    for index, (tokens, logits) in enumerate(zip(reference.prompts, reference.logits, strict=True)):
        arrays[f"tokens_{index}"] = tokens.astype(np.int32)
        arrays[f"logits_{index}"] = logits.astype(np.float32)
    identity = {
        "format": FORMAT,
        "prompts": len(reference.prompts),
        "config": reference.config,
        "origin": reference.origin,
    }
    arrays["identity"] = np.array(json.dumps(identity))
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def load_golden(path: Path) -> Reference:
    """The reference that `save_golden` wrote; it has no hidden states.

    Raises BadInput where `path` is no such file, or its arrays do not fit each other.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            identity = json.loads(str(arrays["identity"]))
            if identity["format"] != FORMAT:
                raise BadInput(f"{path} is a golden file of format {identity['format']}, this version reads {FORMAT}")
            prompts = [arrays[f"tokens_{index}"] for index in range(identity["prompts"])]
            logits = [arrays[f"logits_{index}"] for index in range(identity["prompts"])]
            config, origin = dict(identity["config"]), dict(identity["origin"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} is not a golden file that --save-golden wrote: {error}") from error
    if not prompts:
        raise BadInput(f"{path} holds no prompt")
    vocab = config.get("vocab_size")
    for tokens, values in zip(prompts, logits, strict=True):
        if tokens.ndim != 1 or values.shape != (len(tokens), vocab) or not len(tokens):
            raise BadInput(f"{path}: logits {values.shape} for tokens {tokens.shape} and a vocabulary of {vocab}")
        if tokens.min() < 0 or tokens.max() >= values.shape[1]:
            raise BadInput(f"{path}: token ids outside the vocabulary of {vocab}")
    return Reference(config, prompts, logits, [], origin)
