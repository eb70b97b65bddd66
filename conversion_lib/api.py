"""The public functions, in the order of a model's way, and what they take.

Paths may be text. A source is a directory with safetensors and config.json, a repository on the Hub, which is
downloaded first, with the token in HF_TOKEN, or gs://bucket/prefix, which is read where it lies. A MaxText checkpoint
is DST, DST/0 or DST/0/items alike, in a directory or at gs://bucket/prefix. Everything raises BadInput where what it is
given is wrong and trying again is of no use, and OutsideFailure where something outside failed and a retry may help;
both are FerryError, and their text is one line. Nothing prints unless a Reporter is passed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from conversion_lib.errors import BadInput as BadInput
from conversion_lib.errors import FerryError as FerryError
from conversion_lib.errors import OutsideFailure as OutsideFailure
from conversion_lib.on_the_fly import ensure_checkpoint as ensure_checkpoint
from conversion_lib.plan.parts import Part as Part
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import Target
from conversion_lib.runs.options import DEFAULT_BUDGET, Options

if TYPE_CHECKING:
    from conversion_lib.conversions.finalize import FinalizeResult
    from conversion_lib.conversions.runner import ConvertResult
    from conversion_lib.hub import DownloadResult
    from conversion_lib.logits.verdict.result import CheckResult
    from conversion_lib.plan.plan import Plan
    from conversion_lib.publish.publish import PublishResult
    from conversion_lib.publish.verify import VerifyResult

CHECK_BUDGET = 6 << 30
"""Bytes."""


def download(
    repo: str, destination: str | Path, *, revision: str = "main", reporter: Reporter = SILENT
) -> DownloadResult:
    """Fetches the files of `repo` that a conversion needs, at one commit, each checked against the Hub's hash.

    revision: a branch, a tag or a commit. Goes on where an earlier try stopped. The result names the commit, the files
    and the bytes. Raises BadInput for a repository or revision that is not there, or that the token does not open, and
    for one without safetensors; OutsideFailure where the Hub does not answer, or sends other bytes than it announced.
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
    """What a conversion would write, from headers and config alone; of a repository no weights are fetched.

    target: layout, dtype and storage; None: scanned, bfloat16, OCDBT and zarr3. model: a name of `ferry models`, which
    says the family; None: config.json does. loader: safetensors, or transformers, which holds the whole model.
    memory_budget: bytes, which limit a chunk to an eighth.

    `arrays` of the result has each leaf's `path`, `shape`, `dtype`, `chunk_shape` and the `sources` it is made of;
    `bytes_out` their bytes; `exact` whether a round trip gives back the source's bits; `dropped` a line for each rule
    that leaves tensors out; `to_json()` all of it. Shapes are tuples of elements, dtypes names such as bfloat16.

    Raises BadInput for whatever headers and config tell is wrong: an unknown architecture, tensors that are missing,
    of another shape than config.json says, or that no rule takes, each by name and file.
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

    The values are those that `convert` makes of the quantized source itself. Resumes and finishes as that does. Raises
    BadInput where the source is not quantized, or in a way that is not known.
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

    source: also a MaxText checkpoint of another layout, for which `hf_config` names a directory with config.json where
    there is none beside it, and `written_by` the MaxText that wrote it, 0.2.5 or main, where that cannot be seen.
    destination: a directory or gs://bucket/prefix.
    target, model and loader as for `plan`. options: memory budget in bytes, threads, whether to overwrite, the part of
    a split conversion as `Part.parse("0/4")`. An unfinished run of the same source and target is resumed; a
    finished one is left as it is, and the result's `already` says so. `bytes_in` and `bytes_out` are those of this
    run, `seconds` its wall time.

    Raises BadInput as `plan` does, where the destination holds something else, is too small, or a value can be none
    (a scale that is NaN): nothing is committed then. OutsideFailure where writing failed, or another run is at work.
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
    """Merges the parts of a split conversion at `destination`, and commits.

    Raises BadInput where there is no such conversion, or a part is not done, naming which; OutsideFailure where one is
    at work.
    """
    from conversion_lib.conversions.finalize import finalize as finalize_parts

    return finalize_parts(destination, reporter=reporter)


def check(
    checkpoint: str | Path,
    reference: str | Path,
    *,
    report_dir: str | Path | None = None,
    max_kl: float | None = None,
    tokens: int = 512,
    memory_budget: int = CHECK_BUDGET,
    reporter: Reporter = SILENT,
) -> CheckResult:
    """Compares the logits of a MaxText checkpoint with the original's, in float32, and leaves a report.

    reference: the Hugging Face directory, or golden logits. report_dir: for report.html and check.json; None: `report`
    beside the checkpoint. max_kl: the threshold in nats; None: what the rounding of the family's ops allows. tokens: of
    the longest prompt. memory_budget: bytes.

    A check that fails is a result, with `verdict` "fail": `max_kl` is the largest KL(original || checkpoint) of a
    token in nats, `layers` the differences block by block. Raises BadInput where the two cannot be compared, or the
    extra `check` is not installed.
    """
    from conversion_lib.models.transformers_library import require_check_libraries

    require_check_libraries()
    from conversion_lib.logits.check import Options as CheckOptions
    from conversion_lib.logits.check import run_check

    report = None if report_dir is None else Path(report_dir)
    options = CheckOptions(max_kl=max_kl, tokens=tokens, memory_budget=memory_budget)
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
    """Writes a MaxText checkpoint as a Hugging Face one that transformers loads.

    hf_config: a directory with config.json and tokenizer; None: what Ferry left beside the checkpoint. dtype: bfloat16,
    float32 or float16; None: what that config says. written_by as for `convert`. Resumes and finishes as that does.

    Raises BadInput where the checkpoint or the destination is not as it must be; OutsideFailure where writing failed.
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
    """Publishes a checked checkpoint at `url`/<model>/<commit>/<target>/, a directory or gs://bucket/prefix.

    unchecked: without a passing verdict, which the manifest then says. The result's `url` is the full location. Raises
    BadInput for a checkpoint that has no verdict, or one that is not of these very bytes.
    """
    from conversion_lib.publish.publish import publish as publish_checkpoint

    return publish_checkpoint(checkpoint, url, unchecked=unchecked, reporter=reporter)


def verify(url: str, *, reporter: Reporter = SILENT) -> VerifyResult:
    """Holds a published checkpoint against its manifest; `problems` of the result is empty where it is whole."""
    from conversion_lib.publish.verify import verify as verify_published

    return verify_published(url, reporter=reporter)
