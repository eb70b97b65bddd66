"""The whole check: reference, forward pass, comparison, report."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib.config import load_config
from conversion_lib.errors import BadInput
from conversion_lib.files import write_atomically
from conversion_lib.identity import source_identity
from conversion_lib.logits.compare import (
    Comparison,
    LayerDifference,
    compare_layer,
    compare_logits,
    first_departing,
)
from conversion_lib.logits.config import ForwardConfig, parse_config
from conversion_lib.logits.forward import forward
from conversion_lib.logits.golden import load_golden, save_golden
from conversion_lib.logits.prompts import fixed_prompts
from conversion_lib.logits.reference import Reference, transformers_reference
from conversion_lib.logits.report import ReportData, render, require_plotting
from conversion_lib.logits.weights import BiasOrder
from conversion_lib.manifest import checkpoint_digest
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import (
    CHECK_NAME,
    HF_DIR_NAME,
    REPORT_DIR_NAME,
    REPORT_PAGE_NAME,
    CheckpointRecord,
    checkpoint_root,
    read_record,
)
from conversion_lib.sources.base import Array
from conversion_lib.sources.orbax import open_orbax
from conversion_lib.sources.safetensors import SafetensorsSource

EXACT_KL = 1e-5
"""Where both sides hold the same bits, what is left is the order of float32 sums: on tiny models of all
families at most 2e-11. Real models are deeper and their sums longer, so there is room above that."""

ROUNDED_KL = 1e-3
"""Where Llama's query was scaled and rounded once more in bf16. Measured on tiny Llamas, 8 seeds each: at most
3.2e-5 with 4 to 32 layers and head widths 32 and 128, and 1.7e-4 with tied embeddings, whose logits are
larger. A mistake in a layer is far above it (tests/logits/test_check.py)."""

EXACT_TOLERANCE, ROUNDED_TOLERANCE = 1e-4, 0.05
"""Relative difference of the stream behind a layer above which the layer departs: same bits stayed below 2e-5,
a rounded query below 8e-3."""

BIAS_ORDERS: dict[str, BiasOrder] = {"0.2.5": "layers_first", "main": "experts_first"}
"""How each MaxText wants DeepSeek-V3's scanned gate bias in params/params."""


class CheckResult(BaseModel):
    """What a check found: `check.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    verdict: Literal["pass", "fail"]
    reason: str
    """One sentence: what the verdict rests on and, of a failure, where to look."""
    max_kl: float
    """The largest KL(original || checkpoint) of a token, in nats; infinite where a logit is not finite."""
    mean_kl: float
    max_abs_diff: float
    top1: float
    top10: float
    layers: list[LayerDifference]
    """Empty where the reference is a golden file, which holds logits only."""
    digest: str
    """Of the checkpoint that was checked; the verdict is about nothing else."""
    threshold: float
    first_departing_layer: int | None
    """Of a failed check: the first layer that is off (-1 the embedding), None where every layer agrees."""
    notes: list[str]
    """What the check did not look at: experts that no token went to, an indexer that had nothing to choose."""
    report: str
    reference: str
    """What it was compared with: hex sha256 of the golden file, or of the directory as `identity.py` has it."""
    tokens: int
    already: bool = False
    """True where an earlier check of the same things passed, and was not done again."""
    bytes_in: int
    """Of the checkpoint's leaves, all of which were read."""
    seconds: float


