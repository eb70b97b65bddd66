"""Downloads the files that a job needs from the Hub, at one commit, and checks each one against the Hub's metadata.

A file is fetched into `DESTINATION/.ferry`, checked, synced and then renamed. So every file under its final name has
been checked, and a retry keeps it. `.ferry_provenance.json` is written last and marks a complete download.
"""

from __future__ import annotations

import datetime
import os
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import ModelInfo
from pydantic import BaseModel, ConfigDict, ValidationError

from conversion_lib import __version__
from conversion_lib.core.retry import Backoff
from conversion_lib.errors import BadInput, OutsideFailure, problem_of
from conversion_lib.hub.errors import explain, shown_endpoint
from conversion_lib.hub.files import Fetcher, Mismatch, Resolved, hub_endpoint, mismatch
from conversion_lib.hub.needed import needed_files
from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import (
    DOWNLOAD_RECORD_NAME,
    NOT_OF_A_SOURCE,
    WORK_NAME,
    Commit,
    Provenance,
    RemoteFile,
    is_commit,
    parsed,
)
from conversion_lib.sources.noted import download_record, modified_times
from conversion_lib.storage.disk import check_disk
from conversion_lib.storage.files import disk_error, expanded, in_parallel, one_at_a_time, write_atomically
from conversion_lib.storage.links import refuse_links_in
from conversion_lib.storage.locations import local_path
from conversion_lib.storage.names import is_hidden, is_safe, path_below, require_distinct, shown

THREADS = 4
SHOWN = 4
"""Names in a message, of many."""


