"""The step `resolve`: finds the commit, plans, and checks that disk and destination can take the result."""

from __future__ import annotations

import math
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion_lib import hub
from conversion_lib.conversions.convert import origin_fingerprint, prepare
from conversion_lib.engine.limits import default_threads, peak_estimate
from conversion_lib.errors import BadInput
from conversion_lib.hub.headers import headers_of
from conversion_lib.maxtext.model import MaxTextModel, arguments, model_of_job, warnings
from conversion_lib.plan.job import Job, disk_bytes
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.destinations.base import MARKER_NAME
from conversion_lib.publish.destinations.directory import DirectoryDestination
from conversion_lib.publish.location import PublishedPath, commit_level, parse_marker
from conversion_lib.record import Target
from conversion_lib.runs.options import DEFAULT_BUDGET
from conversion_lib.sources.files import Files
from conversion_lib.storage.disk import free_bytes, same_disk
from conversion_lib.storage.files import existing_parent
from ferry_airflow.layout import DEQUANTIZED, DOWNLOADED, hub_work_dir, local_work_dir
from ferry_airflow.steps.files import begin, forget, used_bytes

NETWORK_RATE = 100e6
"""Expected bytes per second of a download: a guess, for the time that the plan shows."""

CORE_RATE = 80e6
"""Bytes per second that one core dequantizes, converts or checks: the rate of encoding in docs/guides/parts.md."""


@dataclass(frozen=True)
class Request:
    """What a run does.

    Attributes:
        repo: A Hub repository, or the absolute path of a directory.
        model: A name of `ferry models`. None: found from the config.
        staged: Whether a quantized source is first written in bf16.
        run: The run's id.
        overwrite: The stage from which on earlier results are removed. None: they are used.
    """

    repo: str
    revision: str
    target: Target
    model: str | None
    destination: str
    staged: bool
    run: str
    overwrite: str | None = None


@dataclass(frozen=True)
class Source:
    """Where the weights are or will be.

    Attributes:
        commit: None for a directory.
        files: The number of files.
        path: The Hugging Face checkpoint.
        work_dir: Where the run keeps its files.
        download_bytes: Bytes still to download.
    """

    repo: str
    commit: str | None
    files: int
    path: Path
    work_dir: Path
    download_bytes: int


def resolve(request: Request, reporter: Reporter) -> dict[str, Any]:
    """Finds the commit, plans the run and checks that it can succeed.

    Returns:
        What ResolveOperator documents of its manifest.

    Raises:
        BadInput: The repository or the revision does not exist, the token does not open it, the checkpoint cannot be
            converted, the destination cannot be written, or a disk is too small.
        OutsideFailure: The Hub or the destination cannot be reached.
    """
    source, opening = _find(request, reporter)
    with opening as given:
        job = prepare(given, request.target, model=request.model, memory_budget=DEFAULT_BUDGET)
    published = _published(request, source, job)
    quantized = job.config.quantization is not None
    plan = _plan(request, source, job, copy=quantized and request.staged)
    model = model_of_job(job)
    _say(plan, job, model, reporter)
    if published and request.overwrite is None:
        reporter.say(f"{published} is already published and checked: nothing to do")
    else:
        _require_space(request, source, job, plan["disk_bytes"])
        begin(source.work_dir, request.run, request.target.slug, reporter)
        if request.overwrite is not None:
            forget(source.work_dir, request.run, request.target.slug, request.overwrite, reporter)
    return {
        "repo": source.repo,
        "commit": source.commit,
        "files": source.files,
        "path": str(source.path),
        "work_dir": str(source.work_dir),
        "quantized": quantized,
        "model": job.plan.model_name,
        "published": published if request.overwrite is None else None,
        "plan": plan,
        "maxtext": {"settings": model.run_settings, "differs": model.reason} if model else None,
    }


def _find(request: Request, reporter: Reporter) -> tuple[Source, AbstractContextManager[Path | Files]]:
    """The source, and the directory or headers to plan from."""
    if request.repo.startswith("/"):
        directory = Path(request.repo)
        if not directory.is_dir():
            raise BadInput(f"{directory} is not a directory where the stages run")
        files = sum(1 for path in directory.iterdir() if path.is_file())
        reporter.say(f"{directory} is a directory with {files} files: nothing to download")
        return Source(request.repo, None, files, directory, local_work_dir(directory), 0), nullcontext(directory)
    found = hub.resolve(request.repo, request.revision, reporter=reporter)
    needed = hub.needed_files(found)
    reporter.say(f"{found.repo} at {request.revision} is commit {found.commit}, {len(needed)} files needed")
    work_dir = hub_work_dir(found.repo, found.commit)
    path = work_dir / DOWNLOADED
    missing = sum(file.size for file in needed if not (path / file.path).exists())
    source = Source(found.repo, found.commit, len(needed), path, work_dir, missing)
    return source, headers_of(found.repo, found.commit, reporter=reporter)


