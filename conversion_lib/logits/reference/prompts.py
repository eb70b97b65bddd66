"""The tokens that a check runs on. They are always the same, so that two checks of one model can be compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.models.transformers_library import INSTALL
from conversion_lib.progress import SILENT, Reporter

TOKENIZER = "tokenizer.json"
SEED = 20240229
SHORT_PROMPTS, SHORT_TOKENS = 3, 16
RANDOM_TOKENS = 128
"""Length of the random prompt next to texts: random ids reach more experts and embedding rows than text does."""


def choose_prompts(
    directory: Path, vocab: int, tokens: int, max_positions: int, reporter: Reporter = SILENT
) -> list[Array]:
    """Makes the prompts for a model: short texts, a long text and random ids.

    Without a tokenizer.json, or if it makes no tokens of a text, they are `fixed_prompts`.

    Args:
        directory: Where the model's tokenizer.json is, if it has one.
        vocab: Size of the vocabulary.
        tokens: Tokens of the longest prompt.
        max_positions: No prompt is longer.
        reporter: Told if the tokenizer is of no use.

    Returns:
        Token ids, int32 (tokens,) each.

    Raises:
        BadInput: `tokens` is not positive; the tokenizer cannot be read, or makes ids of a text that are outside the
            vocabulary; or the package tokenizers is missing.
    """
    fixed = fixed_prompts(vocab, tokens, max_positions)
    path = directory / TOKENIZER
    if not path.exists():
        return fixed
    texts = _texts(path, vocab)
    if not texts:
        reporter.say(f"{path} makes no tokens of a text: random ids are checked instead")
        return fixed
    *short, long = texts
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


def _texts(path: Path, vocab: int) -> list[Array]:
    """Encodes the texts of prompts.json, the long one last, without those that have no tokens.

    Ids outside the vocabulary do not matter if no text has them: a token for images, or one that was added later.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BadInput(f"{path} needs tokenizers, which is not installed: {INSTALL}") from error
    tokenizer = _result_of(lambda: Tokenizer.from_file(str(path)))
    if isinstance(tokenizer, BaseException):
        raise BadInput(f"{path} is not a tokenizer: {' '.join(str(tokenizer).split())}")
    tokenizer.no_padding()  # kept from the run that tuned or calibrated the model
    tokenizer.no_truncation()
    texts = json.loads(files("conversion_lib.logits.reference").joinpath("prompts.json").read_text())
    encoded = [_encoded(tokenizer, text, path, vocab) for text in (*texts["short"], texts["long"])]
    return [prompt for prompt in encoded if len(prompt)]


def _encoded(tokenizer: Any, text: str, path: Path, vocab: int) -> Array:
    """Encodes a text, int32 (tokens,); no ids if the tokenizer fails, as one without an unknown token does.

    Raises:
        BadInput: An id is outside the vocabulary.
    """
    ids = _result_of(lambda: tokenizer.encode(text).ids)
    if isinstance(ids, BaseException):
        return np.empty(0, np.int32)
    if ids and max(ids) >= vocab:
        raise BadInput(
            f"{path} makes a token of id {max(ids)} of a text, {tokenizer.id_to_token(max(ids))!r}, and the model has "
            f"rows for {vocab}: is it this model's tokenizer?"
        )
    return np.array(ids, np.int32)


def _result_of(call: Callable[[], Any]) -> Any:
    """Returns what `call` returns or raises: tokenizers raises nothing more specific than Exception, and panics."""
    try:
        return call()
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            return error
        raise
