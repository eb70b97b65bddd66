"""transformers as a library: whether it is there, what it calls a model, and how it keeps quiet."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from conversion_lib.errors import BadInput

INSTALL = "pip install 'ferry-checkpoints[check]'"

MODEL_TYPES = {"kimi_k2": "deepseek_v3"}
"""config.json's `model_type` where transformers knows the architecture by another one."""


def require_libraries(what_needs: str, *names: str) -> None:
    """Raises BadInput where one of the `check` extra is missing. `what_needs`: such as `reference logits need`."""
    missing = [name for name in names or ("torch", "transformers") if find_spec(name) is None]
    if missing:
        raise BadInput(f"{what_needs} {' and '.join(missing)}, which is not installed: {INSTALL}")


def require_check_libraries() -> None:
    """Raises BadInput where `conversion_lib.logits.check` cannot be imported.

    To be called before that import. What only some checks take (torch, plots) is asked for when it is needed.
    """
    require_libraries("`ferry check` needs", "jax", "jinja2", "markupsafe")


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
