"""The verdict of `ferry check`, as far as publishing needs it: about which checkpoint it is, and whether it passed."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.errors import BadInput, problem_of


class Verdict(BaseModel):
    """The part of `ferry check`'s check.json that goes along with a published checkpoint."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    verdict: str
    digest: str
    max_kl: float | None = None
    threshold: float | None = None
    reference: str | None = None
    mean_kl: float | None = None
    max_abs_diff: float | None = None
    top1: float | None = None
    top10: float | None = None


def parse_verdict(content: bytes | None, where: str) -> Verdict | None:
    """The verdict in a check.json, None where there is none. Raises BadInput for another kind of file at `where`."""
    if content is None:
        return None
    try:
        return Verdict.model_validate_json(content)
    except ValidationError as error:
        raise BadInput(f"{where} is no verdict: {problem_of(error)}") from error


def require_pass(verdict: Verdict | None, digest: str, checkpoint: str, where: str) -> None:
    """Raises BadInput unless `verdict`, read from `where`, is a pass on the checkpoint with this digest."""
    advice = f"run `ferry check {checkpoint} --reference HF_DIR`, or publish with --unchecked"
    if verdict is None:
        raise BadInput(f"{checkpoint} has not been checked (no {where}): {advice}")
    if verdict.digest != digest:
        raise BadInput(f"{where} is about another checkpoint ({verdict.digest}, this is {digest}): {advice}")
    if verdict.verdict != "pass":
        kl = "" if verdict.max_kl is None else f", max KL {verdict.max_kl:.3g}"
        raise BadInput(f"{checkpoint} did not pass its check (verdict {verdict.verdict}{kl}): {advice}")
