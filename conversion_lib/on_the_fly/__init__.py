"""Conversion for a training run that has only a model's name: `ensure_checkpoint`."""

from conversion_lib.on_the_fly.ensuring import ensure_checkpoint

__all__ = ["ensure_checkpoint"]