class _Unfinished(BaseModel):
    """The content of `.ferry/download.json`: the repository and commit of an unfinished download."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    commit: Commit


@dataclass(frozen=True, slots=True)
class DownloadResult:
    """A complete download. `bytes` counts all files, `bytes_downloaded` only those that this call fetched."""

    repo: str
    revision: str
    commit: str
    path: Path
    files: int
    bytes: int
    bytes_downloaded: int
    seconds: float


def resolve(
    repo: str, revision: str = "main", *, backoff: Backoff | None = None, reporter: Reporter = SILENT
) -> Resolved:
    """Finds the commit that `revision` names now, and its files.

    Asks HF_ENDPOINT, or the public Hub, with the token in HF_TOKEN or in the client's token file.

    Raises:
        BadInput: The repository or revision does not exist, the token gives no access to it, or the client is offline.
        OutsideFailure: The Hub cannot be reached in all tries of `backoff`.
    """
    endpoint = hub_endpoint()
    where = f"{repo} at {revision}"

    def ask() -> Resolved:
        try:
            api = huggingface_hub.HfApi(endpoint)
            info = api.model_info(repo, revision=revision, files_metadata=True, timeout=30)
        except Exception as error:
            raise explain(error, where, repo, endpoint) from error
        return _resolved(repo, where, shown_endpoint(endpoint), info)

    resolved = (backoff or Backoff()).run(ask, reporter=reporter)
    left_out = [file.path for file in resolved.files if not _may_be_written(file.path)]
    if told := [shown(path) for path in left_out if "/" not in path and not is_hidden(path)]:
        names = ", ".join(told[:SHOWN])
        reporter.say(f"{repo}: not fetched: {names}; the name is one of ferry's own records, or no path on all systems")
    files = [file for file in resolved.files if file.path not in left_out]
    return resolved.model_copy(update={"files": files})


def _resolved(repo: str, where: str, hub: str, info: ModelInfo) -> Resolved:
    """Returns what the Hub says of a repository. A mirror may say anything, so it is checked; raises BadInput."""
    files = []
    for sibling in info.siblings or []:
        if sibling.size is None or sibling.blob_id is None:
            raise BadInput(
                f"{hub} gives no size or git id for {shown(sibling.rfilename)} of {where}, so a"
                " download could not be checked; use the Hub itself or a mirror that keeps them"
            )
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        size = sibling.lfs.size if sibling.lfs else sibling.size
        files.append({"path": sibling.rfilename, "size": size, "sha256": sha256, "blob_id": sibling.blob_id})
    try:
        return Resolved.model_validate({"repo": repo, "commit": info.sha, "files": files})
    except ValidationError as error:
        raise BadInput(f"{hub} does not answer as a Hub does for {where}: {problem_of(error)}") from None


def _may_be_written(path: str) -> bool:
    """Returns whether a file at the top of a repository may be fetched. Deeper ones never are; messages name them."""
    return "/" in path or (is_safe(path) and not is_hidden(path) and path not in NOT_OF_A_SOURCE)


def download(
    repo: str,
    destination: Path,
    *,
    revision: str = "main",
    reporter: Reporter = SILENT,
    threads: int = THREADS,
    backoff: Backoff | None = None,
) -> DownloadResult:
    """Downloads the files that a job needs into the directory `destination`, which is created if necessary.

    Every file is checked against its SHA-256 or git id. An interrupted download is resumed. If the same commit is
    already complete, nothing is fetched. Two downloads into one destination take turns.

    Raises:
        BadInput: As for `resolve` and `needed_files`, the disk is too small, or the destination has other files.
        OutsideFailure: The Hub fails in all tries of `backoff`, or sends other bytes than it announced.
    """
    started, began = time.monotonic(), now()
    destination = expanded(local_path(destination, "a directory")).absolute()
    fetched: list[RemoteFile] = []
    if (kept := _whole(destination, repo, revision)) is None:  # else `revision` is a complete commit: no need to ask
        resolved = resolve(repo, revision, backoff=backoff, reporter=reporter)
        if (kept := _whole(destination, repo, resolved.commit)) is None:
            needed = needed_files(resolved, destination, backoff=backoff, reporter=reporter)
            job = _Download(resolved, needed, destination, reporter)
            kept, fetched = job.run(revision, began, threads, backoff or Backoff())
    if not fetched:
        reporter.say(f"{repo} at {kept.commit} is already in {destination}")
    return DownloadResult(
        repo=repo,
        revision=revision,
        commit=kept.commit,
        path=destination,
        files=len(kept.files),
        bytes=sum(file.size for file in kept.files),
        bytes_downloaded=sum(file.size for file in fetched),
        seconds=time.monotonic() - started,
    )


def cached_download(repo: str, *, revision: str = "main", reporter: Reporter = SILENT) -> Path:
    """Downloads into the commit's directory in `cache_directory`, and returns that directory.

    Several runs may use the cache at the same time. Raises what `download` raises.
    """
    cache = path_below(cache_directory(), repo.replace("/", "--"), repo)
    whole = is_commit(revision) and _whole(cache / revision, repo, revision) is not None  # no need to ask the Hub
    commit = revision if whole else resolve(repo, revision, reporter=reporter).commit
    return download(repo, cache / commit, revision=commit, reporter=reporter).path


def cache_directory() -> Path:
    """Returns the directory for downloads without a destination: FERRY_CACHE, or ~/.cache/ferry.

    Raises:
        BadInput: FERRY_CACHE is not set, and there is no home directory.
    """
    return expanded(os.environ.get("FERRY_CACHE") or "~/.cache/ferry", "set FERRY_CACHE to a directory for downloads")


def _whole(destination: Path, repo: str, commit: str) -> Provenance | None:
    """Returns the provenance if the destination has this commit and every file has its size."""
    kept = download_record(destination)
    if kept is None or (kept.repo, kept.commit) != (repo, commit):
        return None
    return kept if all(_size(destination, file) == file.size for file in kept.files) else None


class _Download:
    """One download into one destination."""

    def __init__(self, resolved: Resolved, files: list[RemoteFile], destination: Path, reporter: Reporter) -> None:
        self.resolved, self.files, self.destination, self.reporter = resolved, files, destination, reporter
        require_distinct((file.path for file in files), resolved.repo)
        self.endpoint = hub_endpoint()
        self.name = f"{resolved.repo} at {resolved.commit}"
        self.work = destination / WORK_NAME
        self.staging = self.work / "hub"
        self.unfinished = self.work / "download.json"

    def run(self, revision: str, began: str, threads: int, backoff: Backoff) -> tuple[Provenance, list[RemoteFile]]:
        """Fetches the missing files; returns the provenance, which it writes, and the fetched files."""
        waiting = f"waiting for another download into {self.destination}"
        refuse_links_in(self.work)
        try:
            with one_at_a_time(self.work / "lock", lambda: self.reporter.say(waiting)):
                kept = _whole(self.destination, self.resolved.repo, self.resolved.commit)
                if kept is not None:  # the other download fetched everything
                    return kept, []
                missing = self._begin(threads)
                try:
                    self._fetch_all(missing, threads, backoff)
                finally:
                    shutil.rmtree(self.staging, ignore_errors=True)
                return self._record(revision, began), missing
        except OSError as error:
            raise disk_error(error, f"cannot write to {self.destination}") from error
        finally:
            with suppress(OSError):  # not empty if a later try can resume
                self.work.rmdir()

    def _begin(self, threads: int) -> list[RemoteFile]:
        """Returns the files to fetch and notes the download in the destination; BadInput if that has other files."""
        resolved = self.resolved
        shutil.rmtree(self.staging, ignore_errors=True)  # left by a killed try
        there: Provenance | _Unfinished | None = download_record(self.destination)
        if there is None and self.unfinished.exists():
            what = "note of a download"
            there = parsed(_Unfinished, self.unfinished.read_bytes(), self.unfinished, what)
        if there is None:
            present = self._adopt(threads)
        elif (there.repo, there.commit) != (resolved.repo, resolved.commit):
            raise BadInput(
                f"{self.destination} has {there.repo} at {there.commit}, not {self.name}: give another directory,"
                " or remove this one"
            )
        else:
            sizes = {file.path: _size(self.destination, file) for file in self.files}
            changed = [file.path for file in self.files if sizes[file.path] not in (None, file.size)]
            self._refuse(changed)
            present = {path for path, size in sizes.items() if size is not None}
        missing = [file for file in self.files if file.path not in present]
        check_disk(self.destination, sum(file.size for file in missing))
        unfinished = _Unfinished(repo=resolved.repo, commit=resolved.commit)
        write_atomically(self.unfinished, unfinished.model_dump_json().encode())
        (self.destination / DOWNLOAD_RECORD_NAME).unlink(missing_ok=True)  # it marks a complete download
        return missing

    def _adopt(self, threads: int) -> set[str]:
        """Returns the paths of files from another tool that are already there and have the Hub's content."""
        present = [file for file in self.files if _size(self.destination, file) is not None]
        expected = {file.path for file in self.resolved.files}
        strangers = [p.name for p in self.destination.glob("*.safetensors*") if p.name not in expected]

        def check(file: RemoteFile, stopped: threading.Event) -> str | None:
            return mismatch(self.destination / file.path, file)

        for file, problem in zip(present, in_parallel(check, present, threads=threads), strict=True):
            if problem:
                strangers.append(f"{file.path} ({problem})")
        self._refuse(strangers)
        return {file.path for file in present}

    def _refuse(self, strangers: list[str]) -> None:
        if strangers:
            raise BadInput(
                f"{self.destination} has files that are not from {self.name}: {', '.join(sorted(strangers)[:4])};"
                " give another directory, or remove them"
            )

    def _fetch_all(self, missing: list[RemoteFile], threads: int, backoff: Backoff) -> None:
        resolved = self.resolved
        fetcher = Fetcher(resolved.repo, resolved.commit, self.endpoint, self.staging, self.destination)
        with self.reporter.task(f"downloading {self.resolved.repo}", sum(f.size for f in missing)) as progress:

            def fetch(file: RemoteFile, stopped: threading.Event) -> None:
                counted, afresh = 0, False

                def advance(nbytes: int) -> None:
                    nonlocal counted
                    if stopped.is_set():  # the only way to end the client's own loop
                        raise OutsideFailure(f"{file.path}: stopped because another file failed")
                    counted += nbytes
                    progress.advance(nbytes)

                def attempt() -> None:
                    nonlocal counted, afresh
                    progress.advance(-counted)
                    counted = 0
                    try:
                        fetcher.fetch(file, advance, afresh=afresh)
                    except Mismatch:
                        afresh = True
                        raise
                    progress.advance(file.size - counted)  # if the client had it in its cache

                backoff.run(attempt, stopped=stopped, reporter=self.reporter)

            in_parallel(fetch, missing, threads=threads)

    def _record(self, revision: str, began: str) -> Provenance:
        provenance = Provenance(
            repo=self.resolved.repo,
            revision=revision,
            commit=self.resolved.commit,
            endpoint=shown_endpoint(self.endpoint),
            files=self.files,
            modified=modified_times(self.destination, (file.path for file in self.files)),
            started=began,
            finished=now(),
            huggingface_hub=huggingface_hub.__version__,
            ferry=__version__,
        )
        content = provenance.model_dump_json(indent=2).encode() + b"\n"
        write_atomically(self.destination / DOWNLOAD_RECORD_NAME, content)
        self.unfinished.unlink()
        return provenance


def _size(directory: Path, file: RemoteFile) -> int | None:
    """Returns the bytes of a file that is there. A link does not count as one, and is replaced."""
    path = path_below(directory, file.path, file.path)
    return path.stat().st_size if path.is_file() and not path.is_symlink() else None


def now() -> str:
    """Returns the time in UTC, in ISO 8601."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
