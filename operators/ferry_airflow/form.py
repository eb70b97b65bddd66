"""What the trigger form of `onboard_checkpoint` offers: names of models and repositories from Ferry's catalogue."""

from __future__ import annotations

from conversion_lib.models.catalog import MODELS

MODEL_NAMES = [model.name for model in MODELS]
REPOSITORIES = list({model.family: model.repo for model in MODELS}.values())
"""One of each family: what is typed wrong is refused with the whole schema."""
