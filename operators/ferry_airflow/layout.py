"""Where a worker keeps a run's files: in one directory, by the source's commit.

Layout of `FERRY_WORK_DIR` (an environment variable of the workers; default `~/ferry-work`)::

    <repo, with -- for />/<commit>/hf          the source as downloaded
    <repo, with -- for />/<commit>/bf16        dequantized
    <repo, with -- for />/<commit>/<target>    converted, such as scanned-bf16-ocdbt-zarr3-maxtext0.2.5
    local/<name>-<hash>/...                    the same for a source that is a directory
    <...>/.<name>.written.json                 sizes and times of the files of bf16 and <target>, as written
    <...>/.runs/<DAG id>@<run id>              one file for each run that works there, with the name of its target
    runs/<DAG id>@<run id>/<task id>.json      the manifest of each stage
    exports/<name>-<hash>                      an export to upload; it stays, for another destination

The paths depend on commit and target only, so a retry, a second run and another target find what is already there.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from conversion_lib.core.plain_json import to_json
from conversion_lib.storage.files import expanded
from conversion_lib.storage.names import path_below, safe_part

WORK_DIR_VARIABLE = "FERRY_WORK_DIR"

DOWNLOADED, DEQUANTIZED, RUNS = "hf", "bf16", ".runs"
"""The names in a working directory besides those of targets."""


def work_root() -> Path:
    """Returns the absolute path that `FERRY_WORK_DIR` names; `~/ferry-work` by default."""
    path = os.environ.get(WORK_DIR_VARIABLE) or "~/ferry-work"
    return expanded(path, f"set {WORK_DIR_VARIABLE} to a directory").absolute()


def hub_work_dir(repo: str, commit: str) -> Path:
    """Returns the working directory of a Hub repository at a commit."""
    return path_below(path_below(work_root(), repo.replace("/", "--"), repo), commit, repo)


def local_work_dir(source: Path) -> Path:
    """Returns the working directory of a source that is a directory.

    A directory has no commit. Instead, the name depends on the names, sizes and modification times of its files: after
    a change, the directory is another source, and old output is not mixed with new.

    Raises:
        OSError: The directory cannot be read.
    """
    entries = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in source.iterdir() if path.is_file()
    )
    digest = hashlib.sha256(json.dumps([str(source), entries]).encode()).hexdigest()
    return work_root() / "local" / f"{source.name}-{digest[:12]}"


def run_report(destination: str, dag_id: str, run_id: str) -> str:
    """Returns where a run's check leaves its report until the run has published: under the run's destination.

    Workers and the API server share the destination, and no disk.
    """
    name = hashlib.sha256(json.dumps([dag_id, run_id]).encode()).hexdigest()[:32]
    return f"{destination.rstrip('/')}/.ferry-reports/{name}.html"


def note_of(output: Path) -> Path:
    """Returns the file, beside a stage's output, that has the sizes and times of the output's files."""
    return output.with_name(f".{output.name}.written.json")


def run_name(dag_id: str, run_id: str) -> str:
    """Returns the name of a run among those of all DAGs: two DAGs may have runs of one id, such as scheduled ones."""
    return f"{dag_id}@{run_id}"  # no DAG's id has an @


def file_name(run_id: str) -> str:
    """Returns the name of a run in the file system: its id, with `_` for `/`. Raises BadInput if that is no name."""
    return safe_part(run_id.replace("/", "_"), "the run")


def save_manifest(run: str, task_name: str, manifest: dict[str, Any]) -> Path:
    """Writes a stage's manifest to `runs/<run>/<task name>.json`, atomically, and returns the path."""
    path = work_root() / "runs" / file_name(run) / f"{task_name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(to_json(manifest, indent=2))
    unfinished.rename(path)
    return path