def run_check(
    checkpoint: Path,
    reference: Path,
    *,
    report_dir: Path | None = None,
    max_kl: float | None = None,
    tokens: int = 512,
    save_golden: Path | None = None,
    reporter: Reporter = SILENT,
) -> CheckResult:
    """Compares the logits of a MaxText checkpoint with the original's.

    checkpoint: DST, DST/0 or DST/0/items. reference: a Hugging Face directory, or an .npz of `save_golden`.
    report_dir: where check.json and report.html go, DST/report by default; both are written whatever the
    verdict. max_kl: the threshold, by default one that fits what the checkpoint's record says of it. tokens:
    length of the long prompt. save_golden: where to keep the reference's logits.

    Where report_dir has a check that passed, of the same checkpoint, reference, threshold and tokens, that stands.

    Raises BadInput for inputs that cannot be compared; a check that fails is a result, not an error.
    """
    started = time.monotonic()
    require_plotting()
    source = open_orbax(checkpoint)
    record = read_record(checkpoint)
    threshold, tolerance = _limits(record, max_kl)
    directory = report_dir or checkpoint_root(checkpoint) / REPORT_DIR_NAME
    directory.mkdir(parents=True, exist_ok=True)
    digest, identity = checkpoint_digest(checkpoint), _reference_identity(reference)
    earlier = _earlier(directory / CHECK_NAME)
    if earlier is not None and save_golden is None:
        same = (earlier.digest, earlier.reference, earlier.tokens, earlier.threshold)
        if earlier.verdict == "pass" and same == (digest, identity, tokens, threshold):
            reporter.say(f"{checkpoint} has passed this very check already: {earlier.report}")
            return earlier.model_copy(update={"already": True, "bytes_in": 0})

    wanted = _reference(reference, tokens, directory, save_golden, reporter)
    config = parse_config(wanted.config)
    _require_same_model(checkpoint, config, reference)
    layers: list[LayerDifference] = []

    def observe(layer: int, stream: Array) -> None:
        layers.append(compare_layer(layer, wanted.hidden[layer + 1], stream))

    order = BIAS_ORDERS[record.target.maxtext] if record else None
    found = forward(
        source, config, wanted.prompts, bias_order=order, observe=observe if wanted.hidden else None, reporter=reporter
    )
    comparison = compare_logits(wanted.logits, found.logits)
    passed = math.isfinite(comparison.max_kl) and comparison.max_kl <= threshold
    result = CheckResult(
        verdict="pass" if passed else "fail",
        reason="",
        max_kl=comparison.max_kl,
        mean_kl=comparison.mean_kl,
        max_abs_diff=comparison.max_abs_diff,
        top1=comparison.top1,
        top10=comparison.top10,
        layers=layers,
        digest=digest,
        threshold=threshold,
        first_departing_layer=None if passed else first_departing(layers, tolerance),
        notes=_notes(config, wanted.prompts, found.idle_experts),
        report=str(directory / REPORT_PAGE_NAME),
        reference=identity,
        tokens=tokens,
        bytes_in=sum(info.nbytes for info in source.tensors.values()),
        seconds=round(time.monotonic() - started, 3),
    )
    result = result.model_copy(update={"reason": _reason(result, config)})
    data = ReportData(
        title=record.model_name if record else str(checkpoint_root(checkpoint)),
        verdict=result.verdict,
        reason=result.reason,
        threshold=threshold,
        tolerance=tolerance,
        figures=_figures(result, comparison),
        notes=result.notes,
        identity=_identity(checkpoint, record, wanted, result),
        prompts=wanted.prompts,
        reference=wanted.logits,
        candidate=found.logits,
        comparison=comparison,
        layers=layers,
    )
    write_atomically(directory / REPORT_PAGE_NAME, render(data).encode())
    write_atomically(directory / CHECK_NAME, result.model_dump_json(indent=2).encode() + b"\n")
    for text in (f"{result.verdict}: {result.reason}", *(f"note: {note}" for note in result.notes)):
        reporter.say(text)
    return result


