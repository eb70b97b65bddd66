"""The whole logit check: runs original and checkpoint, compares them, writes the report."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.core.memory_bound import memory_bound
from conversion_lib.core.process import peak_bytes
from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput, FerryError
from conversion_lib.logits import run
from conversion_lib.logits.by_maxtext.engine import maxtext_logits, require_maxtext
from conversion_lib.logits.by_maxtext.function import maxtext_function_logits, model_part
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.config import ForwardConfig, differences
from conversion_lib.logits.forward.memory import divide
from conversion_lib.logits.forward.weights import BiasOrder
from conversion_lib.logits.reference.golden import load_golden, require_golden_name, save_golden
from conversion_lib.logits.reference.not_finite import not_finite_tensor
from conversion_lib.logits.reference.prompts import choose_prompts
from conversion_lib.logits.reference.reference import Reference, open_reference, reference_config, require_libraries
from conversion_lib.logits.verdict.compare import Comparison, compare_logits, first_departing
from conversion_lib.logits.verdict.plots import require_plotting
from conversion_lib.logits.verdict.report import ReportData, render
from conversion_lib.logits.verdict.result import CheckResult, Engine, ModelPart, earlier_result, notes, reason
from conversion_lib.logits.verdict.rounding import dither_of
from conversion_lib.maxtext.model import MaxTextModel, maxtext_model
from conversion_lib.models.hf_config import CONFIG_NAME, ModelConfig, config_of
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.publish.staged import checkpoint_digest, open_staged, sha256_of
from conversion_lib.record import (
    CHECK_NAME,
    HF_DIR_NAME,
    MAX_MODEL_KL,
    REPORT_DIR_NAME,
    REPORT_PAGE_NAME,
    CheckpointRecord,
)
from conversion_lib.sources.fingerprint import source_identity
from conversion_lib.sources.orbax import OrbaxSource, Where, open_orbax, record_of, root_of
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.storage.interface import Location
from conversion_lib.storage.locations import location

DEFAULT_BUDGET = 6 << 30
"""Bytes."""

LIBRARIES_BYTES = 1 << 30
"""jax, torch and what they compile."""

BIAS_ORDERS: dict[str, BiasOrder] = {"0.2.5": "layers_first", "main": "experts_first"}
"""Layout of DeepSeek-V3's scanned gate bias by MaxText version."""


@dataclass(frozen=True)
class Options:
    """Options of a check.

    Attributes:
        max_kl: The largest KL divergence of a token, in nats, as the only criterion. None: a threshold that fits the
            checkpoint (`rounding.py`), and no block may depart.
        max_model_kl: How far MaxText's function may be from the original's, as `ferry check` has it.
        tokens: Tokens of the longest prompt.
        save_golden: File to write the reference's logits to. None: they are not kept.
        memory_budget: Bytes.
        engine: What runs the checkpoint: Ferry's forward pass, or MaxText.
        maxtext_python: The interpreter that has MaxText; required by the engine `maxtext`, refused without it.
    """

    max_kl: float | None = None
    max_model_kl: float = MAX_MODEL_KL
    tokens: int = 512
    save_golden: Path | None = None
    memory_budget: int = DEFAULT_BUDGET
    engine: Engine = "ferry"
    maxtext_python: Path | None = None


