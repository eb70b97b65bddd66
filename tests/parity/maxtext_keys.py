"""The table of MaxText's settings for MaxText's own interpreter, which has no Ferry: read by its path."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[2] / "conversion_lib" / "logits" / "by_maxtext" / "settings.py"
_spec = importlib.util.spec_from_file_location("maxtext_settings", _PATH)
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)

EXACT, model_settings = _module.EXACT, _module.model_settings
