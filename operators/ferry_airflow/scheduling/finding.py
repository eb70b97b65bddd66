"""What a look at one target of one model found. A light module: the page of all models imports it too."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from conversion_lib.progress import format_bytes
from conversion_lib.record import Time

ROWS = "rows"
"""The XCom key under which tasks leave their findings."""

State = Literal["new", "published", "running", "failed", "skipped", "wrong"]


class Finding(BaseModel):
    """One target of one model at one look. It goes through XCom to the page of all models.

    Attributes:
        model: The first level of the published path.
        revision: As in the catalogue, such as `branch main`.
        target: The target's name in a published path.
        state: `new`: an onboarding will be triggered. `published`. `running`: its onboarding is running or queued.
            `failed`: its onboarding ended without publishing. `skipped`: the Hub or the destination did not answer.
            `wrong`: a person must correct the catalogue or a permission.
        note: Why, in one line.
        commit: The last one seen on the Hub; None if the Hub did not answer.
        run_id: Of its onboarding.
        url: Where that commit is published; None if it is not. So are the fields below.
        published: When, in UTC, ISO 8601.
        verdict: `pass`, `fail` or `unchecked`.
        max_kl: The largest KL divergence of a token, in nats; None also if it is not finite.
        bytes: The size of all files.
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
    published: Time | None = None
    verdict: str | None = None
    max_kl: float | None = None
    bytes: int | None = None

    @property
    def row(self) -> tuple[str, ...]:
        """Its cells in the table of a summary."""
        size = "" if self.bytes is None else format_bytes(self.bytes)
        run = f"run {self.run_id}" if self.run_id and self.state != "published" else ""
        told = "; ".join(part for part in (self.note, run) if part)
        return self.repo, self.target, (self.commit or "")[:12], self.state, self.verdict or "", size, told
