"""A head that config.json ties to the embedding, although the files have a head with other values.

A fine-tune may train both and keep the old config. transformers then does not tie them.
"""

from __future__ import annotations

import numpy as np

from conversion_lib.core.boxes import whole
from conversion_lib.core.copying import cast
from conversion_lib.core.tensors import Array, Source, TensorInfo
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.renamed import EMBEDDING, HEAD

READ_BYTES = 16 << 20
"""The bytes of either tensor that are read at a time."""
TIE_KEY = "tie_word_embeddings"


def own_head(source: Source) -> TensorInfo | None:
    """Returns the head of a checkpoint if its values are not the embedding's; None if they are, or there is no head.

    Both are read, up to the first rows that differ. As in transformers, they are compared in the embedding's dtype.
    """
    head, embedding = head_of(source), _shortest(source, EMBEDDING)
    if head is None or embedding is None:
        return None
    if head.shape != embedding.shape:
        return head
    step = max(1, READ_BYTES * head.shape[0] // max(head.nbytes, 1)) if head.shape else 1
    for start in range(0, head.shape[0] if head.shape else 0, step):
        box = ((start, min(start + step, head.shape[0])), *whole(head.shape[1:]))
        one, other = (source.read(info.name, box) for info in (embedding, head))
        if not _same_bits(one, cast(other, one.dtype.name)):
            return head
    return None


def head_of(source: Source) -> TensorInfo | None:
    """Returns the head; None if there is none."""
    return _shortest(source, HEAD)


def untied(config: ModelConfig) -> ModelConfig:
    """Returns the config of the same model with a head of its own."""
    raw = {**config.raw, TIE_KEY: False}
    text = raw.get("text_config")
    if isinstance(text, dict):
        raw["text_config"] = {**text, TIE_KEY: False}
    return ModelConfig(raw, config.path)


def _shortest(source: Source, last: str) -> TensorInfo | None:
    """Returns the language model's tensor whose name ends with `last`: towers have longer names."""
    found = [info for name, info in source.tensors.items() if name == last or name.endswith(f".{last}")]
    return min(found, key=lambda info: len(info.name), default=None)


def _same_bits(one: Array, other: Array) -> bool:
    return np.array_equal(np.ascontiguousarray(one).view(np.uint8), np.ascontiguousarray(other).view(np.uint8))
