"""The results of each family with the real MaxText: `verified.json`, which `make parity-all` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from conversion_lib.models.catalog import MODELS

PATH = Path(__file__).parent / "verified.json"
LAYOUTS = ("scanned", "unscanned")

LEGEND = (
    "Results for small models of each family, converted to bfloat16 and to float32. Same bits: every leaf is the same "
    "as in MaxText's own conversion. KL: MaxText loads Ferry's checkpoint with both of its loaders, and for every "
    "token the divergence of its float32 logits from transformers' is less than this. It is up to 1e-3 for Gemma if "
    "bfloat16 rounds the root of the width, because MaxText rounds the tied table. Back: an export gives back the "
    "source's tensors, bit for bit. A query that MaxText stores divided by a root loses a bit in bfloat16 unless the "
    "root is a power of two; in these models it is not. Gemma's table at the published widths loses a bit for the "
    "same reason, and a float32 norm of Gemma 2 and 3 loses bits in float32 too (docs/guides/export.md).",
    "MaxText's main branch is not on the package index, so nothing ran there. Only its structure is known, and "
    "`--maxtext main` follows it for the router's bias of DeepSeek and Kimi.",
)


class Layout(BaseModel):
    """The results of a family in one layout, over all its models in the tests.

    Attributes:
        compared: The number of conversions that were compared with MaxText's own; 0 if MaxText cannot convert it.
        same_bits: Whether every leaf of those had the same bits.
        ran: The number of checkpoints that MaxText loaded and ran.
        kl_below: The bounds in nats that all divergences of the logits were below.
        returned: The number of exports that were compared with the source.
        not_returned: The ends of the names of tensors that differed.
    """

    compared: int
    same_bits: bool
    ran: int
    kl_below: list[float]
    returned: int
    not_returned: list[str]

    def __str__(self) -> str:
        bits = "same bits" if self.same_bits else "OTHER BITS"
        below = " to ".join(f"{bound:.0e}".replace("e-0", "e-") for bound in self.kl_below)
        back = f"back but for {', '.join(self.not_returned)}" if self.not_returned else "back"
        return "; ".join(
            [
                bits if self.compared else "MaxText cannot convert it",
                f"KL < {below}" if self.kl_below else "LOGITS DIFFER",
                back,
            ]
        )


class Verified(BaseModel):
    """The content of `verified.json`.

    Attributes:
        commit: The commit of the code, with `-dirty` if it was changed; None if it is not known.
        date: The day, in ISO 8601.
        versions: The versions of packages by name.
        families: The results by family, then by layout of LAYOUTS.
    """

    commit: str | None
    date: str
    versions: dict[str, str]
    families: dict[str, dict[str, Layout]]

    def same_as(self, other: Verified) -> bool:
        """Returns whether the versions and results are the same, whatever the date and commit."""
        return (self.versions, self.families) == (other.versions, other.families)

    @property
    def origin(self) -> str:
        """A sentence that says when and with which versions the results were made."""
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"From `make parity-all` on {self.date}, commit {self.commit or 'unknown'}: {packages}."

    def of(self, family: str, layout: str) -> str:
        """Returns the results of a family in one layout, in a few words."""
        found = self.families.get(family, {}).get(layout)
        return "no such layout" if found is None else str(found)


def load() -> Verified:
    """Reads the committed `verified.json`."""
    return Verified.model_validate_json(PATH.read_bytes())


def markdown(seen: Verified) -> Iterator[str]:
    """Yields the lines of a table by family and of its legend, in Markdown."""
    yield "| family | models | scanned | unscanned |"
    yield "| --- | --- | --- | --- |"
    for family in dict.fromkeys(model.family for model in MODELS):
        names = ", ".join(model.name for model in MODELS if model.family == family)
        yield f"| {family} | {names} | {seen.of(family, 'scanned')} | {seen.of(family, 'unscanned')} |"
    for paragraph in (seen.origin, *LEGEND):
        yield from ("", paragraph)
