"""The whole check: original, checkpoint, comparison, report."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from conversion_lib.core.process import peak_bytes
from conversion_lib.errors import BadInput, FerryError
from conversion_lib.logits import run
from conversion_lib.logits.by_maxtext.engine import maxtext_logits, require_maxtext
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.config import ForwardConfig, differences
from conversion_lib.logits.forward.memory import divide
from conversion_lib.logits.forward.weights import BiasOrder
from conversion_lib.logits.reference.golden import load_golden, require_golden_name, save_golden
from conversion_lib.logits.reference.prompts import choose_prompts
from conversion_lib.logits.reference.reference import Reference, require_libraries
from conversion_lib.logits.verdict.compare import Comparison, compare_logits, first_departing
from conversion_lib.logits.verdict.plots import require_plotting
from conversion_lib.logits.verdict.report import ReportData, render
from conversion_lib.logits.verdict.result import CheckResult, Engine, earlier_result, notes, reason
from conversion_lib.logits.verdict.rounding import dither_of
from conversion_lib.models.hf_config import CONFIG_NAME, config_of, load_config
from conversion_lib.progress import SILENT, Reporter, format_bytes
from conversion_lib.publish.staged import checkpoint_digest
from conversion_lib.record import (
    CHECK_NAME,
    HF_DIR_NAME,
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

BIAS_ORDERS: dict[str, BiasOrder] = {"0.2.5": "layers_first", "main": "experts_first"}
"""How each MaxText wants DeepSeek-V3's scanned gate bias in params/params."""


@dataclass(frozen=True)
class Options:
    """max_kl: a threshold that decides alone; by default there is one that fits the checkpoint (`rounding.py`), and no
    block may depart. tokens: of the longest prompt. save_golden: where to keep the reference's logits. memory_budget:
    bytes. maxtext_python: the interpreter that has MaxText, for the engine `maxtext`."""

    max_kl: float | None = None
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
    """Compares the logits of a MaxText checkpoint with the original's.

    checkpoint: DST, DST/0 or DST/0/items. reference: a Hugging Face directory, or a golden file. report_dir: where
    check.json and report.html go, DST/report by default; both are written whatever the verdict.

    Where report_dir has a check that passed, of the same checkpoint, reference, threshold, engine and tokens, that
    stands.

    Raises BadInput for inputs that cannot be compared; a check that fails is a result, not an error.
    """
    started, options = time.monotonic(), options or Options()
    _require_usable(reference, options)
    source, record = open_orbax(checkpoint), record_of(checkpoint)
    directory = location(report_dir) if report_dir else root_of(checkpoint) / REPORT_DIR_NAME
    digest, identity = checkpoint_digest(str(checkpoint)), _reference_identity(reference)
    earlier = earlier_result(directory / CHECK_NAME)
    if earlier is not None and _still_stands(earlier, digest, identity, options):
        reporter.say(f"{checkpoint} has passed this very check already: {earlier.report}")
        return earlier.model_copy(update={"already": True, "bytes_in": 0})

    wanted, found, config = _run(checkpoint, source, record, reference, options, reporter)
    if config.tokens < config.vocab:  # rows that MaxText leaves out, which stand for no token
        wanted = replace(wanted, logits=[logits[:, : config.tokens] for logits in wanted.logits])
    comparison = compare_logits(wanted.logits, found.logits)
    seconds, peak = round(time.monotonic() - started, 3), peak_bytes()
    result = CheckResult(
        **_verdict(comparison, found, options),
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
        engine=options.engine,
        digest=digest,
        notes=notes(config, wanted.prompts, found.idle_experts),
        report=str(directory / REPORT_PAGE_NAME),
        reference=identity,
        tokens=options.tokens,
        tokens_compared=len(comparison.kl),
        bytes_in=sum(info.nbytes for info in source.tensors.values()),
        seconds=seconds,
        peak_bytes=peak,
        identity={
            **_identity(checkpoint, record, wanted),
            "digest": digest,
            "engine": options.engine,
            "checked": datetime.now(UTC).isoformat(timespec="seconds"),
            "took": f"{seconds:.1f} s",
            "peak memory": format_bytes(peak),
        },
    )
    result = result.model_copy(update={"reason": reason(result, config)})
    title = record.model_name if record else str(root_of(checkpoint))
    page = render(ReportData(title, result, wanted.prompts, wanted.logits, found.logits, comparison))
    _leave_report(directory, page, result)
    return result


def _leave_report(directory: Location, page: str, result: CheckResult) -> None:
    """Writes the page, and the verdict last."""
    try:
        directory.make()
        (directory / REPORT_PAGE_NAME).write(page.encode())
        (directory / CHECK_NAME).write(result.model_dump_json(indent=2).encode() + b"\n")
    except FerryError as error:  # a bucket's
        raise type(error)(f"{error}; the report is lost: `--report DIR` leaves it in a directory") from error


