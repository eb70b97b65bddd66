"""The result of a check, and its wording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.core.tensors import Array
from conversion_lib.logits.forward.config import ForwardConfig, Latent
from conversion_lib.logits.verdict.compare import BlockDifference, LayerDifference, Spot
from conversion_lib.storage.interface import Location

Engine = Literal["ferry", "maxtext"]


Passed = Literal["pass", "fail"]


class ModelPart(BaseModel):
    """Whether MaxText computes what the original does, whatever the weights are."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    verdict: Passed
    max_kl: float
    """The largest KL(original's function || MaxText's) of a token on the checkpoint's weights, in nats; 0 where the
    functions are one."""
    threshold: float
    differs: str
    """How they differ, in words; empty where they do not."""
    settings: dict[str, Any]
    """What a MaxText run has to pass for it; empty where nothing is known of MaxText's model."""


class CheckResult(BaseModel):
    """The result of a check, as in `check.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    verdict: Passed
    """Of both parts: a checkpoint passes where its weights are right and MaxText computes with them what it should."""
    weights: Passed
    """Whether the checkpoint's values are the original's. The figures below are of this part."""
    model: ModelPart
    reason: str
    """The figures behind the verdict and, after a failure, where to look."""
    max_kl: float
    """The largest KL(original || checkpoint) of a token, in nats; infinite where a logit is not finite."""
    mean_kl: float
    """In nats. This and the figures up to `rank_agreement` are those of `Comparison`."""
    max_abs_diff: float
    top1: float
    top10: float
    jaccard: float
    rank_agreement: float
    threshold: float
    """Limit on max_kl, in nats."""
    mean_threshold: float | None
    """Limit on mean_kl, in nats, if the threshold was measured; None if only max_kl is limited."""
    threshold_rests_on: str
    """Where the threshold comes from, or `--max-kl`."""
    layers: list[LayerDifference]
    """Empty if only one side's layers were seen: a golden file has none, and MaxText shows none."""
    output: BlockDifference | None
    """The final norm and the output projection; None if `layers` is empty."""
    first_departing: Spot | None
    """The first block that departs in a failed check; None if every block agrees or none was compared."""
    not_finite: Spot | None
    """The first block of the checkpoint with a NaN or an infinity; None if there is none."""
    source_not_finite: str | None = None
    """The first block of the original with a NaN or an infinity, and the tensor that has it; None if there is none."""
    engine: Engine
    """What computed the checkpoint's logits."""
    digest: str
    """Digest of the checkpoint that was checked. The verdict holds only for this digest."""
    covers: dict[str, str]
    """SHA-256, in hexadecimal, of each file that is published with it, by path; the report is one of them. `ferry
    publish` refuses a checkpoint in which one of them has changed since."""
    notes: list[str]
    """What was not checked: experts without a token, an indexer that had nothing to choose."""
    report: str
    """Path or URL of the HTML report."""
    reference: str
    """Identity of the reference: hex sha256 of the golden file, or `source_identity` of the directory."""
    tokens: int
    """Requested length of the longest prompt."""
    tokens_compared: int
    """Tokens of all prompts."""
    already: bool = False
    """True if an earlier check of the same inputs had passed and was not repeated."""
    bytes_in: int
    """Bytes of the checkpoint's leaves."""
    seconds: float
    identity: dict[str, str]
    """What was compared and when: repository, commit, target, versions, as text for display."""
    peak_bytes: int
    """Peak resident bytes of the checking process. Those of MaxText, a process of its own, are not included."""


def earlier_result(path: Location) -> CheckResult | None:
    """Reads the result of an earlier check; None if there is none, or it does not have the fields of this version."""
    try:
        return CheckResult.model_validate_json(path.read() or b"")
    except (OSError, ValidationError):
        return None


def reason(result: CheckResult, config: ForwardConfig) -> str:
    """Words the verdict: the figures behind it, where to look after a failure, and how MaxText's model differs."""
    weights, model = _weights_reason(result, config), result.model
    if not model.differs:
        return weights
    right = "Right weights" if result.weights == "pass" else "The weights aside"
    line = f"{right}; {model.differs}: largest KL of a token {model.max_kl:.2e}, limit {model.threshold:.2g}"
    if model.verdict == "fail":
        line += ". No setting of MaxText changes that; --max-model-kl sets another limit"
    return f"{weights} {line}."


def _weights_reason(result: CheckResult, config: ForwardConfig) -> str:
    largest = f"Largest KL of a token {result.max_kl:.2e}, threshold {result.threshold:.2g}"
    if result.mean_threshold is not None:
        largest += f"; mean {result.mean_kl:.2e}, threshold {result.mean_threshold:.2g}"
    if result.weights == "pass":
        return f"{largest}."
    spot = result.not_finite or result.first_departing
    if result.source_not_finite is not None:
        where = f"the original's own values are not finite {result.source_not_finite}"
    elif result.not_finite is not None:
        where = f"values are not finite from {spot} on"
    elif spot is not None and spot.layer == -1:
        where = "the embedding itself departs"
    elif spot is not None:
        where = (
            f"{spot} is the first block (of layers 0 to {len(config.layers) - 1}) that departs from the original: it "
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
    """Returns a note on each thing that a check of these prompts, int32 (tokens,) each, does not cover."""
    found = []
    if config.tokens < config.vocab:
        found.append(
            f"MaxText's embedding has {config.tokens} of the {config.vocab} rows: tokens from {config.tokens} on are "
            "cut, and no logits of theirs are compared"
        )
    if idle_experts:
        found.append(
            f"{idle_experts} of {config.experts} experts received no token, so their weights are unchecked: "
            "more --tokens reach more experts"
        )
    latent = next((layer.attention for layer in config.layers if isinstance(layer.attention, Latent)), None)
    indexer = latent.indexer if latent else None
    if indexer is not None and max(map(len, prompts)) <= indexer.top_k:
        found.append(
            f"the indexer keeps {indexer.top_k} tokens, and no prompt is longer, so its weights are unchecked: "
            f"use --tokens above {indexer.top_k}"
        )
    return found
