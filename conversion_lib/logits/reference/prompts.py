"""The tokens that a check runs on: always the same ones, so that two checks of one model are the same check."""

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
"""Beside texts: random ids visit more of the embedding and of the experts than a text does."""


def choose_prompts(directory: Path, vocab: int, tokens: int, max_positions: int) -> list[Array]:
    """Prompts for the model in `directory`, int32 (length,) each; the longest has `tokens` tokens.

    With a tokenizer.json: short texts, a long one, and random ids; without one `fixed_prompts`. None is longer than
    `max_positions`. Raises BadInput where `tokens` is not positive, or the tokenizer disagrees with `vocab`.
    """
    fixed = fixed_prompts(vocab, tokens, max_positions)
    if not (directory / TOKENIZER).exists():
        return fixed
    short, long = _texts(directory / TOKENIZER, vocab)
    repeated = np.resize(long, min(tokens, max_positions))
    return [*(prompt[:max_positions] for prompt in short), repeated, fixed[-1][:RANDOM_TOKENS]]


def fixed_prompts(vocab: int, tokens: int, max_positions: int) -> list[Array]:
    """Three short prompts and one of `tokens` tokens, int32 (length,) each, drawn evenly from the vocabulary.

    The long one is what shows a mistake in RoPE: short prompts let it pass. It is cut to `max_positions`.

    Raises BadInput where `tokens` is not positive.
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
    except Exception as error:  # tokenizers raises nothing more particular
        raise BadInput(f"{path} is no tokenizer: {error}") from None
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    if largest >= vocab:
        raise BadInput(f"{path} has a token of id {largest}, and config.json a vocabulary of {vocab}")
    texts = json.loads(files("conversion_lib.logits.reference").joinpath("prompts.json").read_text())
    short, long = ([tokenizer.encode(text).ids for text in part] for part in (texts["short"], [texts["long"]]))
    if not all(short) or not all(long):
        raise BadInput(f"{path} makes no tokens of a text")
    return [np.array(ids, np.int32) for ids in short], np.array(long[0], np.int32)
