"""What a check found, and how it is said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.config import ForwardConfig, Latent
from conversion_lib.logits.verdict.compare import BlockDifference, LayerDifference, Spot
from conversion_lib.storage.interface import Location

Engine = Literal["ferry", "maxtext"]


class CheckResult(BaseModel):
    """What a check found: `check.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    verdict: Literal["pass", "fail"]
    reason: str
    """What the verdict rests on and, of a failure, where to look."""
    max_kl: float
    """The largest KL(original || checkpoint) of a token, in nats; infinite where a logit is not finite."""
    mean_kl: float
    max_abs_diff: float
    top1: float
    top10: float
    jaccard: float
    rank_agreement: float
    threshold: float
    """On max_kl."""
    mean_threshold: float | None
    """On mean_kl, where what is allowed was measured; None where the largest says enough."""
    threshold_rests_on: str
    layers: list[LayerDifference]
    """Empty where only one side's layers were seen: golden logits have none, and MaxText shows none."""
    output: BlockDifference | None
    """The final norm and the projection to logits; None where `layers` is empty."""
    first_departing: Spot | None
    """Of a failed check: the first block that is off, None where every block agrees or none was compared."""
    not_finite: Spot | None
    """Where the checkpoint's values stopped being finite."""
    engine: Engine
    """What ran the checkpoint."""
    digest: str
    """Of the checkpoint that was checked; the verdict is about nothing else."""
    notes: list[str]
    """What the check did not look at: experts that no token went to, an indexer that had nothing to choose."""
    report: str
    reference: str
    """What it was compared with: hex sha256 of the golden file, or of the directory as `identity.py` has it."""
    tokens: int
    """Asked for as the longest prompt."""
    tokens_compared: int
    """Of all prompts."""
    already: bool = False
    """True where an earlier check of the same things passed, and was not done again."""
    bytes_in: int
    """Of the checkpoint's leaves, all of which were read."""
    seconds: float
    identity: dict[str, str]
    """What was compared, by whom and when: names of repository, commit, target, versions; ready for display."""
    peak_bytes: int
    """The largest resident memory of the process that checked; with MaxText as the engine, its own is not in it."""


def earlier_result(path: Location) -> CheckResult | None:
    """The verdict that an earlier check left, None where there is none of this version."""
    try:
        return CheckResult.model_validate_json(path.read() or b"")
    except (OSError, ValidationError):
        return None


def reason(result: CheckResult, config: ForwardConfig) -> str:
    """One sentence or two."""
    largest = f"Largest KL of a token {result.max_kl:.2e}, threshold {result.threshold:.2g}"
    if result.mean_threshold is not None:
        largest += f"; mean {result.mean_kl:.2e}, threshold {result.mean_threshold:.2g}"
    if result.verdict == "pass":
        return f"{largest}."
    spot = result.not_finite or result.first_departing
    if result.not_finite is not None:
        where = f"values are not finite from {spot} on"
    elif spot is not None and spot.layer == -1:
        where = "the embedding is off already"
    elif spot is not None:
        where = (
            f"{spot} is the first block (of layers 0 to {len(config.layers) - 1}) that departs from the original; it "
            f"{_by_how_much(_block(result.layers, spot))}"
        )
    elif result.output is not None:
        departs = f", which {_by_how_much(result.output)}" if result.output.departs else ""
        where = f"every layer agrees, so look at the final norm and the output projection{departs}"
    elif result.engine == "maxtext":
        where = "--engine ferry shows which layer departs"
    else:
        where = "check against the Hugging Face directory to see which layer departs"
    return f"{largest}: {where}."


def _block(layers: Sequence[LayerDifference], spot: Spot) -> BlockDifference:
    return next(entry for entry in layers if entry.layer == spot.layer).blocks[spot.block]


def _by_how_much(block: BlockDifference) -> str:
    found, allowed = block.relative, block.allowed
    if found.mean <= allowed.mean:
        return f"is off by {found.largest:.1e} of a token's length (allowed {allowed.largest:.1e})"
    return f"is off by {found.mean:.1e} of a token's length on average (allowed {allowed.mean:.1e})"


def notes(config: ForwardConfig, prompts: Sequence[Array], idle_experts: int) -> list[str]:
    """What a check of these prompts leaves open."""
    found = []
    if idle_experts:
        found.append(
            f"no token of the prompts went to {idle_experts} of {config.experts} experts, so their weights are "
            "unchecked: --tokens with a larger number reaches more"
        )
    latent = next((layer.attention for layer in config.layers if isinstance(layer.attention, Latent)), None)
    indexer = latent.indexer if latent else None
    if indexer is not None and max(map(len, prompts)) <= indexer.top_k:
        found.append(
            f"the indexer keeps {indexer.top_k} tokens, as many as the longest prompt has or more, so its "
            f"weights are unchecked: --tokens above {indexer.top_k} puts it to work"
        )
    return found
