"""The `ferry` command. Every command is a few lines over the library; see `command.py` for what they share."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError
from typer.exceptions import TyperException

from conversion_lib.command import VERSION_OPTION, Group, Outcome, command, parse_size, refuse_usage
from conversion_lib.errors import BadInput
from conversion_lib.process import collect_rarely, reuse_freed_memory
from conversion_lib.progress import Reporter
from conversion_lib.record import Target

app = typer.Typer(
    name="ferry",
    help="Carries checkpoints between Hugging Face (safetensors) and MaxText (Orbax).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Src = Annotated[
    str, typer.Argument(metavar="SRC", help="A directory with safetensors, or a Hub id such as Qwen/Qwen3-0.6B.")
]
Dst = Annotated[Path, typer.Argument(metavar="DST", help="The directory to write.")]
Ckpt = Annotated[Path, typer.Argument(metavar="CKPT", help="A MaxText checkpoint: DST, DST/0 or DST/0/items.")]
Model = Annotated[
    str | None, typer.Option("--model", help="A name of `ferry models`; default: config.json tells the family.")
]
Scan = Annotated[
    bool, typer.Option("--scan-layers/--no-scan-layers", help="Layers stacked for jax.lax.scan, or each by itself.")
]
SaveDtype = Annotated[str, typer.Option("--save-dtype", metavar="bfloat16|float32", help="The dtype of the arrays.")]
Ocdbt = Annotated[bool, typer.Option("--ocdbt/--no-ocdbt", help="MaxText's checkpoint_storage_use_ocdbt.")]
Zarr3 = Annotated[bool, typer.Option("--zarr3/--no-zarr3", help="MaxText's checkpoint_storage_use_zarr3.")]
Pathways = Annotated[bool, typer.Option("--pathways", help="What Pathways reads: neither OCDBT nor zarr3.")]
MaxText = Annotated[str, typer.Option("--maxtext", metavar="0.2.5|main", help="The MaxText that will load it.")]
Compression = Annotated[str, typer.Option("--compression", metavar="zstd|none", help="The codec of the chunks.")]
ChunkBytes = Annotated[str, typer.Option("--chunk-bytes", help="The most bytes of a chunk, such as 64MiB.")]
Budget = Annotated[str, typer.Option("--memory-budget", help="The most memory to use, such as 2GiB.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads; default: one a core, up to 16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the destination.")]
SkipDisk = Annotated[bool, typer.Option("--skip-disk-check", help="Begin even where the disk looks too small.")]


def build_target(
    scan_layers: Scan = True,
    save_dtype: SaveDtype = "bfloat16",
    ocdbt: Ocdbt = True,
    zarr3: Zarr3 = True,
    pathways: Pathways = False,
    maxtext: MaxText = "0.2.5",
    compression: Compression = "zstd",
    chunk_bytes: ChunkBytes = "64MiB",
) -> Target:
    """The Target of the options. Raises BadInput for a value that none has, by name."""
    if save_dtype.startswith(("float8", "fp8", "int8")):
        raise BadInput(f"--save-dtype {save_dtype}: MaxText can save it, ferry does not; write bfloat16 or float32")
    values = {
        "scan_layers": scan_layers,
        "save_dtype": save_dtype,
        "ocdbt": ocdbt and not pathways,
        "zarr3": zarr3 and not pathways,
        "maxtext": maxtext,
        "compression": compression,
        "chunk_bytes": parse_size(chunk_bytes, "--chunk-bytes"),
    }
    try:
        return Target.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise BadInput(f"{option} {first['input']}: {first['msg'].lower()}") from None


TARGET = Group("target", build_target)


@app.callback()
def ferry(version: Annotated[bool, VERSION_OPTION] = False) -> None:
    pass


@command(app, "models")
def models(reporter: Reporter) -> Outcome:
    """The families and model names, with what is verified for each."""
    from conversion_lib import show

    rows = show.models()
    return Outcome({"models": rows}, show.models_text(rows))


@command(app, "plan", TARGET)
def plan(
    reporter: Reporter,
    src: Src,
    target: Target,
    model: Model = None,
    revision: Annotated[
        str | None, typer.Option("--revision", help="Of a Hub id: a branch, a tag or a commit; default: main.")
    ] = None,
    memory_budget: Budget = "2GiB",
    threads: Threads = None,
) -> Outcome:
    """What would be written: arrays, bytes, peak memory, disk, warnings. Of a Hub id it fetches headers only."""
    from conversion_lib import show
    from conversion_lib.convert import prepare

    with _headers(src, revision, reporter) as directory:
        job = prepare(directory, target, model=model, memory_budget=parse_size(memory_budget, "--memory-budget"))
    summary = show.plan_summary(job, parse_size(memory_budget, "--memory-budget"), threads)
    return Outcome(summary, show.plan_text(job, summary))


@command(app, "download")
def download(
    reporter: Reporter,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="A Hub id such as Qwen/Qwen3-0.6B.")],
    dst: Dst,
    revision: Annotated[str, typer.Option("--revision", help="A branch, a tag or a commit.")] = "main",
) -> Outcome:
    """Downloads what a conversion needs, verified, with its provenance."""
    from conversion_lib import hub

    result = hub.download(repo, dst, revision=revision, reporter=reporter)
    data = _plain(result) | {"bytes_in": result.bytes_downloaded, "bytes_out": result.bytes_downloaded}
    return Outcome(data, [f"{result.repo} at {result.commit}: {result.files} files in {result.path}"])


@command(app, "dequantize")
def dequantize(
    reporter: Reporter,
    src: Src,
    dst: Dst,
    dtype: Annotated[str, typer.Option("--dtype", metavar="bfloat16", help="The dtype to write.")] = "bfloat16",
    memory_budget: Budget = "2GiB",
    threads: Threads = None,
    overwrite: Overwrite = False,
    skip_disk_check: SkipDisk = False,
) -> Outcome:
    """Writes an fp8 checkpoint as a bfloat16 one, with all that belongs to it."""
    from conversion_lib import convert as conversions

    if dtype != "bfloat16":
        raise BadInput(f"--dtype {dtype}: dequantized weights are bfloat16, whatever they are converted to later")
    options = conversions.Options(parse_size(memory_budget, "--memory-budget"), threads, overwrite, skip_disk_check)
    result = conversions.dequantize(_local(src, reporter), dst, options=options, reporter=reporter)
    return Outcome(result, [_done(result)])


@command(app, "convert", TARGET)
def convert(
    reporter: Reporter,
    src: Src,
    dst: Dst,
    target: Target,
    model: Model = None,
    memory_budget: Budget = "2GiB",
    threads: Threads = None,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="I/N", help="Only the share I of N, counted from 0; `ferry finalize` commits."),
    ] = None,
    overwrite: Overwrite = False,
    skip_disk_check: SkipDisk = False,
) -> Outcome:
    """Converts a Hugging Face checkpoint to a MaxText one at DST/0/items."""
    from conversion_lib import convert as conversions
    from conversion_lib.parts import Part

    share = None if part is None else Part.parse(part)
    budget = parse_size(memory_budget, "--memory-budget")
    options = conversions.Options(budget, threads, overwrite, skip_disk_check, share)
    result = conversions.convert(_local(src, reporter), dst, target, model=model, options=options, reporter=reporter)
    return Outcome(result, [_done(result)])


@command(app, "finalize")
def finalize(reporter: Reporter, dst: Dst) -> Outcome:
    """Merges the parts of a split conversion at DST, and commits."""
    from conversion_lib.finalize import finalize as finalize_parts

    result = finalize_parts(dst, reporter=reporter)
    return Outcome(result, [_done(result)])


@command(app, "check")
def check(
    reporter: Reporter,
    ckpt: Ckpt,
    reference: Annotated[
        Path,
        typer.Option("--reference", help="The Hugging Face checkpoint, or golden logits (.npz, .jsonl, .pickle)."),
    ],
    report: Annotated[
        Path | None, typer.Option("--report", help="Where the report goes; default: CKPT's report/.")
    ] = None,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", help="The largest KL divergence of a token that passes.")
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of the longest prompt.")] = 512,
    memory_budget: Annotated[
        str, typer.Option("--memory-budget", help="The most memory to use, such as 6GiB.")
    ] = "6GiB",
    save_golden: Annotated[
        Path | None, typer.Option("--save-golden", help="Keep the reference's logits here (.npz).")
    ] = None,
    engine: Annotated[
        Literal["ferry", "maxtext"], typer.Option("--engine", help="What runs the checkpoint: ferry or maxtext.")
    ] = "ferry",
    maxtext_python: Annotated[
        Path | None, typer.Option("--maxtext-python", help="For --engine maxtext: an interpreter that has MaxText.")
    ] = None,
) -> Outcome:
    """Compares the logits of a MaxText checkpoint with the original's."""
    from conversion_lib.logits.check import Options, run_check
    from conversion_lib.logits.report import summary

    options = Options(
        max_kl=max_kl,
        tokens=tokens,
        save_golden=save_golden,
        memory_budget=parse_size(memory_budget, "--memory-budget"),
        engine=engine,
        maxtext_python=maxtext_python,
    )
    result = run_check(ckpt, reference, report_dir=report, options=options, reporter=reporter)
    failed = result.verdict != "pass"
    return Outcome(result, list(summary(result)), failed=failed, message=f"check failed: {result.reason}")


