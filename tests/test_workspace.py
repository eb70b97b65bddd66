"""What a run finds at its destination: nothing, itself, or something else."""

from __future__ import annotations

import json

import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.workspace import Layout, Workspace, check_disk, clean

IDENTITY = {"source": "a", "target": "t", "format": "1"}


def layout_at(root) -> Layout:
    return Layout(
        root / "0",
        root / ".ferry",
        root / ".ferry" / "0",
        root / "ferry.json",
        frozenset({"0", ".ferry", "ferry.json"}),
    )


def build(layout: Layout, text: str = "data") -> None:
    layout.build.mkdir()
    (layout.build / "file").write_text(text)


def record(layout: Layout, identity=None) -> None:
    layout.record.write_text(json.dumps({"identity": identity or IDENTITY}))


def finish(root, text: str = "data", overwrite: bool = False) -> None:
    workspace = Workspace(layout_at(root), IDENTITY, overwrite=overwrite)
    with workspace:
        build(workspace.layout, text)
        workspace.commit(lambda: record(workspace.layout))


def test_a_commit_shows_the_whole_and_leaves_nothing(tmp_path):
    finish(tmp_path / "out")
    assert (tmp_path / "out/0/file").read_text() == "data"
    assert not (tmp_path / "out/.ferry").exists()
    assert Workspace(layout_at(tmp_path / "out"), IDENTITY).finished()


def test_an_unfinished_run_is_gone_on_with(tmp_path):
    with Workspace(layout_at(tmp_path / "out"), IDENTITY) as workspace:
        workspace.journal.write_text("lines")
    workspace = Workspace(layout_at(tmp_path / "out"), IDENTITY)
    assert not workspace.finished()
    with workspace:
        assert workspace.journal.read_text() == "lines"


def test_an_unfinished_run_of_another_source_is_refused_by_name(tmp_path):
    with Workspace(layout_at(tmp_path / "out"), IDENTITY):
        pass
    with (
        pytest.raises(BadInput, match="source: a there, b here"),
        Workspace(layout_at(tmp_path / "out"), IDENTITY | {"source": "b"}),
    ):
        pass


def test_overwrite_begins_anew(tmp_path):
    with Workspace(layout_at(tmp_path / "out"), IDENTITY) as workspace:
        workspace.journal.write_text("lines")
    with Workspace(layout_at(tmp_path / "out"), IDENTITY | {"source": "b"}, overwrite=True) as workspace:
        assert not workspace.journal.exists()


def test_a_finished_run_of_another_target_is_refused(tmp_path):
    finish(tmp_path / "out")
    with pytest.raises(BadInput, match="target: t there, u here"):
        Workspace(layout_at(tmp_path / "out"), IDENTITY | {"target": "u"}).finished()


def test_overwrite_replaces_a_finished_run_only_at_its_end(tmp_path):
    finish(tmp_path / "out")
    workspace = Workspace(layout_at(tmp_path / "out"), IDENTITY, overwrite=True)
    assert not workspace.finished()
    with workspace:
        build(workspace.layout, "new")
        assert (tmp_path / "out/0/file").read_text() == "data"
        workspace.commit(lambda: record(workspace.layout))
    assert (tmp_path / "out/0/file").read_text() == "new"


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_stranger_s_file_is_never_touched(tmp_path, overwrite):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    with pytest.raises(BadInput, match=r"something else: thesis\.txt"):
        Workspace(layout_at(tmp_path / "out"), IDENTITY, overwrite=overwrite).finished()
    assert (tmp_path / "out/thesis.txt").exists()


def test_a_checkpoint_that_is_not_ours_is_refused(tmp_path):
    (tmp_path / "out/0").mkdir(parents=True)
    (tmp_path / "out/0/file").write_text("x")
    with pytest.raises(BadInput, match="not written by ferry"):
        Workspace(layout_at(tmp_path / "out"), IDENTITY).finished()


def test_two_runs_at_one_destination(tmp_path):
    with (
        Workspace(layout_at(tmp_path / "out"), IDENTITY),
        pytest.raises(OutsideFailure, match="another run"),
        Workspace(layout_at(tmp_path / "out"), IDENTITY),
    ):
        pass


def test_clean_removes_what_is_unfinished_and_nothing_else(tmp_path):
    finish(tmp_path / "out")
    with Workspace(layout_at(tmp_path / "out"), IDENTITY):
        pass
    assert clean(tmp_path / "out") == [tmp_path / "out/.ferry"]
    assert (tmp_path / "out/0/file").exists()
    assert clean(tmp_path / "out") == []


def test_a_disk_that_is_too_small(tmp_path):
    check_disk(tmp_path / "not/there/yet", 1)
    with pytest.raises(BadInput, match="are needed"):
        check_disk(tmp_path / "not/there/yet", 1 << 60)
