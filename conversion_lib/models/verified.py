"""What was seen of each family with the real MaxText: `verified.json`, which `make parity-all` writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

from conversion_lib.models.catalog import MODELS

PATH = Path(__file__).parent / "verified.json"
LAYOUTS = ("scanned", "unscanned")

LEGEND = (
    "Seen on small models of each family, converted to bfloat16 and to float32. Same bits: every leaf is that of "
    "MaxText's own conversion. KL: MaxText loads our checkpoint by both of its loaders, and its logits in float32 "
    "diverge from transformers' by less, for every token; for Gemma up to 1e-3 where bfloat16 rounds the root of the "
    "width, since MaxText rounds the tied table. Back: an export gives the source's tensors back, bit for bit; a query "
    "that MaxText stores divided by a root loses a bit in bfloat16 where that is no power of two, as it was here, and "
    "so does Gemma's table at the published widths, which have such roots (docs/guides/export.md).",
    "MaxText's main branch is not on the package index, so nothing ran there: of it only the structure is known, which "
    "`--maxtext main` follows for the router's bias of DeepSeek and Kimi.",
)


class Layout(BaseModel):
    """A family's checkpoints, scanned or not, of all its models in the tests.

    compared: conversions that were compared with MaxText's own; 0 where MaxText cannot convert.
    ran: checkpoints that MaxText loaded and ran. kl_below: the bounds that their divergences kept to.
    returned: exports that were compared with the source. not_returned: what ends the names of tensors that differed.
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
    """`verified.json`. commit: of the code that ran, with `-dirty` where it was changed. versions: by package."""

    commit: str | None
    date: str
    versions: dict[str, str]
    families: dict[str, dict[str, Layout]]

    def same_as(self, other: Verified) -> bool:
        """Whether the same was seen, whenever that was."""
        return (self.versions, self.families) == (other.versions, other.families)

    @property
    def origin(self) -> str:
        packages = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return f"From `make parity-all` on {self.date}, commit {self.commit or 'unknown'}: {packages}."

    def of(self, family: str, layout: str) -> str:
        """What was seen, in a few words."""
        found = self.families.get(family, {}).get(layout)
        return "no such layout" if found is None else str(found)


def load() -> Verified:
    """What is committed."""
    return Verified.model_validate_json(PATH.read_bytes())


def markdown(seen: Verified) -> Iterator[str]:
    """A table by family, line by line, and what it means."""
    yield "| family | models | scanned | unscanned |"
    yield "| --- | --- | --- | --- |"
    for family in dict.fromkeys(model.family for model in MODELS):
        names = ", ".join(model.name for model in MODELS if model.family == family)
        yield f"| {family} | {names} | {seen.of(family, 'scanned')} | {seen.of(family, 'unscanned')} |"
    for paragraph in (seen.origin, *LEGEND):
        yield from ("", paragraph)
