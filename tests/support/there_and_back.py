"""A checkpoint in every layout, and back: made once, for the tests that look at it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.record import Target
from conversion_lib.sources.safetensors import SafetensorsSource


@dataclass(frozen=True)
class RoundTrip:
    """hf: the source. maxtext: conversions of it, by whether they are scanned. back: their exports."""

    hf: Path
    maxtext: dict[bool, Path]
    back: dict[bool, Path]


def round_trip(hf: Path, at: Path, layouts: Sequence[bool]) -> RoundTrip:
    """Converts the checkpoint at `hf` to each of `layouts`, scanned or not, and exports each, below `at`."""
    maxtext, back = {}, {}
    for scan in layouts:
        maxtext[scan], back[scan] = at / f"maxtext-{scan}", at / f"back-{scan}"
        convert(hf, maxtext[scan], Target(scan_layers=scan))
        export(maxtext[scan], back[scan])
    return RoundTrip(hf, maxtext, back)


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
