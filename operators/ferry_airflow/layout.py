"""Where a worker keeps what a run works on: everything under one directory, keyed by the source's commit.

Layout of `FERRY_WORK_DIR` (an environment variable of the workers; default `~/ferry-work`)::

    <repo, with -- for />/<commit>/hf          the source as downloaded
    <repo, with -- for />/<commit>/bf16        dequantized
    <repo, with -- for />/<commit>/<target>    converted, such as scanned-bf16-ocdbt-zarr3-maxtext0.2.5
    local/<name>-<hash>/...                    the same for a source that is a directory
    <...>/.runs/<run id>                       which runs work there, each with its target
    runs/<run id>/<task id>.json               the manifest that each stage left
    exports/<name>-<hash>                      an export that is uploaded; it stays, for another destination

Keyed by commit and target, so that a retry, a second run and another target find what is already there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

WORK_DIR_VARIABLE = "FERRY_WORK_DIR"

DOWNLOADED, DEQUANTIZED, RUNS = "hf", "bf16", ".runs"
"""The names in a working directory, beside those of targets."""


def work_root() -> Path:
    """The directory named by `FERRY_WORK_DIR`, absolute."""
    return Path(os.environ.get(WORK_DIR_VARIABLE) or "~/ferry-work").expanduser().absolute()


def hub_work_dir(repo: str, commit: str) -> Path:
    """The working directory of a Hub repository at a commit."""
    return work_root() / repo.replace("/", "--") / commit


def local_work_dir(source: Path) -> Path:
    """The working directory of a source that is a directory.

    A directory has no commit, so its files' names, sizes and times stand in for one: changed files are
    another source, and do not meet what was made of the old ones.
    """
    entries = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.iterdir() if path.is_file()
    )
    digest = hashlib.sha256(json.dumps([str(source), entries]).encode()).hexdigest()
    return work_root() / "local" / f"{source.name}-{digest[:12]}"


def file_name(run_id: str) -> str:
    """The name that a run goes by in the file system."""
    return run_id.replace("/", "_")


def save_manifest(run_id: str, task_name: str, manifest: dict[str, Any]) -> Path:
    """Writes what a stage left to `runs/<run id>/<task name>.json`, whole or not at all; returns its path."""
    path = work_root() / "runs" / file_name(run_id) / f"{task_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(manifest, indent=2))
    unfinished.rename(path)
    return path