@command(app, "publish")
def publish(
    reporter: Reporter,
    ckpt: Ckpt,
    url: Annotated[str, typer.Argument(metavar="URL", help="gs://bucket/prefix or a directory.")],
    report: Annotated[
        Path | None, typer.Option("--report", help="Where the check's report is; default: CKPT's report/.")
    ] = None,
    unchecked: Annotated[
        bool, typer.Option("--unchecked", help="Publish without a passed check; the manifest says so.")
    ] = False,
) -> Outcome:
    """Publishes a checked checkpoint at URL/<model>/<commit>/<target>/."""
    from conversion_lib.publish import publish as publish_checkpoint

    result = publish_checkpoint(ckpt, url, report=report, unchecked=unchecked, reporter=reporter)
    data = _plain(result)
    return Outcome(
        data | {"bytes_in": data["bytes_copied"], "bytes_out": data["bytes_copied"]}, [f"published: {data['url']}"]
    )


@command(app, "verify")
def verify(
    reporter: Reporter, url: Annotated[str, typer.Argument(metavar="URL", help="A published checkpoint.")]
) -> Outcome:
    """Checks a published checkpoint against its manifest."""
    from conversion_lib.publish import verify as verify_published

    result = verify_published(url, reporter=reporter)
    problems = list(result.problems)
    message = f"{url} is not what its manifest says: {problems[0] if problems else ''} ({len(problems)} problems)"
    return Outcome(
        _plain(result), [f"{url}: {result.files} files as published"], failed=bool(problems), message=message
    )


