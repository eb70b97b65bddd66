"""The subprocess that converts on the fly: `python -m conversion_lib.on_the_fly JOB`.

It is a separate process, so that it does not touch the parent's accelerators. It ends with its parent: standard input
is a pipe that the parent holds open. The Hub's token comes in HF_TOKEN.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from conversion_lib.conversions.opening import known_directory
from conversion_lib.core.process import collect_rarely, reuse_freed_memory
from conversion_lib.program import Outcome, run_command
from conversion_lib.progress import Reporter
from conversion_lib.record import Target


class Job(BaseModel):
    """One conversion.

    Attributes:
        source: A Hugging Face directory or a Hub repository.
        revision: Branch, tag or commit of the repository.
        model: A name in the catalogue. None: config.json determines the family.
        destination: A directory or gs://bucket/prefix.
        target: What to write.
        memory_budget: Bytes.
        overwrite: Whether to replace another checkpoint at the destination.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    revision: str
    model: str | None
    destination: str
    target: Target
    memory_budget: int
    overwrite: bool


def run(job: Job, reporter: Reporter) -> Outcome:
    """Downloads the source if it is a repository, and converts it.

    Raises:
        BadInput: As for `convert`, or the Hub has no such repository.
        OutsideFailure: As for `convert`, or the Hub failed.
    """
    from conversion_lib import hub
    from conversion_lib.conversions.convert import convert
    from conversion_lib.runs.options import Options

    directory = known_directory(job.source)
    if directory is None:
        directory = hub.cached_download(job.source, revision=job.revision, reporter=reporter)
    options = Options(memory_budget=job.memory_budget, overwrite=_must_overwrite(job, directory), among_others=True)
    result = convert(directory, job.destination, job.target, model=job.model, options=options, reporter=reporter)
    return Outcome(result, [str(result)])


def _must_overwrite(job: Job, directory: Path) -> bool:
    """Whether the destination holds something else. An unfinished run of the same job is resumed instead."""
    from conversion_lib.conversions.convert import prepare
    from conversion_lib.runs.trees import maxtext_staging
    from conversion_lib.runs.workspace import finished, unfinished

    staging = maxtext_staging(job.destination)
    if not job.overwrite or finished(staging) is not None:
        return job.overwrite
    begun = unfinished(staging)
    if begun is None:
        return False
    plan = prepare(directory, job.target, model=job.model, memory_budget=job.memory_budget).plan
    return begun.identity != plan.full_identity


def _end_with_parent() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """Runs the job in the first argument, and exits with the exit code of a `ferry` command."""
    reuse_freed_memory()
    collect_rarely()
    job = Job.model_validate_json(sys.argv[1])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    raise SystemExit(run_command(lambda reporter: run(job, reporter)))
