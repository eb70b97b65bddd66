"""The stage `resolve`: which commit is meant, pinned for the whole run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from conversion_lib.errors import BadInput
from conversion_lib.progress import Reporter
from operators.base import Manifest, StageOperator
from operators.layout import hub_work_dir, local_work_dir
from operators.place import TaskLog


class LogReporter(Reporter):
    """Says things in a task's log: that the Hub does not answer and when it is asked again."""

    def __init__(self, log: TaskLog) -> None:
        super().__init__("quiet")
        self._log = log

    def say(self, message: str) -> None:
        self._log.info("%s", message)


class ResolveOperator(StageOperator):
    """Asks the Hub for the commit of a revision; all later stages use that commit and nothing else.

    Runs in the task's process, through the Hub that HF_ENDPOINT names.

    :param repo: Hub repository (`org/name`), or the absolute path of a directory on the worker (templated)
    :param revision: branch, tag or commit (templated); default `main`; a directory has none
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `repo`, `commit` (None for a directory), `files`, `path` (where the source is or
        will be) and `work_dir` (where the run keeps what it makes of it)
    """

    stage: ClassVar[str] = "resolve"
    template_fields: Sequence[str] = ("repo", "revision")

    def __init__(self, *, repo: str, revision: str = "main", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.repo = repo
        self.revision = revision

    def work(self) -> Manifest:
        return self._resolve_directory() if self.repo.startswith("/") else self._resolve_repo()

    def _resolve_directory(self) -> Manifest:
        source = Path(self.repo)
        if not source.is_dir():
            raise BadInput(f"{source} is not a directory on this worker")
        work_dir = local_work_dir(source)
        files = sum(1 for path in source.iterdir() if path.is_file())
        self.log.info("%s is a directory of %d files; nothing to download", source, files)
        return {
            "repo": self.repo,
            "commit": None,
            "files": files,
            "path": str(source),
            "work_dir": str(work_dir),
        }

    def _resolve_repo(self) -> Manifest:
        from conversion_lib.hub import resolve

        with self.hub_token():
            found = resolve(self.repo, self.revision, reporter=LogReporter(self.log))
        work_dir = hub_work_dir(found.repo, found.commit)
        self.log.info("%s at %s is commit %s, %d files", found.repo, self.revision, found.commit, len(found.files))
        return {
            "repo": found.repo,
            "commit": found.commit,
            "files": len(found.files),
            "path": str(work_dir / "hf"),
            "work_dir": str(work_dir),
        }