@command(app, "inspect")
def inspect(
    reporter: Reporter, path: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint of either kind.")]
) -> Outcome:
    """Names, shapes, dtypes, chunks and metadata of a checkpoint."""
    from conversion_lib import show

    data = show.inspection(path)
    return Outcome(data, show.inspection_text(data))


@command(app, "compare")
def compare(
    reporter: Reporter,
    a: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another of the same kind.")],
) -> Outcome:
    """Compares two checkpoints of the same kind, leaf by leaf, bit for bit."""
    from conversion_lib.compare import compare as compare_checkpoints

    result = compare_checkpoints(a, b, reporter=reporter)
    lines = [f"{found.path}: {found.what} {found.detail}".rstrip() for found in result.differences]
    text = [*lines, f"{result.leaves - len(lines)} of {result.leaves} leaves are the same bit for bit"]
    return Outcome(result, list(text), failed=not result.same, message=f"{len(lines)} of {result.leaves} leaves differ")


@command(app, "clean")
def clean(reporter: Reporter, dst: Dst) -> Outcome:
    """Removes what an unfinished run left at DST; a finished checkpoint is not touched."""
    from conversion_lib.convert import hf_layout, maxtext_layout
    from conversion_lib.workspace import clean as clean_workspaces

    removed = clean_workspaces([maxtext_layout(dst), hf_layout(dst)])
    lines = [f"removed {path}" for path in removed] or [f"nothing unfinished at {dst}"]
    return Outcome({"removed": [str(path) for path in removed]}, list(lines))


@command(app, "demo")
def demo(
    reporter: Reporter,
    work_dir: Annotated[Path, typer.Option("--work-dir", help="Where the demo keeps everything; made anew.")] = Path(
        ".demo"
    ),
) -> Outcome:
    """Runs the whole DAG on a small fp8 DeepSeek-V3, with Airflow as a subprocess."""
    from conversion_lib.demo.run import run_demo, summary

    result = run_demo(work_dir, reporter)
    return Outcome(result, summary(result))


def _local(src: str, reporter: Reporter) -> Path:
    """The directory of SRC, downloaded first where it is a Hub id. Raises BadInput where it is neither."""
    if (path := _directory(src)) is not None:
        return path
    from conversion_lib import hub

    return hub.cached_download(src, reporter=reporter)


def _headers(src: str, revision: str | None, reporter: Reporter) -> AbstractContextManager[Path]:
    """A directory to plan from: SRC itself, or a copy without the weights where it is a Hub id."""
    if (path := _directory(src)) is None:
        from conversion_lib.hub_headers import headers_of

        return headers_of(src, revision or "main", reporter=reporter)
    if revision is not None:
        raise BadInput(f"--revision {revision}: {src} is a directory, which has no revisions")
    return nullcontext(path)


def _directory(src: str) -> Path | None:
    """The directory of SRC, None where it is a Hub id. Raises BadInput where it is neither."""
    path = Path(src).expanduser()
    if path.is_dir():
        return path
    if src.startswith("gs://"):
        raise BadInput(f"{src}: reading from gs:// is not supported yet; copy it to a directory")
    if path.exists() or src.count("/") != 1 or src.startswith((".", "/", "~")):
        raise BadInput(f"{src} is no directory")
    return None


def _done(result: Any) -> str:
    what = f"{result.path}, part {result.part}" if getattr(result, "part", None) else result.path
    return f"{what}: {'was already done' if result.already else 'done'}, fingerprint {result.fingerprint[:12]}"


def _plain(result: Any) -> dict[str, Any]:
    from pydantic import TypeAdapter

    data = TypeAdapter(type(result)).dump_python(result, mode="json")
    return {str(key): value for key, value in data.items()}


def main() -> None:
    reuse_freed_memory()
    collect_rarely()
    if len(sys.argv) == 1:
        app(prog_name="ferry")  # prints its help
    try:
        code = app(prog_name="ferry", standalone_mode=False)
    except TyperException as error:
        raise SystemExit(refuse_usage(error, "--json" in sys.argv)) from None
    raise SystemExit(code if isinstance(code, int) else 0)
