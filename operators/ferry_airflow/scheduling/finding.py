"""What a look at one target of one model found: light, since the page of all models reads it too."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from conversion_lib.progress import format_bytes

ROWS = "rows"
"""The XCom key under which tasks leave their findings."""

State = Literal["new", "published", "running", "failed", "skipped", "wrong"]


class Finding(BaseModel):
    """One target of one model at one look; what goes through XCom, and what the page of all models shows.

    state: `new`, an onboarding is to be triggered; `published`; `running`, its onboarding is under way or queued;
    `failed`, its onboarding has ended without publishing it; `skipped`, the Hub or the destination did not answer;
    `wrong`, somebody has to correct the catalogue or a permission. note: why, in one line. commit: the last one seen
    at the Hub. The rest is what is published of that commit: since when (UTC, ISO 8601), the verdict of its check,
    the largest KL divergence of a token in nats, bytes of all files.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    repo: str
    model: str
    revision: str
    target: str
    destination: str
    state: State
    note: str = ""
    commit: str | None = None
    run_id: str | None = None
    url: str | None = None
    published: str | None = None
    verdict: str | None = None
    max_kl: float | None = None
    bytes: int | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of a table for people."""
        size = "" if self.bytes is None else format_bytes(self.bytes)
        run = f"run {self.run_id}" if self.run_id and self.state != "published" else ""
        told = "; ".join(part for part in (self.note, run) if part)
        return self.repo, self.target, (self.commit or "")[:12], self.state, self.verdict or "", size, told
