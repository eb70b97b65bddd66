"""The public functions, in the order in which a model passes through them.

Paths may be strings. A source is a directory with safetensors and config.json, a Hub repository (downloaded first, with
the token in HF_TOKEN), or gs://bucket/prefix (read in place). A MaxText checkpoint is given as DST, DST/0 or
DST/0/items, in a directory or at gs://bucket/prefix. Every function raises BadInput if its input is wrong and a retry
cannot help, and OutsideFailure if something outside failed and a retry may help. Both are FerryErrors, and their text
is one line. Nothing is printed unless a Reporter is passed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.on_the_fly import ensure_checkpoint
from conversion_lib.plan.parts import Part
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import MAX_MODEL_KL, Target
from conversion_lib.runs.options import DEFAULT_BUDGET, Options

if TYPE_CHECKING:
    from conversion_lib.conversions.finalize import FinalizeResult
    from conversion_lib.conversions.runner import ConvertResult
    from conversion_lib.hub import DownloadResult
    from conversion_lib.logits.verdict.result import CheckResult
    from conversion_lib.plan.plan import Plan
    from conversion_lib.publish.publish import PublishResult
    from conversion_lib.publish.verify import VerifyResult

__all__ = [
    "BadInput",
    "FerryError",
    "Options",
    "OutsideFailure",
    "Part",
    "Reporter",
    "Target",
    "check",
    "convert",
    "dequantize",
    "download",
    "ensure_checkpoint",
    "export",
    "finalize",
    "plan",
    "publish",
    "verify",
]

CHECK_BUDGET = 6 << 30
"""Bytes."""


def download(
    repo: str, destination: str | Path, *, revision: str = "main", reporter: Reporter = SILENT
) -> DownloadResult:
    """Downloads the files of a Hub repository that a conversion needs, at one commit.

    Each file is checked against the Hub's hash. A later call resumes where an earlier one stopped.

    Args:
        repo: The repository, such as `Qwen/Qwen3-0.6B`.
        destination: The directory to write.
        revision: A branch, a tag or a commit.
        reporter: Shows progress and messages.

    Returns:
        The commit, the files and the bytes.

    Raises:
        BadInput: The repository or the revision does not exist, the token does not open it, or it has no safetensors.
        OutsideFailure: The Hub does not answer, or what it sends does not match its hash.
    """
    from conversion_lib import hub

    return hub.download(repo, Path(destination), revision=revision, reporter=reporter)


def plan(
    source: str | Path,
    target: Target | None = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    loader: str = "safetensors",
    memory_budget: int = DEFAULT_BUDGET,
    reporter: Reporter = SILENT,
) -> Plan:
    """Plans a conversion from headers and config alone. No weights of a Hub repository are downloaded.

    Args:
        source: A directory, a repository on the Hub, or gs://bucket/prefix.
        target: Layout, dtype and storage. None: scanned, bfloat16, OCDBT and zarr3.
        model: A name from `ferry models`, which determines the family. None: config.json determines it.
        revision: Branch, tag or commit of a Hub repository. None: main.
        loader: `safetensors`, or `transformers`, which holds the whole model in memory.
        memory_budget: Bytes. A chunk takes at most an eighth of it.
        reporter: Shows progress and messages.

    Returns:
        The plan. `arrays` has each leaf's `path`, `shape` (elements), `dtype` (a name such as bfloat16),
        `chunk_shape` and `sources`. `bytes_out` is their total size. `exact` tells whether a round trip restores the
        source's bits. `dropped` has one line for each rule that leaves tensors out. `to_json()` returns all of it.

    Raises:
        BadInput: Headers or config are wrong: the architecture is unknown, or a tensor is missing, its shape
            contradicts config.json, or no rule takes it. The message names the tensor and its file.
        OutsideFailure: The Hub or Cloud Storage does not answer.
    """
    from conversion_lib.conversions.convert import prepare
    from conversion_lib.conversions.opening import headers

    with headers(str(source), revision, reporter) as given:
        job = prepare(given, target or Target(), model=model, loader=loader, memory_budget=memory_budget)
    return job.plan


def dequantize(
    source: str | Path, destination: str | Path, *, options: Options | None = None, reporter: Reporter = SILENT
) -> ConvertResult:
    """Writes a quantized checkpoint as a bfloat16 one: shards, index, config and all other files.

    The values are the same as those that `convert` computes from the quantized source. Resumes like `convert`.

    Args:
        source: A directory, a repository on the Hub, or gs://bucket/prefix.
        destination: The directory to write.
        options: Memory budget, threads, whether to overwrite.
        reporter: Shows progress and messages.

    Returns:
        Bytes read and written, and whether the output was complete already.

    Raises:
        BadInput: The source is not quantized, or its quantization is not supported.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    from conversion_lib.conversions.dequantize import dequantize as dequantize_checkpoint
    from conversion_lib.conversions.opening import opened

    options = options or Options()
    budget = options.memory_budget
    with opened(
        str(source), str(destination), None, memory_budget=budget, revision=None, stream=False, reporter=reporter
    ) as given:
        return dequantize_checkpoint(given, Path(destination), options=options, reporter=reporter)


