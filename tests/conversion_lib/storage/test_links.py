"""Links that lead out of a source are refused; so are all links among Ferry's own files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.storage.links import refuse_links_in, refuse_links_out


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "source"
    (directory / "deep").mkdir(parents=True)
    (directory / "file").write_text("mine")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret").write_text("secret")
    return directory


def refused(directory: Path, **options: object) -> str:
    with pytest.raises(BadInput) as caught:
        refuse_links_out(directory, **options)  # type: ignore[arg-type]
    return str(caught.value)


@pytest.mark.parametrize("target", ["file", "deep/../file", "deep", "{source}/file", "nowhere", "again"])
def test_a_link_that_stays_inside(source: Path, target: str) -> None:
    (source / "again").symlink_to("file")
    (source / "link").symlink_to(target.format(source=source))
    refuse_links_out(source)


@pytest.mark.parametrize(
    "target", ["../outside/secret", "{outside}/secret", "/etc/passwd", "../nowhere", "deep/out", "../source-2"]
)
@pytest.mark.parametrize("at", ["link", "deep/link"])
def test_a_link_that_leads_out(source: Path, target: str, at: str) -> None:
    (source.parent / "source-2").mkdir()
    (source / "deep/out").symlink_to(source.parent / "outside/secret")
    (source / at).symlink_to(target.format(outside=source.parent / "outside"))
    assert "is a symbolic link that leads out of" in refused(source)
    if at == "link" and target != "../source-2":
        assert str(source / "link") in refused(source, recursive=False)


def test_what_is_not_read_may_be_a_link(source: Path) -> None:
    """Hidden files and directories of others, where only the files beside the weights are read."""
    (source / ".git").symlink_to("../outside/secret")
    (source / "logs").symlink_to("../outside")
    (source / "deep/link").symlink_to("../../outside/secret")
    refuse_links_out(source, recursive=False)
    (source / ".ferry_provenance.json").symlink_to("../outside/secret")
    assert "/.ferry_provenance.json is a symbolic link" in refused(source, recursive=False)


def test_a_part_of_a_checkpoint_may_lead_to_another_part(source: Path) -> None:
    (source / "deep/link").symlink_to("../file")
    assert "deep/link" in refused(source / "deep")
    refuse_links_out(source / "deep", within=source)
    (source / "0").symlink_to("../outside")
    assert f"{source}/0 is a symbolic link that leads out of {source}:" in refused(source / "0", within=source)


def test_a_link_to_the_source_itself(source: Path) -> None:
    """Whoever gives a link means what it leads to."""
    (source / "link").symlink_to("file")
    (source.parent / "current").symlink_to("source")
    refuse_links_out(source.parent / "current")


def cached(root: Path) -> Path:
    """A repository as the Hub's client keeps it."""
    (root / "blobs").mkdir(parents=True)
    (root / "blobs/abc").write_text("{}")
    snapshot = root / "snapshots/0123"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    (snapshot / "sub/config.json").symlink_to("../../../blobs/abc")
    return snapshot


def test_a_snapshot_in_the_cache_of_the_hubs_client(tmp_path: Path) -> None:
    snapshot = cached(tmp_path / "models--acme--tiny")
    for directory in (snapshot, snapshot / "sub"):
        refuse_links_out(directory)
    (tmp_path / "link").symlink_to(snapshot)
    refuse_links_out(tmp_path / "link")


def _to_another_repository(root: Path) -> None:
    (root / "snapshots/0123/x.json").symlink_to("../../../models--acme--other/blobs/abc")


def _through_its_blobs(root: Path) -> None:
    (root / "blobs/bad").symlink_to("../../secret")
    (root / "snapshots/0123/x.json").symlink_to("../../blobs/bad")


def _blobs_elsewhere(root: Path) -> None:
    (root / "blobs/abc").unlink()
    (root / "blobs").rmdir()
    (root / "blobs").symlink_to("../models--acme--other/blobs")


def _to_its_refs(root: Path) -> None:
    (root / "snapshots/0123/x.json").symlink_to("../../refs")


@pytest.mark.parametrize("spoil", [_to_another_repository, _through_its_blobs, _blobs_elsewhere, _to_its_refs])
def test_a_snapshot_that_leads_elsewhere(tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    snapshot = cached(tmp_path / "models--acme--tiny")
    cached(tmp_path / "models--acme--other")
    (tmp_path / "secret").write_text("secret")
    spoil(tmp_path / "models--acme--tiny")
    assert "leads out of" in refused(snapshot)


def test_own_files_are_no_links(source: Path) -> None:
    refuse_links_in(source)
    refuse_links_in(source / "nothing")
    (source.parent / "link").symlink_to("source")
    with pytest.raises(BadInput, match=r"/link is a symbolic link among ferry's own files"):
        refuse_links_in(source.parent / "link")
    (source / "deep/inner").symlink_to("../file")
    with pytest.raises(BadInput, match=r"/deep/inner is a symbolic link"):
        refuse_links_in(source)
