"""Facts about the transformers library: whether it is installed, its names of models, and how to silence it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from conversion_lib.errors import BadInput

INSTALL = "pip install 'ferry-checkpoints[check]'"

MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
"""transformers' `model_type` of an architecture by config.json's, where they differ."""


def require_libraries(what_needs: str, *names: str) -> None:
    """Requires that libraries of the `check` extra are installed.

    Args:
        what_needs: The start of the message, such as `reference logits need`.
        *names: The libraries; none: torch and transformers.

    Raises:
        BadInput: One of them is missing.
    """
    missing = [name for name in names or ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise BadInput(f"{what_needs} {' and '.join(missing)}, which is not installed: {INSTALL}")


def require_check_libraries() -> None:
    """Requires the libraries that `conversion_lib.logits.check` imports. Call this before the import.

    Libraries that only some checks need, such as torch, are required later.

    Raises:
        BadInput: One of them is missing.
    """
    require_libraries("`ferry check` needs", "jax", "jinja2", "markupsafe")


@contextmanager
def quiet() -> Iterator[None]:
    """Hides transformers' progress bars and warnings in the context: Ferry shows its own progress on standard error."""
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
