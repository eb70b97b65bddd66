"""A family's checkpoint in every layout, and back: made once, for the tests that look at it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.record import Target
from conversion_lib.sources.safetensors import SafetensorsSource
from tests.support.tiny_models import make_tiny

UNSCANNED_ONLY = ("gemma4_small",)

SCALED_QUERY = ("llama3.1", "mixtral", "gemma2")
"""Families whose query loses a bit in bfloat16 at the tiny models' head dimension, 32."""


@dataclass(frozen=True)
class RoundTrip:
    """hf: the source. maxtext: conversions of it, by whether they are scanned. back: their exports."""

    family: str
    hf: Path
    maxtext: dict[bool, Path]
    back: dict[bool, Path]


def layouts(family: str) -> tuple[bool, ...]:
    """What `scan_layers` may be for a family."""
    return (False,) if family in UNSCANNED_ONLY else (True, False)


def round_trip(family: str, at: Path) -> RoundTrip:
    """Makes a tiny model of `family` below `at`, converts it to every layout, and exports each."""
    hf = make_tiny(family, at / "hf")
    maxtext, back = {}, {}
    for scan in layouts(family):
        maxtext[scan], back[scan] = at / f"maxtext-{scan}", at / f"back-{scan}"
        convert(hf, maxtext[scan], Target(scan_layers=scan))
        export(maxtext[scan], back[scan])
    return RoundTrip(family, hf, maxtext, back)


def of_text_model(name: str) -> str:
    """The name that a text model alone has for a tensor that is published beside towers."""
    for prefix in ("model.language_model.", "language_model.model."):
        name = name.replace(prefix, "model.")
    return name


def tensors(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint but its towers', by the text model's names."""
    source = SafetensorsSource(directory)
    towers = ("vision", "visual", "multi_modal", "embed_vision")
    names = [name for name in source.tensors if not any(word in name for word in towers)]
    return {of_text_model(name): source.read(name) for name in names}


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """The tensors that are not the same in name, shape, dtype and bits."""

    def same(name: str) -> bool:
        one, other = a.get(name), b.get(name)
        if one is None or other is None:
            return False
        return (one.shape, one.dtype, one.tobytes()) == (other.shape, other.dtype, other.tobytes())

    return [name for name in sorted({*a, *b}) if not same(name)]
