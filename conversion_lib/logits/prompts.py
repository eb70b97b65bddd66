"""The token ids that a check runs on: fixed ones, so that two checks of one model are the same check."""

from __future__ import annotations

import numpy as np

from conversion_lib.errors import BadInput
from conversion_lib.sources.base import Array

SEED = 20240229
SHORT_PROMPTS, SHORT_TOKENS = 3, 16


def fixed_prompts(vocab: int, tokens: int, max_positions: int) -> list[Array]:
    """Three short prompts and one of `tokens` tokens, int32 (length,) each, drawn evenly from the vocabulary.

    The long one is what shows a mistake in RoPE: short prompts let it pass. It is cut to `max_positions`.
    No tokenizer is asked: random ids visit more of the embedding and of the experts than a sentence does.

    Raises BadInput where `tokens` is not positive.
    """
    if tokens < 1:
        raise BadInput(f"a check needs at least one token, not {tokens}")
    lengths = [min(length, max_positions) for length in (*[SHORT_TOKENS] * SHORT_PROMPTS, tokens)]
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, vocab, length, dtype=np.int32) for length in lengths]
