"""What a run finds at its destination: nothing, itself, or something else; and what a kill in a commit leaves."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.plan.parts import Part
from conversion_lib.runs.note import Run
from conversion_lib.runs.trees import MAXTEXT
from conversion_lib.runs.workspace import Workspace, clean, exclusively
from conversion_lib.storage import lease
from conversion_lib.storage import local as module
from conversion_lib.storage.disk import check_disk
from conversion_lib.storage.local import RenameStaging
from conversion_lib.storage.logs import FileLog

IDENTITY = {"source": "a", "target": "t", "format": "1"}
OTHER = IDENTITY | {"source": "b"}


def run_of(identity: dict = IDENTITY, parts: int = 1, chunk_limit: int = 1) -> Run:
    return Run(identity=identity, chunk_limit=chunk_limit, chunks=(10,) * parts)


def staging_at(root: Path) -> RenameStaging:
    return RenameStaging(root, MAXTEXT)


def build(staging: RenameStaging, text: str, identity: dict = IDENTITY) -> None:
    work = staging.work.path
    for directory in (staging.build.path, work / "hf"):
        directory.mkdir(exist_ok=True)
        (directory / "file").write_text(text)
    (work / "ferry.json").write_text(json.dumps({"identity": identity}))


def finish(root: Path, text: str = "data", *, overwrite: bool = False, identity: dict = IDENTITY) -> None:
    with Workspace(staging_at(root), run_of(identity), overwrite=overwrite) as workspace:
        assert not workspace.already
        build(workspace.staging, text, identity)
        workspace.commit()


def journal_file(workspace: Workspace) -> Path:
    assert isinstance(workspace.journal, FileLog)
    return workspace.journal.path


def held(root: Path) -> tuple[str, str, dict]:
    identity = json.loads((root / "ferry.json").read_text())["identity"]
    return (root / "0/file").read_text(), (root / "hf/file").read_text(), identity


def begun(root: Path, run: Run = run_of(), **options) -> Workspace:
    """An unfinished run with something in its journal."""
    with Workspace(staging_at(root), run, **options) as workspace:
        journal_file(workspace).write_text("lines")
    return workspace


def test_a_commit_shows_the_whole_and_leaves_nothing(tmp_path):
    finish(tmp_path)
    assert held(tmp_path) == ("data", "data", IDENTITY)
    assert not (tmp_path / ".ferry").exists()
    with Workspace(staging_at(tmp_path), run_of()) as again:
        assert again.already
    assert not (tmp_path / ".ferry").exists()


def test_an_unfinished_run_is_gone_on_with(tmp_path):
    begun(tmp_path, run_of(chunk_limit=77))
    with Workspace(staging_at(tmp_path), run_of(chunk_limit=78)) as workspace:
        assert not workspace.already
        assert workspace.run.chunk_limit == 77
        assert journal_file(workspace).read_text() == "lines"


def test_an_unfinished_run_of_another_source_is_refused_by_name(tmp_path):
    begun(tmp_path)
    with pytest.raises(BadInput, match="source: a there, b here"), Workspace(staging_at(tmp_path), run_of(OTHER)):
        pass


def test_overwrite_begins_anew(tmp_path):
    begun(tmp_path)
    with Workspace(staging_at(tmp_path), run_of(OTHER), overwrite=True) as workspace:
        assert not workspace.journal.exists()


def test_a_finished_run_of_another_target_is_refused(tmp_path):
    finish(tmp_path)
    with (
        pytest.raises(BadInput, match="target: t there, u here"),
        Workspace(staging_at(tmp_path), run_of(IDENTITY | {"target": "u"})),
    ):
        pass
    assert not (tmp_path / ".ferry").exists()


def test_overwrite_replaces_a_finished_run_only_at_its_end(tmp_path):
    finish(tmp_path)
    (tmp_path / "report").mkdir()
    with Workspace(staging_at(tmp_path), run_of(OTHER), overwrite=True) as workspace:
        build(workspace.staging, "new", OTHER)
        assert held(tmp_path) == ("data", "data", IDENTITY)
        workspace.commit()
    assert held(tmp_path) == ("new", "new", OTHER)
    assert not (tmp_path / "report").exists()  # of what is gone


class Killed(BaseException):
    pass


@pytest.mark.parametrize("moves", range(7))
@pytest.mark.parametrize("then", ["same", "clean"])
def test_a_kill_between_any_two_moves_of_a_commit(tmp_path, monkeypatch, moves, then):
    """What was there comes back, or the new is whole; never one run's record beside another's data."""
    finish(tmp_path, "old")
    rename, done = Path.rename, []

    def dies(path, target):
        if len(done) == moves:
            raise Killed
        done.append(path)
        return rename(path, target)

    with Workspace(staging_at(tmp_path), run_of(OTHER), overwrite=True) as workspace:
        build(workspace.staging, "new", OTHER)
        monkeypatch.setattr(Path, "rename", dies)
        with contextlib.suppress(Killed):
            workspace.commit()
        monkeypatch.undo()
    if then == "clean":
        clean([staging_at(tmp_path)])
        whole = [("old", "old", IDENTITY), ("new", "new", OTHER)]
        assert held(tmp_path) in whole
        return
    with Workspace(staging_at(tmp_path), run_of(OTHER), overwrite=True) as workspace:
        build(workspace.staging, "newer", OTHER)
        workspace.commit()
    assert held(tmp_path) == ("newer", "newer", OTHER)


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_stranger_s_file_is_never_touched(tmp_path, overwrite):
    (tmp_path / "thesis.txt").write_text("years of work")
    with (
        pytest.raises(BadInput, match=r"something else: thesis\.txt"),
        Workspace(staging_at(tmp_path), run_of(), overwrite=overwrite),
    ):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0/file").write_text("x")
    with pytest.raises(BadInput, match="not written by ferry"), Workspace(staging_at(tmp_path), run_of()):
        pass


def test_two_runs_at_one_destination(tmp_path):
    with (
        Workspace(staging_at(tmp_path), run_of()),
        pytest.raises(OutsideFailure, match="another run"),
        Workspace(staging_at(tmp_path), run_of()),
    ):
        pass


def test_a_run_that_another_has_finished_meanwhile(tmp_path, monkeypatch):
    """It finds that out behind the lock, and leaves nothing of its own."""
    begun(tmp_path)
    restore = RenameStaging.restore

    def late(staging):
        build(staging, "theirs")
        for name in ("hf", "ferry.json", "0"):
            (staging.work.path / name).rename(tmp_path / name)
        restore(staging)

    monkeypatch.setattr(RenameStaging, "restore", late)
    with Workspace(staging_at(tmp_path), run_of()) as workspace:
        assert workspace.already
    assert not (tmp_path / ".ferry").exists()


def test_clean_removes_what_is_unfinished_and_nothing_else(tmp_path):
    finish(tmp_path)
    begun(tmp_path, run_of(OTHER), overwrite=True)
    assert clean([staging_at(tmp_path)]) == [str(tmp_path / ".ferry")]
    assert held(tmp_path) == ("data", "data", IDENTITY)
    assert clean([staging_at(tmp_path)]) == []


def test_a_disk_that_is_too_small(tmp_path):
    check_disk(tmp_path / "not/there/yet", 1)
    with pytest.raises(BadInput, match="are needed"):
        check_disk(tmp_path / "not/there/yet", 1 << 60)
    with (
        pytest.raises(BadInput, match="are needed"),
        Workspace(staging_at(tmp_path / "a"), run_of(), needed_bytes=1 << 60),
    ):
        pass
    assert not (tmp_path / "a").exists()


def test_what_is_there_already_is_not_asked_of_the_disk_again(tmp_path, monkeypatch):
    workspace = begun(tmp_path)
    (workspace.staging.work.path / "data").write_bytes(bytes(1 << 20))
    asked = []
    monkeypatch.setattr(module, "check_disk", lambda path, needed, otherwise: asked.append(needed))
    with Workspace(staging_at(tmp_path), run_of(), needed_bytes=3 << 20):
        pass
    assert asked[0] <= 2 << 20


# Parts of one run.


def part_of(root: Path, text: str, run: Run | None = None, **options) -> Workspace:
    part = Part.parse(text)
    return Workspace(staging_at(root), run or run_of(parts=part.count), part=part, **options)


def test_parts_are_at_work_together_each_with_its_journal(tmp_path):
    with part_of(tmp_path, "0/2") as first, part_of(tmp_path, "1/2") as second:
        assert journal_file(first) != journal_file(second)
        with pytest.raises(OutsideFailure, match="another run of part 0/2 is at work"), part_of(tmp_path, "0/2"):
            pass
    with part_of(tmp_path, "0/2"):
        pass


def test_who_needs_the_place_alone_keeps_parts_away(tmp_path):
    begun(tmp_path, run_of(parts=2), part=Part(0, 2))
    with (
        exclusively(staging_at(tmp_path)),
        pytest.raises(OutsideFailure, match="another run is at work"),
        part_of(tmp_path, "0/2"),
    ):
        pass


def test_what_was_noted_first_holds(tmp_path):
    """Two parts with other memory: the second takes over the first one's limit and counts."""
    with (
        part_of(tmp_path, "0/2", run_of(parts=2, chunk_limit=5)),
        part_of(tmp_path, "1/2", run_of(parts=2, chunk_limit=9)) as second,
    ):
        assert second.run.chunk_limit == 5


