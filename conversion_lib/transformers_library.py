"""transformers as a library: whether it is there, what it calls a model, and how it keeps quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from conversion_lib.errors import BadInput

INSTALL = "pip install ferry[check]"

MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
"""config.json's `model_type` where transformers knows the architecture by another one."""


def require_libraries(what_needs: str) -> None:
    """Raises BadInput where torch or transformers is missing. `what_needs`: such as `reference logits need`."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"{what_needs} {error.name}, which is not installed: {INSTALL}") from error


@contextmanager
def quiet() -> Iterator[None]:
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
