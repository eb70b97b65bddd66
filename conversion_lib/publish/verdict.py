"""The verdict of `ferry check` as publishing needs it: which checkpoint it is about, and whether it passed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from conversion_lib.errors import BadInput
from conversion_lib.record import parsed


class VerdictOnModel(BaseModel):
    """Whether MaxText computes what the original does, as far as it goes along with a published checkpoint."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    verdict: str
    max_kl: float
    threshold: float
    differs: str = ""
    settings: dict[str, Any] = {}

    @property
    def line(self) -> str:
        """What readers of the checkpoint have to know; empty where MaxText computes what the original does."""
        return f"{self.differs}: largest KL of a token {self.max_kl:.2e}" if self.differs else ""


class Verdict(BaseModel):
    """The part of `ferry check`'s check.json that is published with a checkpoint.

    Attributes:
        verdict: `pass` or `fail`.
        digest: The checkpoint's, `sha256:<hex>`.
        max_kl: Largest KL divergence of a token, in nats.
        threshold: Largest `max_kl` that passes, in nats.
        reference: What the checkpoint was compared with.
        mean_kl: In nats.
        max_abs_diff: Largest difference of a logit.
        top1: Share of tokens whose most likely next token is the same.
        top10: Share of the ten most likely tokens that both have, mean over the tokens.
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    verdict: str
    digest: str
    covers: dict[str, str] = {}
    """SHA-256 of each file that is published beside the weights, as it was when they were checked."""
    max_kl: float | None = None
    threshold: float | None = None
    reference: str | None = None
    mean_kl: float | None = None
    max_abs_diff: float | None = None
    top1: float | None = None
    top10: float | None = None
    weights: str | None = None
    model: VerdictOnModel | None = None


def parse_verdict(content: bytes | None, where: str) -> Verdict | None:
    """Parses check.json.

    Args:
        content: The file's bytes. None: there is no file.
        where: The file, for the error message.

    Returns:
        The verdict; None if there is no file.

    Raises:
        BadInput: The file is not a verdict.
    """
    return None if content is None else parsed(Verdict, content, where, "verdict")


def require_pass(
    verdict: Verdict | None, digest: str, companions: Mapping[str, str], checkpoint: str, where: str
) -> None:
    """Checks that a verdict is a pass for exactly what is to be published.

    Args:
        verdict: None: there is none.
        digest: The checkpoint's digest.
        companions: The SHA-256 of each file that is published beside the weights, by path.
        checkpoint: The checkpoint, for the error message.
        where: The file of the verdict, for the error message.

    Raises:
        BadInput: There is no verdict, it is about another checkpoint or other files, or it is not a pass.
    """
    advice = f"run `ferry check {checkpoint} --reference HF_DIR`, or publish with --unchecked"
    if verdict is None:
        raise BadInput(f"{checkpoint} has not been checked (no {where}): {advice}")
    if verdict.digest != digest:
        raise BadInput(f"{where} is about another checkpoint ({verdict.digest}, this is {digest}): {advice}")
    if changed := changed_since(verdict, companions):
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise BadInput(f"{checkpoint} changed since its check: {changed[0]}{more}: {advice}")
    if verdict.verdict != "pass":
        kl = "" if verdict.max_kl is None else f", max KL {verdict.max_kl:.3g}"
        raise BadInput(f"{checkpoint} did not pass its check (verdict {verdict.verdict}{kl}): {advice}")


def changed_since(verdict: Verdict, companions: Mapping[str, str]) -> list[str]:
    """Returns the files beside the weights that have changed since the verdict, sorted."""
    paths = {*verdict.covers, *companions}
    return sorted(path for path in paths if verdict.covers.get(path) != companions.get(path))