@pytest.mark.parametrize("locks", [True, False])
def test_parts_that_begin_at_the_same_moment(tmp_path, monkeypatch, locks):
    """They agree on one note, even where the file system has no locks."""

    def unsupported(descriptor, operation):
        raise OSError(errno.ENOSYS, "no locks here")

    if not locks:
        monkeypatch.setattr(fcntl, "flock", unsupported)
        monkeypatch.setattr(lease, "SETTLING_SECONDS", 0.05)
    for attempt in range(20):
        root, barrier = tmp_path / str(attempt), threading.Barrier(6)

        def enter(index: int, root: Path = root, barrier: threading.Barrier = barrier) -> int:
            barrier.wait()
            with part_of(root, f"{index}/6", run_of(parts=6, chunk_limit=100 + index)) as workspace:
                return workspace.run.chunk_limit

        with ThreadPoolExecutor(6) as pool:
            limits = list(pool.map(enter, range(6)))
        assert len(set(limits)) == 1


def test_a_part_that_begins_anew_waits_for_nobody(tmp_path):
    with part_of(tmp_path, "0/2"):
        again = part_of(tmp_path, "1/2", run_of(OTHER, parts=2), overwrite=True)
        with pytest.raises(OutsideFailure, match="another run is at work"), again:
            pass
    with part_of(tmp_path, "1/2", run_of(OTHER, parts=2), overwrite=True) as workspace:
        assert workspace.run.identity == OTHER
    with part_of(tmp_path, "0/2", run_of(OTHER, parts=2), overwrite=True) as workspace:
        assert workspace.run.identity == OTHER


def test_the_note_of_a_run_that_was_committed_is_not_joined(tmp_path):
    """A kill between the last move of a commit and the end: --overwrite means all of it again."""
    run = run_of(parts=2)
    with part_of(tmp_path, "0/2", run) as workspace:
        journal_file(workspace).write_text("lines")
        workspace.staging.build.path.rename(workspace.staging.final.path)
        (tmp_path / "0/file").write_text("data")
        (tmp_path / "ferry.json").write_text(json.dumps({"identity": IDENTITY}))
    with part_of(tmp_path, "0/2", run, overwrite=True) as workspace:
        assert not workspace.journal.exists()
    shutil.rmtree(workspace.staging.build.path)
    with part_of(tmp_path, "0/2", run) as workspace:
        assert workspace.already
    assert not (tmp_path / ".ferry").exists()