def convert(
    source: str | Path,
    destination: str | Path,
    target: Target | None = None,
    *,
    model: str | None = None,
    revision: str | None = None,
    loader: str = "safetensors",
    hf_config: str | Path | None = None,
    written_by: str | None = None,
    options: Options | None = None,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes a checkpoint as a MaxText one at `destination`/0/items, within a memory budget.

    An unfinished run of the same source and target is resumed. A finished one is left as it is.

    Args:
        source: A Hugging Face checkpoint: a directory, a repository on the Hub, or gs://bucket/prefix. Or a MaxText
            checkpoint, to write it in another layout.
        destination: A directory or gs://bucket/prefix.
        target: As for `plan`.
        model: As for `plan`.
        revision: As for `plan`.
        loader: As for `plan`.
        hf_config: For a MaxText source: a directory with config.json, if there is none beside the checkpoint.
        written_by: For a MaxText source: the release that wrote it, 0.2.5 or main, if the checkpoint does not say.
        options: Memory budget, threads, whether to overwrite, and the part of a split conversion as
            `Part.parse("0/4")`.
        reporter: Shows progress and messages.

    Returns:
        `bytes_in` and `bytes_out` of this run, `seconds` of wall time, and `already`: whether the checkpoint was
        complete before.

    Raises:
        BadInput: As for `plan`; or the destination holds something else, or its disk is too small; or a value is
            invalid, such as a scale that is NaN. Nothing is committed then.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    from conversion_lib.conversions.convert import convert as convert_checkpoint
    from conversion_lib.conversions.opening import opened

    options = options or Options()
    budget = options.memory_budget
    with opened(
        str(source), str(destination), None, memory_budget=budget, revision=revision, stream=False, reporter=reporter
    ) as given:
        return convert_checkpoint(
            given,
            destination,
            target or Target(),
            model=model,
            loader=loader,
            hf_config=None if hf_config is None else Path(hf_config),
            written_by=written_by,
            options=options,
            reporter=reporter,
        )


def finalize(destination: str | Path, *, reporter: Reporter = SILENT) -> FinalizeResult:
    """Merges the parts of a split conversion, and commits. No data is moved.

    Args:
        destination: Where the parts were written.
        reporter: Shows progress and messages.

    Returns:
        The number of chunks, and whether the checkpoint was complete already.

    Raises:
        BadInput: There is no such conversion, or a part is unfinished. The message names the part.
        OutsideFailure: A part is still running, or writing failed.
    """
    from conversion_lib.conversions.finalize import finalize as finalize_parts

    return finalize_parts(destination, reporter=reporter)


def check(
    checkpoint: str | Path,
    reference: str | Path,
    *,
    report_dir: str | Path | None = None,
    max_kl: float | None = None,
    max_model_kl: float = MAX_MODEL_KL,
    tokens: int = 512,
    memory_budget: int = CHECK_BUDGET,
    reporter: Reporter = SILENT,
) -> CheckResult:
    """Compares the logits of a MaxText checkpoint with the original's, in float32, and leaves a report.

    Args:
        checkpoint: DST, DST/0 or DST/0/items, in a directory or at gs://bucket/prefix.
        reference: The Hugging Face directory, or golden logits.
        report_dir: Where report.html and check.json go. None: `report` beside the checkpoint.
        max_kl: The threshold in nats. None: what the rounding of the family's ops allows.
        max_model_kl: How far MaxText's function may be from the original's on the same weights, in nats.
        tokens: Length of the longest prompt.
        memory_budget: Bytes.
        reporter: Shows progress and messages.

    Returns:
        The result, also of a failed check: its `verdict` is then "fail". `max_kl` is the largest KL(original ||
        checkpoint) of a token, in nats. `layers` has the differences block by block. `weights` and `model` are the
        verdict's two parts: whether the values are right, and whether MaxText computes with them what it should;
        `model.settings` is what a MaxText run passes.

    Raises:
        BadInput: The two cannot be compared, or the extra `check` is not installed.
        OutsideFailure: Reading failed.
    """
    from conversion_lib.models.transformers_library import require_check_libraries

    require_check_libraries()
    from conversion_lib.logits.check import Options as CheckOptions
    from conversion_lib.logits.check import run_check

    report = None if report_dir is None else Path(report_dir)
    options = CheckOptions(max_kl=max_kl, max_model_kl=max_model_kl, tokens=tokens, memory_budget=memory_budget)
    return run_check(checkpoint, Path(reference), report_dir=report, options=options, reporter=reporter)


def export(
    checkpoint: str | Path,
    destination: str | Path,
    *,
    hf_config: str | Path | None = None,
    dtype: str | None = None,
    model: str | None = None,
    written_by: str | None = None,
    options: Options | None = None,
    reporter: Reporter = SILENT,
) -> ConvertResult:
    """Writes a MaxText checkpoint as a Hugging Face one that transformers loads. Resumes like `convert`.

    Args:
        checkpoint: DST, DST/0 or DST/0/items, in a directory or at gs://bucket/prefix.
        destination: The directory to write.
        hf_config: A directory with config.json and tokenizer. None: `hf/` beside the checkpoint, which Ferry wrote.
        dtype: bfloat16, float32 or float16. None: each tensor has the source's.
        model: As for `plan`.
        written_by: As for `convert`.
        options: Memory budget, threads, whether to overwrite.
        reporter: Shows progress and messages.

    Returns:
        Bytes read and written, and whether the output was complete already.

    Raises:
        BadInput: The checkpoint, its config or the destination is wrong.
        OutsideFailure: Reading or writing failed, or another run is writing the same destination.
    """
    from conversion_lib.conversions.export import export as export_checkpoint

    return export_checkpoint(
        checkpoint,
        Path(destination),
        hf_config=None if hf_config is None else Path(hf_config),
        dtype=dtype,
        model=model,
        written_by=written_by,
        options=options or Options(),
        reporter=reporter,
    )


def publish(checkpoint: str | Path, url: str, *, unchecked: bool = False, reporter: Reporter = SILENT) -> PublishResult:
    """Publishes a checked checkpoint at `url`/<model>/<commit>/<target>/.

    Args:
        checkpoint: DST, DST/0 or DST/0/items, in a directory or at gs://bucket/prefix.
        url: A directory or gs://bucket/prefix.
        unchecked: Publish without a passed check. The manifest says so.
        reporter: Shows progress and messages.

    Returns:
        `url`, the full location; files, bytes, and the bytes that this call copied.

    Raises:
        BadInput: The checkpoint has no passing verdict for exactly these bytes, or the location holds another one.
        OutsideFailure: The disk or the service failed.
    """
    from conversion_lib.publish.publish import publish as publish_checkpoint

    return publish_checkpoint(checkpoint, url, unchecked=unchecked, reporter=reporter)


def verify(url: str, *, reporter: Reporter = SILENT) -> VerifyResult:
    """Compares a published checkpoint with its manifest.

    Args:
        url: URL/<model>/<commit>/<target>.
        reporter: Shows progress and messages.

    Returns:
        `problems`, one line for each file that is missing, extra or different. Empty: the checkpoint is complete.

    Raises:
        BadInput: No checkpoint is published there.
        OutsideFailure: The disk or the service failed.
    """
    from conversion_lib.publish.verify import verify as verify_published

    return verify_published(url, reporter=reporter)
