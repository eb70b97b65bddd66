"""The tokens that a check runs on. They are always the same, so that two checks of one model can be compared."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path

import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.models.transformers_library import INSTALL

TOKENIZER = "tokenizer.json"
SEED = 20240229
SHORT_PROMPTS, SHORT_TOKENS = 3, 16
RANDOM_TOKENS = 128
"""Length of the random prompt next to texts: random ids reach more experts and embedding rows than text does."""


def choose_prompts(directory: Path, vocab: int, tokens: int, max_positions: int) -> list[Array]:
    """Makes the prompts for a model: short texts, a long text and random ids; without a tokenizer, `fixed_prompts`.

    Args:
        directory: Where the model's tokenizer.json is, if it has one.
        vocab: Size of the vocabulary.
        tokens: Tokens of the longest prompt.
        max_positions: No prompt is longer.

    Returns:
        Token ids, int32 (tokens,) each.

    Raises:
        BadInput: `tokens` is not positive; the tokenizer cannot be read or has ids outside the vocabulary; or the
            package tokenizers is missing.
    """
    fixed = fixed_prompts(vocab, tokens, max_positions)
    if not (directory / TOKENIZER).exists():
        return fixed
    short, long = _texts(directory / TOKENIZER, vocab)
    repeated = np.resize(long, min(tokens, max_positions))
    return [*(prompt[:max_positions] for prompt in short), repeated, fixed[-1][:RANDOM_TOKENS]]


def fixed_prompts(vocab: int, tokens: int, max_positions: int) -> list[Array]:
    """Draws three short prompts and a long one evenly from the vocabulary.

    Only the long one reveals a mistake in RoPE.

    Args:
        vocab: Size of the vocabulary.
        tokens: Tokens of the long prompt.
        max_positions: No prompt is longer.

    Returns:
        Token ids, int32 (tokens,) each; the same for the same arguments.

    Raises:
        BadInput: `tokens` is not positive.
    """
    if tokens < 1:
        raise BadInput(f"a check needs at least one token, not {tokens}")
    lengths = [min(length, max_positions) for length in (*[SHORT_TOKENS] * SHORT_PROMPTS, tokens)]
    rng = np.random.default_rng(SEED)
    return [rng.integers(0, vocab, length, dtype=np.int32) for length in lengths]


def _texts(path: Path, vocab: int) -> tuple[list[Array], Array]:
    """The texts of prompts.json as token ids: the short ones, and the long one."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BadInput(f"{path} needs tokenizers, which is not installed: {INSTALL}") from error
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more specific
        raise BadInput(f"{path} is not a tokenizer: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab:
        raise BadInput(f"{path} has a token with id {largest}, but config.json has a vocabulary of {vocab}")
    texts = json.loads(files("conversion_lib.logits.reference").joinpath("prompts.json").read_text())
    short, long = ([tokenizer.encode(text).ids for text in part] for part in (texts["short"], [texts["long"]]))
    if not all(short) or not all(long):
        raise BadInput(f"{path} encodes a text as no tokens")
    return [np.array(ids, np.int32) for ids in short], np.array(long[0], np.int32)