def _published(request: Request, source: Source, job: Job) -> str | None:
    """The URL of the checkpoint, if it is published with a passed check; None otherwise.

    Raises BadInput for a destination that does not exist or cannot be written.
    """
    commit = source.commit or commit_level(job.origin, origin_fingerprint(job) or job.plan.fingerprint)
    path = PublishedPath(job.plan.model_name, commit, request.target.slug)
    destination = open_destination(request.destination, str(path))
    if isinstance(destination, DirectoryDestination):
        parent = existing_parent(destination.location.parent)
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            raise BadInput(f"{request.destination} cannot be written ({parent}): make it writable, or choose another")
    content = destination.read(MARKER_NAME)
    marker = None if content is None else parse_marker(content)  # `publish` reports a broken one
    return destination.url if marker is not None and marker.checked else None


def _plan(request: Request, source: Source, job: Job, *, copy: bool) -> dict[str, Any]:
    """The bytes and seconds that the run needs. copy: whether it writes a bf16 checkpoint first."""
    bytes_out = job.plan.bytes_out
    bf16 = bytes_out // (2 if request.target.save_dtype == "float32" else 1) if copy else 0
    there = used_bytes(source.work_dir / DEQUANTIZED) + used_bytes(source.work_dir / request.target.slug)
    passes = 2 + (1 if copy else 0)  # convert and check, and dequantize
    seconds = source.download_bytes / NETWORK_RATE + passes * bytes_out / (CORE_RATE * default_threads())
    return {
        "family": job.plan.family,
        "bytes_in": job.bytes_in,
        "bytes_out": bytes_out,
        "download_bytes": source.download_bytes,
        "disk_bytes": source.download_bytes + max(0, bf16 + disk_bytes(job.plan) - there),
        "free_bytes": free_bytes(source.work_dir),
        "peak_bytes": peak_estimate(job.plan, DEFAULT_BUDGET, None),
        "seconds": math.ceil(seconds),
    }


def _say(plan: dict[str, Any], job: Job, model: MaxTextModel | None, reporter: Reporter) -> None:
    size = {key: format_bytes(plan[key]) for key in plan if key.endswith(("bytes", "_in", "_out"))}
    reporter.say(
        f"plan: {job.plan.model_name} ({job.plan.family}), {len(job.plan.arrays)} arrays; "
        f"{size['bytes_in']} in, {size['bytes_out']} out; {size['download_bytes']} to download"
    )
    reporter.say(
        f"plan: {size['disk_bytes']} of disk needed, {size['free_bytes']} free; at most {size['peak_bytes']} of memory "
        f"to convert; about {plan['seconds']} s at {format_bytes(NETWORK_RATE)}/s from the Hub and "
        f"{format_bytes(CORE_RATE)}/s for each core"
    )
    if model is not None:
        reporter.say(f"plan: MaxText runs it with {' '.join(arguments(model.run_settings))}")
    for line in (*job.notes, *job.plan.dropped, *warnings(model)):
        reporter.say(f"plan: {line}")


def _require_space(request: Request, source: Source, job: Job, needed: int) -> None:
    """Raises BadInput if the disk of the working directory or of the destination is too small.

    If both are on one disk, it must hold both.
    """
    published = disk_bytes(job.plan)
    destination = open_destination(request.destination)
    if isinstance(destination, DirectoryDestination):
        if same_disk(destination.location, source.work_dir):
            needed += published
        elif published > (free := free_bytes(destination.location)):
            raise BadInput(_too_small(published, request.destination, free))
    if needed > (free := free_bytes(source.work_dir)):
        raise BadInput(_too_small(needed, str(source.work_dir), free))


def _too_small(needed: int, where: str, free: int) -> str:
    return (
        f"the run needs {format_bytes(needed)} in {where}, and {format_bytes(free)} are free: free some space, or use "
        "another disk"
    )