def _verdict(comparison: Comparison, found: run.Findings, options: Options) -> dict[str, Any]:
    """Whether the checkpoint passes, and by what: the fields of CheckResult that say it."""
    departing = first_departing(found.layers)
    agree = departing is None and (found.output is None or not found.output.departs)
    threshold, mean_threshold = found.allowed, found.allowed_mean
    if options.max_kl is not None:
        threshold, mean_threshold, agree = options.max_kl, None, True
    close = math.isfinite(comparison.max_kl) and comparison.max_kl <= threshold
    passed = agree and close and (mean_threshold is None or comparison.mean_kl <= mean_threshold)
    return {
        "verdict": "pass" if passed else "fail",
        "threshold": threshold,
        "mean_threshold": mean_threshold,
        "threshold_rests_on": _rests_on(options, found),
        "first_departing": None if passed else departing,
    }


def _require_usable(reference: Path, options: Options) -> None:
    """What can be told before anything is read. Raises BadInput."""
    require_plotting()
    if options.engine == "maxtext":
        require_maxtext(options.maxtext_python)
    elif options.maxtext_python is not None:
        raise BadInput("--maxtext-python is for --engine maxtext")
    if reference.is_dir():
        require_libraries()
    if options.save_golden is not None:
        require_golden_name(options.save_golden)
        if reference.is_file():
            raise BadInput(f"{reference} is a golden file already: --save-golden wants a Hugging Face directory")


def _still_stands(earlier: CheckResult, digest: str, identity: str, options: Options) -> bool:
    """Whether an earlier check passed, of the same things, and nothing else is asked for now."""
    same = (earlier.digest, earlier.reference, earlier.tokens, earlier.engine)
    threshold = options.max_kl is None or options.max_kl == earlier.threshold
    given = (options.max_kl is None) == (earlier.threshold_rests_on != GIVEN)
    wanted = (digest, identity, options.tokens, options.engine)
    return earlier.verdict == "pass" and same == wanted and threshold and given and options.save_golden is None


def _run(
    checkpoint: Where,
    source: OrbaxSource,
    record: CheckpointRecord | None,
    path: Path,
    options: Options,
    reporter: Reporter,
) -> tuple[Reference, run.Findings, ForwardConfig]:
    """The original's logits and what the checkpoint's run found."""
    own = _own_config(checkpoint)
    golden = load_golden(path, own) if path.is_file() else None
    config = parse_config(golden.config if golden else load_config(path).raw)
    _require_same_model(checkpoint, own, config, path)
    prompts = golden.prompts if golden else choose_prompts(path, config.tokens, options.tokens, config.max_positions)
    memory = divide(options.memory_budget, config, sum(map(len, prompts)))
    order = BIAS_ORDERS[record.target.maxtext] if record else None
    subject = run.Subject(source, config, order, memory)
    reporter.say(f"{sum(map(len, prompts))} tokens in {len(prompts)} prompts, in float32")
    if options.engine == "ferry" and golden is None:
        wanted, found = run.in_step(subject, path, prompts, reporter)
    else:
        wanted = golden or run.original(path, prompts, memory, reporter)
        if options.engine == "ferry":
            found = run.alone(subject, prompts, wanted.dtype, reporter)
        else:
            found = _maxtext(subject, checkpoint, wanted, options, reporter)
    if options.save_golden is not None:
        save_golden(options.save_golden, wanted)
    return wanted, found, config


def _maxtext(
    subject: run.Subject, checkpoint: Where, wanted: Reference, options: Options, reporter: Reporter
) -> run.Findings:
    """MaxText's own logits; Ferry's forward pass runs beside it only where what is allowed has to be measured."""
    dither = dither_of(subject.config, subject.checkpoint.tensors, wanted.dtype)
    measured = run.alone(subject, wanted.prompts, wanted.dtype, reporter) if dither else run.Findings()
    assert options.maxtext_python is not None  # require_maxtext
    logits = maxtext_logits(options.maxtext_python, checkpoint, wanted, reporter)
    measured.logits = [prompt[:, : subject.config.tokens] for prompt in logits]  # rows of padding stand for no token
    measured.lost, measured.idle_experts = None, 0
    return measured


GIVEN = "--max-kl"


def _rests_on(options: Options, found: run.Findings) -> str:
    if options.max_kl is not None:
        return GIVEN
    if found.dither is None:
        return "the order of float32 sums: the checkpoint holds the original's values"
    if found.dither.is_rounding:
        return f"what rounding the values of {len(found.dither.leaves)} leaves does to this model, measured"
    return "what float32 loses in this model's delta nets, measured: the checkpoint holds the original's values"


def _reference_identity(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    if not path.is_dir():
        raise BadInput(f"{path} is neither a Hugging Face directory nor a golden file")
    return source_identity(SafetensorsSource(path))


def _own_config(checkpoint: Where) -> dict[str, Any] | None:
    """The checkpoint's own copy of config.json, None where it has none."""
    path = root_of(checkpoint) / HF_DIR_NAME / CONFIG_NAME
    content = path.read()
    return None if content is None else config_of(content, str(path)).raw


def _require_same_model(checkpoint: Where, own: dict[str, Any] | None, config: ForwardConfig, reference: Path) -> None:
    """Raises BadInput where the checkpoint's own copy of config.json is of another model than the reference's."""
    differing = list(differences(parse_config(own), config)) if own is not None else []
    if differing:
        raise BadInput(f"{reference} is of another model than {checkpoint}: {'; '.join(differing)}")


def _identity(checkpoint: Where, record: CheckpointRecord | None, reference: Reference) -> dict[str, str]:
    """What was compared, and with which versions, ready for display."""
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