def run_check(
    checkpoint: Where,
    reference: Path,
    *,
    report_dir: Path | None = None,
    options: Options | None = None,
    reporter: Reporter = SILENT,
) -> CheckResult:
    """Compares the logits of a MaxText checkpoint with those of the original.

    If `report_dir` holds a check that passed with the same checkpoint, reference, threshold, engine and tokens, that
    result is returned.

    Args:
        checkpoint: DST, DST/0 or DST/0/items.
        reference: A Hugging Face directory, or a golden file.
        report_dir: Where check.json and report.html are written, whatever the verdict. None: DST/report.
        options: Threshold, tokens, memory budget, engine.
        reporter: Shows progress and messages.

    Returns:
        The figures and the verdict. A check that fails is a result, not an error.

    Raises:
        BadInput: Something is missing or cannot be compared: a package, a wrong option, another model, a leaf that
            does not match config.json, a memory budget that is too small.
        OutsideFailure: A bucket does not answer, or MaxText ends with an error.
    """
    started, options = time.monotonic(), options or Options()
    _require_usable(reference, options)
    source, record = open_orbax(checkpoint), record_of(checkpoint)
    directory = location(report_dir) if report_dir else root_of(checkpoint) / REPORT_DIR_NAME
    digest, identity = checkpoint_digest(str(checkpoint)), _reference_identity(reference)
    companions = open_staged(str(checkpoint)).companions()
    earlier, page = earlier_result(directory / CHECK_NAME), (directory / REPORT_PAGE_NAME).read()
    stands = earlier is not None and _still_stands(earlier, digest, identity, options)
    if earlier is not None and stands and page is not None and earlier.covers == _covers(companions, page):
        reporter.say(f"{checkpoint} has already passed this check: {earlier.report}")
        return earlier.model_copy(update={"already": True, "bytes_in": 0})

    with memory_bound(options.memory_budget + LIBRARIES_BYTES, str(checkpoint)):
        expected, found, config, model = _run(checkpoint, source, record, reference, options, reporter)
    if config.tokens < config.vocab:  # MaxText leaves out rows that belong to no token
        expected = replace(expected, logits=[logits[:, : config.tokens] for logits in expected.logits])
    comparison = compare_logits(expected.logits, found.logits)
    seconds, peak = round(time.monotonic() - started, 3), peak_bytes()
    result = CheckResult(
        **_verdict(comparison, found, model, options),
        reason="",
        max_kl=comparison.max_kl,
        mean_kl=comparison.mean_kl,
        max_abs_diff=comparison.max_abs_diff,
        top1=comparison.top1,
        top10=comparison.top10,
        jaccard=comparison.jaccard,
        rank_agreement=comparison.rank_agreement,
        layers=found.layers,
        output=found.output,
        not_finite=found.lost,
        source_not_finite=_source_not_finite(reference, expected, found),
        engine=options.engine,
        digest=digest,
        covers={},
        notes=notes(config, expected.prompts, found.idle_experts),
        report=str(directory / REPORT_PAGE_NAME),
        reference=identity,
        tokens=options.tokens,
        tokens_compared=len(comparison.kl),
        bytes_in=sum(info.nbytes for info in source.tensors.values()),
        seconds=seconds,
        peak_bytes=peak,
        identity={
            **_identity(checkpoint, record, expected),
            "digest": digest,
            "engine": options.engine,
            "checked": datetime.now(UTC).isoformat(timespec="seconds"),
            "took": f"{seconds:.1f} s",
            "peak memory": format_bytes(peak),
        },
    )
    result = result.model_copy(update={"reason": reason(result, config)})
    title = record.model_name if record else str(root_of(checkpoint))
    page = render(ReportData(title, result, expected.prompts, expected.logits, found.logits, comparison)).encode()
    result = result.model_copy(update={"covers": _covers(companions, page)})
    _write_report(directory, page, result)
    return result


def _covers(companions: Mapping[str, str], page: bytes) -> dict[str, str]:
    """The SHA-256 of each file that a verdict covers beside the weights, the report among them."""
    return {**companions, f"{REPORT_DIR_NAME}/{REPORT_PAGE_NAME}": sha256_of(page)}


def _write_report(directory: Location, page: bytes, result: CheckResult) -> None:
    """Writes the page, then the verdict."""
    try:
        directory.make()
        (directory / REPORT_PAGE_NAME).write(page)
        (directory / CHECK_NAME).write(result.model_dump_json(indent=2).encode() + b"\n")
    except FerryError as error:  # from a bucket
        raise type(error)(f"{error}; the report is lost: use `--report DIR` to write it to a directory") from error