def _reference_identity(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise BadInput(f"{path} is neither a Hugging Face directory nor a golden file")
    return source_identity(SafetensorsSource(path))


def _earlier(path: Path) -> CheckResult | None:
    """The verdict that an earlier check left, None where there is none of this version."""
    try:
        return CheckResult.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _limits(record: CheckpointRecord | None, max_kl: float | None) -> tuple[float, float]:
    """The threshold on KL, and the tolerance that tells which layer departs first."""
    rounded = record is not None and not record.exact and record.target.save_dtype == "bfloat16"
    threshold, tolerance = (ROUNDED_KL, ROUNDED_TOLERANCE) if rounded else (EXACT_KL, EXACT_TOLERANCE)
    return (threshold if max_kl is None else max_kl), tolerance


def _reference(path: Path, tokens: int, scratch: Path, golden: Path | None, reporter: Reporter) -> Reference:
    if path.is_file():
        if golden is not None:
            raise BadInput(f"{path} is a golden file already: --save-golden wants a Hugging Face directory")
        reporter.say(f"reference logits from {path}")
        return load_golden(path)
    config = parse_config(load_config(path).raw)
    prompts = fixed_prompts(config.vocab, tokens, config.max_positions)
    reference = transformers_reference(path, prompts, scratch=scratch, reporter=reporter)
    if golden is not None:
        save_golden(golden, reference)
    return reference


def _require_same_model(checkpoint: Path, config: ForwardConfig, reference: Path) -> None:
    """Raises BadInput where the checkpoint's own copy of config.json is of another model than the reference's."""
    directory = checkpoint_root(checkpoint) / HF_DIR_NAME
    if not (directory / "config.json").exists():
        return
    wanted, found = asdict(config), asdict(parse_config(load_config(directory).raw))
    for sizes in (wanted, found):
        sizes["rope"].pop("values")  # spelled in more than one way
    differing = [f"{key} {found[key]!r} against {wanted[key]!r}" for key in wanted if wanted[key] != found[key]]
    if differing:
        raise BadInput(f"{reference} is of another model than {checkpoint}: {'; '.join(differing)}")


def _reason(result: CheckResult, config: ForwardConfig) -> str:
    largest = f"Largest KL of a token {result.max_kl:.2e}, threshold {result.threshold:g}"
    if result.verdict == "pass":
        return f"{largest}."
    layer = result.first_departing_layer
    if layer == -1:
        where = "the embedding is off already"
    elif layer is not None:
        where = f"layer {layer} (of 0 to {config.layers - 1}) is the first that departs from the original"
    elif result.layers:
        where = "every layer agrees, so look at the final norm and the output projection"
    else:
        where = "check against the Hugging Face directory to see which layer departs"
    return f"{largest}: {where}."


def _notes(config: ForwardConfig, prompts: Sequence[Array], idle_experts: int) -> list[str]:
    notes = []
    if idle_experts and config.moe is not None:
        experts = (config.layers - config.moe.dense_layers) * config.moe.experts
        notes.append(
            f"no token of the prompts went to {idle_experts} of {experts} experts, so their weights are "
            "unchecked: --tokens with a larger number reaches more"
        )
    if config.indexer is not None and max(map(len, prompts)) <= config.indexer.top_k:
        notes.append(
            f"the indexer keeps {config.indexer.top_k} tokens, as many as the longest prompt has or more, so its "
            f"weights are unchecked: --tokens above {config.indexer.top_k} puts it to work"
        )
    return notes


def _figures(result: CheckResult, comparison: Comparison) -> list[tuple[str, str]]:
    return [
        ("largest KL of a token", f"{result.max_kl:.2e}"),
        ("mean KL", f"{result.mean_kl:.2e}"),
        ("threshold", f"{result.threshold:g}"),
        ("largest difference of a logit", f"{result.max_abs_diff:.2e}"),
        ("same most likely token", f"{result.top1:.2%}"),
        ("ten most likely in common", f"{result.top10:.2%}"),
        ("tokens", f"{len(comparison.kl)}"),
    ]


def _identity(
    checkpoint: Path, record: CheckpointRecord | None, reference: Reference, result: CheckResult
) -> dict[str, str]:
    identity = {"checkpoint": str(checkpoint_root(checkpoint)), "digest": result.digest}
    if record is not None:
        identity |= {
            "model": f"{record.model_name} ({record.family})",
            "target": record.target.slug,
            "fingerprint": record.fingerprint,
            "source": record.origin.repo or record.origin.path,
            "commit": record.origin.commit or "",
        }
    identity |= reference.origin
    identity["prompts"] = ", ".join(f"{len(prompt)} tokens" for prompt in reference.prompts)
    for package in ("ferry", "jax"):
        try:
            identity[package] = version(package)
        except PackageNotFoundError:
            continue
    identity["seconds"] = f"{result.seconds:g}"
    return identity
