"""Publishing, whatever the kind of destination."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.progress import Reporter
from conversion_lib.publish.destinations import base, open_destination
from conversion_lib.publish.prune import prune
from conversion_lib.publish.publish import publish
from conversion_lib.publish.staged import checkpoint_digest
from conversion_lib.publish.verify import verify
from conversion_lib.storage import disk
from tests.support.published_checkpoints import (
    COMMIT,
    LATEST,
    OTHERS,
    PLACE,
    STEP,
    make_checkpoint,
    names,
    read,
    write_verdict,
)


def test_everything_lies_where_the_layout_says(checkpoint: Path, url: str) -> None:
    result = publish(checkpoint / "0" / "items", url)
    location = f"{url.removeprefix('file://')}/{PLACE}"
    assert (result.url, result.marker) == (location, f"{location}/ferry_commit.json")
    assert (result.digest, result.checked) == (checkpoint_digest(checkpoint), True)
    expected = {*STEP, *OTHERS, "0/items/d/salt", "report/check.json"}
    assert set(names(location)) == expected | {"provenance.json", "manifest.json", "ferry_commit.json"}
    assert all(read(location, name) == (checkpoint / name).read_bytes() for name in expected)
    assert names(url) == [f"{PLACE}/{name}" for name in names(location)] + [LATEST]
    assert (result.files, result.bytes) == (len(expected) + 1, result.bytes_copied)

    manifest = json.loads(read(location, "manifest.json") or b"")
    assert (manifest["digest"], manifest["checked"]) == (result.digest, True)
    assert {entry["path"] for entry in manifest["files"]} == expected | {"provenance.json"}
    provenance = json.loads(read(location, "provenance.json") or b"")
    assert provenance["record"]["origin"]["commit"] == COMMIT
    assert provenance["verdict"]["max_kl"] == 1e-4
    latest = json.loads(read(url, LATEST) or b"")
    assert latest["location"] == PLACE.partition("/")[2] and latest["digest"] == result.digest
    verified = verify(location)
    assert (verified.problems, verified.digest) == ([], result.digest)


def test_again_does_nothing(checkpoint: Path, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    first = publish(checkpoint, url)
    marker, latest = (
        read(first.url, "ferry_commit.json"),
        read(url, LATEST),
    )
    again = publish(checkpoint, url, reporter=Reporter())
    assert again.bytes_copied == 0 and again.url == first.url
    assert f"{first.digest} is already published at {first.url}" in capsys.readouterr().err
    assert (
        read(first.url, "ferry_commit.json"),
        read(url, LATEST),
    ) == (marker, latest)


def test_another_checkpoint_there(checkpoint: Path, url: str, tmp_path: Path) -> None:
    first = publish(checkpoint, url)
    other = make_checkpoint(tmp_path / "other", salt=b"other")
    with pytest.raises(BadInput) as caught:
        publish(other, url)
    assert first.digest in str(caught.value) and checkpoint_digest(other) in str(caught.value)
    assert verify(first.url).problems == []


def test_local_weights_go_by_the_fingerprint(tmp_path: Path) -> None:
    local = make_checkpoint(tmp_path / "local", commit=None)
    assert "/tiny/local-abababababab/" in publish(local, str(tmp_path / "out")).url


def test_latest_follows_the_newest_and_is_mended(checkpoint: Path, url: str, tmp_path: Path) -> None:
    publish(checkpoint, url)
    newer = publish(make_checkpoint(tmp_path / "newer", commit="f" * 40), url)
    assert json.loads(read(url, LATEST) or b"")["digest"] == newer.digest
    publish(checkpoint, url)  # the older one, already there: the pointer stays
    pointer = json.loads(read(url, LATEST) or b"")
    assert pointer["location"].startswith("f" * 40)
    # a run that was killed between the marker and the pointer leaves an old one
    old = {**pointer, "published": "2020-01-01T00:00:00.000000+00:00", "location": "gone/gone"}
    open_destination(url).update(LATEST, lambda _: json.dumps(old).encode())
    publish(make_checkpoint(tmp_path / "newer", commit="f" * 40), url)
    assert json.loads(read(url, LATEST) or b"") == pointer


def test_no_verdict_no_publishing(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(match: str) -> None:
        with pytest.raises(BadInput, match=match) as caught:
            publish(checkpoint, str(out))
        assert "ferry check" in str(caught.value) and "--unchecked" in str(caught.value)
        assert not out.exists()

    write_verdict(checkpoint, verdict="fail", max_kl=0.5)
    refused(r"did not pass its check \(verdict fail, max KL 0.5\)")
    write_verdict(checkpoint, digest="sha256:00")
    refused("is about another checkpoint")
    (checkpoint / "report" / "check.json").unlink()
    refused("has not been checked")
    (checkpoint / "report" / "check.json").write_text("{}")
    with pytest.raises(BadInput, match=r"check\.json is not a verdict of this version: verdict: field required"):
        publish(checkpoint, str(out))


def test_unchecked_says_so_and_leaves_a_foreign_report_behind(checkpoint: Path, url: str) -> None:
    write_verdict(checkpoint, digest="sha256:00")
    result = publish(checkpoint, url, unchecked=True)
    assert not result.checked
    assert json.loads(read(result.url, "manifest.json") or b"")["checked"] is False
    assert json.loads(read(result.url, "provenance.json") or b"")["verdict"] is None
    assert not any(name.startswith("report/") for name in names(result.url))
    assert verify(result.url).problems == []


def test_a_report_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    shutil.move(checkpoint / "report", tmp_path / "elsewhere")
    result = publish(checkpoint, str(tmp_path / "out"), report=tmp_path / "elsewhere")
    assert result.checked and (Path(result.url) / "report" / "report.html").exists()


def test_what_cannot_be_published(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="expected gs://bucket/prefix"):
        publish(checkpoint, "s3://bucket")
    occupied = tmp_path / "out" / PLACE
    occupied.mkdir(parents=True)
    (occupied / "mine").write_text("mine")
    with pytest.raises(BadInput, match="holds something that is not a published checkpoint"):
        publish(checkpoint, str(tmp_path / "out"))
    assert [path.name for path in occupied.iterdir()] == ["mine"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="cannot write to"):
        publish(checkpoint, str(tmp_path / "file"))
    (checkpoint / "ferry.json").unlink()
    with pytest.raises(BadInput, match=r"no ferry\.json"):
        publish(checkpoint, str(tmp_path / "out"))
    with pytest.raises(BadInput, match=r"no ferry\.json"):
        publish(tmp_path / "nothing", str(tmp_path / "out"))


def test_an_uncommitted_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "0" / "commit_success.txt").unlink()
    with pytest.raises(BadInput, match="is not committed"):
        publish(checkpoint, str(tmp_path / "out"), unchecked=True)


@pytest.mark.skipif(os.getuid() == 0, reason="root writes everywhere")
def test_a_destination_without_permission(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    with pytest.raises(BadInput, match=r"cannot write to .*Permission denied"):
        publish(checkpoint, str(tmp_path / "out"))


def test_a_read_only_file_system(checkpoint: Path) -> None:
    with pytest.raises(BadInput, match="cannot write to /sys"):
        publish(checkpoint, "/sys/models")


def test_a_disk_too_small(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    with pytest.raises(BadInput, match=r"the disk has 1\.0 kB free and 10\.2 MB are needed"):
        publish(checkpoint, str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["0/items/_METADATA", "0/items/d/large"])
def test_a_file_that_changes_meanwhile(checkpoint: Path, url: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = base.Item.open

    def changed(item: base.Item) -> Any:
        if item.entry.path == name:
            (checkpoint / name).write_bytes(bytes(item.entry.size))
        return original(item)

    monkeypatch.setattr(base.Item, "open", changed)
    with pytest.raises(OutsideFailure, match=f"{name} changed while it was published"):
        publish(checkpoint, url)
    assert read(f"{url}/{PLACE}", "ferry_commit.json") is None


def test_of_a_report_s_directory_only_the_report_is_published(checkpoint: Path, url: str) -> None:
    (checkpoint / "report" / "dequantized-abc").mkdir()
    (checkpoint / "report" / "dequantized-abc" / "model.safetensors").write_bytes(b"a whole model")
    (checkpoint / "report" / "notes.txt").write_text("mine")
    location = publish(checkpoint, url).url
    assert read(location, "report/check.json") is not None
    assert read(location, "report/notes.txt") is None
    assert read(location, "report/dequantized-abc/model.safetensors") is None


def test_a_check_that_comes_late_is_not_lost_in_silence(checkpoint: Path, url: str) -> None:
    publish(checkpoint, url, unchecked=True)
    assert publish(checkpoint, url, unchecked=True).bytes_copied == 0
    with pytest.raises(BadInput, match="was published without a check"):
        publish(checkpoint, url)


def test_what_a_check_passed_against_is_published(checkpoint: Path, url: str) -> None:
    path = checkpoint / "report" / "check.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "threshold": 0.5, "reference": "abc"}))
    provenance = json.loads(read(publish(checkpoint, url).url, "provenance.json") or b"")
    assert (provenance["verdict"]["threshold"], provenance["verdict"]["reference"]) == (0.5, "abc")


def _changed(checkpoint: Path) -> None:
    (checkpoint / "hf/config.json").write_bytes(b"[]")


def _added(checkpoint: Path) -> None:
    (checkpoint / "hf/modeling_evil.py").write_text("import os")


def _removed(checkpoint: Path) -> None:
    (checkpoint / "hf/tokenizer/x.json").unlink()


def _report(checkpoint: Path) -> None:
    (checkpoint / "report/report.html").write_text("<h1>PASS</h1>")


def _record(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "ferry.json").read_text())
    (checkpoint / "ferry.json").write_text(json.dumps(record | {"dropped": ["nothing"]}))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_changed, "hf/config.json"),
        (_added, "hf/modeling_evil.py"),
        (_removed, "hf/tokenizer/x.json"),
        (_report, "report/report.html"),
        (_record, "ferry.json"),
    ],
)
def test_what_changed_since_the_check_is_not_published(
    checkpoint: Path, tmp_path: Path, change: Any, named: str
) -> None:
    change(checkpoint)
    with pytest.raises(BadInput, match=f"changed since its check: {named}: run `ferry check"):
        publish(checkpoint, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    result = publish(checkpoint, str(tmp_path / "out"), unchecked=True)
    assert json.loads(read(result.url, "provenance.json") or b"")["verdict"] is None


def test_a_verdict_of_before_there_was_more_to_cover(checkpoint: Path, tmp_path: Path) -> None:
    write_verdict(checkpoint, covers={})
    with pytest.raises(BadInput, match=r"changed since its check: ferry\.json and 3 more"):
        publish(checkpoint, str(tmp_path / "out"))


def test_other_files_beside_what_is_published(checkpoint: Path, url: str) -> None:
    publish(checkpoint, url)
    _changed(checkpoint)
    write_verdict(checkpoint)
    with pytest.raises(BadInput, match=r"holds this checkpoint with another hf/config\.json"):
        publish(checkpoint, url)


@pytest.mark.parametrize("name", ["0/link", "hf/link", "hf", "report", "0"])
def test_nothing_is_published_through_a_link(checkpoint: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/token").write_text("hf_secret")
    if (checkpoint / name).exists():
        shutil.move(checkpoint / name, tmp_path / "secret" / name)
        (checkpoint / name).symlink_to(tmp_path / "secret" / name)
    else:
        (checkpoint / name).symlink_to(tmp_path / "secret/token")
    with pytest.raises(BadInput, match=f"{name} is a symbolic link that leads out of"):
        publish(checkpoint, str(tmp_path / "out"), unchecked=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"model_name": "../x"},
        {"model_name": "a/b"},
        {"model_name": ".hidden"},
        {"model_name": ""},
        {"model_name": "a\nb"},
        {"origin": {"path": "/x", "repo": "a/b", "commit": "../../x"}},
        {"origin": {"path": "/x", "repo": "a/b", "commit": "c"}},
        {"origin": {"path": "/x", "repo": "a/b", "commit": "C" * 40}},
        {"origin": {"path": "/x"}, "fingerprint": "../../../../x"},
    ],
)
def test_a_record_that_names_another_place(checkpoint: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    record = json.loads((checkpoint / "ferry.json").read_text())
    (checkpoint / "ferry.json").write_text(json.dumps(record | changes))
    with pytest.raises(BadInput):
        publish(checkpoint, str(tmp_path / "a/b/out"), unchecked=True)
    assert not (tmp_path / "a").exists()


def _work_dir(location: Path) -> Path:
    return location.with_name(f".{location.name}.ferry-partial")


def _lease(location: Path) -> Path:
    return location.with_name(f".{location.name}.ferry_lease.json")


@pytest.mark.parametrize("where", [_work_dir, _lease])
def test_nothing_is_removed_or_written_through_a_link(checkpoint: Path, tmp_path: Path, where: Any) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    link = where(tmp_path / "out" / PLACE)
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if where is _work_dir else victim / "thesis.txt")
    with pytest.raises(BadInput, match="symbolic link"):
        publish(checkpoint, str(tmp_path / "out"))
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


def test_latest_when_a_clock_was_ahead(
    checkpoint: Path, url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is published last is the latest, whatever an earlier clock said; a person is told that it was wrong."""
    publish(checkpoint, url)
    ahead = {"published": "2999-01-01T00:00:00.000000+00:00"}
    for path in (LATEST, f"{PLACE}/ferry_commit.json"):
        content = json.loads(read(url, path) or b"") | ahead
        open_destination(url).update(path, lambda _, content=content: json.dumps(content).encode())
    newer = make_checkpoint(tmp_path / "newer", commit="f" * 40)
    for one in (newer, checkpoint):
        publish(one, url, reporter=Reporter())
        said = capsys.readouterr().err
        assert f"{PLACE} was published at 2999" in said and f"{LATEST} names {'f' * 40}" in said
        assert json.loads(read(url, LATEST) or b"")["location"].startswith("f" * 40)
    pruned = prune(url, keep=1, reporter=Reporter())
    assert [version.path for version in pruned.versions] == [PLACE]
    assert "was published at 2999" in capsys.readouterr().err