def _verdict(comparison: Comparison, found: run.Findings, model: ModelPart, options: Options) -> dict[str, Any]:
    """The fields of CheckResult that say whether the checkpoint passes, and why."""
    departing = first_departing(found.layers)
    agree = departing is None and (found.output is None or not found.output.departs)
    threshold, mean_threshold = found.allowed, found.allowed_mean
    if options.max_kl is not None:
        threshold, mean_threshold, agree = options.max_kl, None, True
    close = math.isfinite(comparison.max_kl) and comparison.max_kl <= threshold
    passed = agree and close and (mean_threshold is None or comparison.mean_kl <= mean_threshold)
    return {
        "verdict": "pass" if passed and model.verdict == "pass" else "fail",
        "weights": "pass" if passed else "fail",
        "model": model,
        "threshold": threshold,
        "mean_threshold": mean_threshold,
        "threshold_rests_on": _rests_on(options, found),
        "first_departing": None if passed else departing,
    }


def _require_usable(reference: Path, options: Options) -> None:
    """Raises BadInput for what is wrong before anything is read."""
    require_plotting()
    if options.engine == "maxtext":
        require_maxtext(options.maxtext_python)
    elif options.maxtext_python is not None:
        raise BadInput("--maxtext-python is for --engine maxtext only")
    if reference.is_dir():
        require_libraries()
    if options.save_golden is not None:
        require_golden_name(options.save_golden)
        if reference.is_file():
            raise BadInput(
                f"{reference} is a golden file already: --save-golden needs a Hugging Face directory as the reference"
            )


def _still_stands(earlier: CheckResult, digest: str, identity: str, options: Options) -> bool:
    """Whether an earlier check of the same inputs passed, and this one has nothing more to do."""
    same = (earlier.digest, earlier.reference, earlier.tokens, earlier.engine)
    threshold = options.max_kl is None or options.max_kl == earlier.threshold
    given = (options.max_kl is None) == (earlier.threshold_rests_on != GIVEN)
    threshold = threshold and options.max_model_kl == earlier.model.threshold
    now = (digest, identity, options.tokens, options.engine)
    return earlier.verdict == "pass" and same == now and threshold and given and options.save_golden is None


def _run(
    checkpoint: Where,
    source: OrbaxSource,
    record: CheckpointRecord | None,
    path: Path,
    options: Options,
    reporter: Reporter,
) -> tuple[Reference, run.Findings, ForwardConfig, ModelPart]:
    """The original's logits, what the checkpoint's run found, and whether MaxText's model computes the same."""
    own = _own_config(checkpoint)
    golden = load_golden(path, own) if path.is_file() else None
    raw = ModelConfig(golden.config, path) if golden else reference_config(path)
    config = parse_config(raw.raw, raw.path)
    model = maxtext_model(raw, record.model_name if record else "")
    _require_same_model(checkpoint, own, config, path)
    if golden:
        prompts = golden.prompts
    else:
        prompts = choose_prompts(path, config.tokens, options.tokens, config.max_positions, reporter)
    _require_rows(prompts, config, path)
    memory = divide(options.memory_budget, config, sum(map(len, prompts)))
    order = BIAS_ORDERS[record.target.maxtext] if record else None
    subject = run.Subject(source, config, order, memory)
    reporter.say(f"{sum(map(len, prompts))} tokens in {len(prompts)} prompts, in float32")
    if options.engine == "maxtext":
        expected = golden or run.original(path, prompts, memory, reporter)
        found, theirs = _maxtext(subject, model, checkpoint, expected, options, reporter)
    else:
        if golden is None:
            expected, found = run.in_step(subject, path, prompts, reporter)
        else:
            expected, found = golden, run.alone(subject, prompts, golden.dtype, reporter)
        theirs = maxtext_function_logits(subject, model, prompts, reporter)
    if options.save_golden is not None:
        save_golden(options.save_golden, expected)
    return expected, found, config, model_part(model, found.logits, theirs, options.max_model_kl)


def _maxtext(
    subject: run.Subject,
    model: MaxTextModel | None,
    checkpoint: Where,
    expected: Reference,
    options: Options,
    reporter: Reporter,
) -> tuple[run.Findings, list[Array] | None]:
    """What a run of the checkpoint by MaxText itself found, and MaxText's logits apart where its function is another.

    Ferry's forward pass runs beside it only where what is allowed has to be measured, or where the weights have to be
    told apart from the function.
    """
    dither = dither_of(subject.config, subject.checkpoint.tensors, expected.dtype)
    apart = model is not None and model.differs
    measured = run.alone(subject, expected.prompts, expected.dtype, reporter) if dither or apart else run.Findings()
    assert options.maxtext_python is not None  # require_maxtext
    logits = maxtext_logits(options.maxtext_python, checkpoint, expected, reporter)
    logits = [prompt[:, : subject.config.tokens] for prompt in logits]  # padding rows belong to no token
    if apart:
        return measured, logits
    measured.logits, measured.lost, measured.idle_experts = logits, None, 0
    return measured, None


GIVEN = "--max-kl"


def _rests_on(options: Options, found: run.Findings) -> str:
    if options.max_kl is not None:
        return GIVEN
    if found.dither is None:
        return "the order of float32 sums, since the checkpoint holds the original's values"
    if found.dither.is_rounding:
        return f"the measured effect of rounding the values of {len(found.dither.leaves)} leaves of this model"
    return "the measured error of float32 in this model's delta nets, since the checkpoint holds the original's values"


def _reference_identity(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise BadInput(f"{path} is neither a Hugging Face directory nor a golden file")
    return source_identity(SafetensorsSource(path))


def _source_not_finite(path: Path, wanted: Reference, found: run.Findings) -> str | None:
    """Where the original has a NaN or an infinity, and in which tensor; None if it has none, or ours come earlier."""
    spot = found.source_lost
    if all(np.isfinite(logits).all() for logits in wanted.logits) and spot is None:
        return None
    if spot is not None and found.lost is not None and found.lost.order < spot.order:
        return None
    where = f"from {spot} on" if spot else "in its logits"
    if not path.is_dir():
        return f"{where}, in {path}"
    tensor = not_finite_tensor(open_reference(path), spot.layer if spot else None)
    return f"{where}: the source's {tensor}" if tensor else f"{where}, and every tensor of the source is: they overflow"


def _require_rows(prompts: Sequence[Array], config: ForwardConfig, reference: Path) -> None:
    """Raises BadInput if a prompt has a token without a row in MaxText's embedding, as golden logits may."""
    for number, prompt in enumerate(prompts, start=1):
        if (largest := int(prompt.max())) >= config.tokens:
            raise BadInput(
                f"{reference}: prompt {number} has token {largest}, and MaxText's embedding of this model has rows for "
                f"{config.tokens}"
            )


def _own_config(checkpoint: Where) -> dict[str, Any] | None:
    """The checkpoint's own copy of config.json; None if it has none."""
    path = root_of(checkpoint) / HF_DIR_NAME / CONFIG_NAME
    content = path.read()
    return None if content is None else config_of(content, str(path)).raw


def _require_same_model(checkpoint: Where, own: dict[str, Any] | None, config: ForwardConfig, reference: Path) -> None:
    """Raises BadInput if the checkpoint's own config.json is of another model than the reference's."""
    if own is None:
        return
    differing = list(differences(parse_config(own, str(root_of(checkpoint) / HF_DIR_NAME / CONFIG_NAME)), config))
    if differing:
        raise BadInput(f"{reference} is of another model than {checkpoint}: {'; '.join(differing)}")


def _identity(checkpoint: Where, record: CheckpointRecord | None, reference: Reference) -> dict[str, str]:
    """What was compared and with which versions, as text for display."""
    identity = {"checkpoint": str(root_of(checkpoint))}
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
    return {name: text for name, text in identity.items() if text}
