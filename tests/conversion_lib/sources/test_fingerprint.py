"""What makes a source another one: other headers, other content; not another path or time where content is known."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from conversion_lib.errors import BadInput
from conversion_lib.record import HfRecord, Origin, Provenance, RemoteFile
from conversion_lib.sources.fingerprint import origin_of, source_identity
from conversion_lib.sources.safetensors import SafetensorsSource

COMMIT, NAME = "c" * 40, "model.safetensors"
LONG_AGO = 1_000_000_000 * 10**9 + 123_456_789


@pytest.fixture
def source(tmp_path: Path) -> Path:
    directory = tmp_path / "a"
    directory.mkdir()
    safetensors.numpy.save_file({"x": np.ones(4, np.float32)}, directory / NAME)
    os.utime(directory / NAME, ns=(LONG_AGO, LONG_AGO))
    return directory


def identity(directory: Path) -> str:
    return source_identity(SafetensorsSource(directory))


def origin(directory: Path) -> Origin:
    return origin_of(SafetensorsSource(directory))


def copy(source: Path, modified: int | None = None) -> Path:
    target = source.with_name("b")
    shutil.copytree(source, target)
    if modified is not None:
        os.utime(target / NAME, ns=(modified, modified))
    return target


def downloaded(directory: Path, sha256: str = "abc", **changes: Any) -> Path:
    stat = (directory / NAME).stat()
    record = Provenance(
        repo="o/r",
        revision="main",
        commit=COMMIT,
        endpoint="https://hub",
        files=[RemoteFile(path=NAME, size=stat.st_size, sha256=sha256, blob_id="d")],
        modified={NAME: stat.st_mtime_ns},
        started="",
        finished="",
        huggingface_hub="",
        ferry="",
    )
    (directory / ".ferry_provenance.json").write_text(record.model_copy(update=changes).model_dump_json())
    return directory


def written(directory: Path, **changes: Any) -> Path:
    record = HfRecord(
        ferry_version="",
        fingerprint="f" * 64,
        identity={},
        origin=Origin(path="/original", repo="o/r", commit=COMMIT),
        modified={NAME: (directory / NAME).stat().st_mtime_ns},
    )
    (directory / ".ferry_record.json").write_text(record.model_copy(update=changes).model_dump_json())
    return directory


def test_the_same_files_are_the_same_source(source: Path) -> None:
    assert identity(source) == identity(copy(source))


def test_without_a_record_a_changed_time_makes_another_source(source: Path) -> None:
    assert identity(source) != identity(copy(source, modified=1))
    assert origin(source) == Origin(path=str(source))


@pytest.mark.parametrize("record", [downloaded, written])
def test_with_a_record_it_is_known_wherever_it_lies(source: Path, record: Any) -> None:
    before = identity(source)
    record(source)
    there = copy(source)
    assert before != identity(source) == identity(there)
    assert (origin(there).repo, origin(there).commit) == ("o/r", COMMIT)
    assert origin(source).path == ("/original" if record is written else str(source))


@pytest.mark.parametrize("record", [downloaded, written])
def test_a_copy_with_whole_seconds(source: Path, record: Any) -> None:
    """As some archives and file systems keep them."""
    there = copy(record(source), modified=LONG_AGO // 10**9 * 10**9)
    assert identity(there) == identity(source) and origin(there).repo == "o/r"


@pytest.mark.parametrize("record", [downloaded, written])
@pytest.mark.parametrize("modified", [LONG_AGO + 1, LONG_AGO - 1, LONG_AGO // 10**9 * 10**9 + 10**9, 0])
def test_a_record_counts_for_the_files_that_it_is_about(source: Path, record: Any, modified: int) -> None:
    """Not for one that was changed since, and not for what git wrote, which brought the record along."""
    plain = identity(copy(source, modified=modified))
    shutil.rmtree(source.with_name("b"))
    there = copy(record(source), modified=modified)
    assert identity(there) == plain and origin(there) == Origin(path=str(there))
    (doubt,) = SafetensorsSource(there).files.doubts(SafetensorsSource(there).shards)
    assert "changed or copied since" in doubt and "\n" not in doubt
    assert SafetensorsSource(source).files.doubts(SafetensorsSource(source).shards) == []


def test_a_record_that_leaves_a_file_out(source: Path) -> None:
    plain = identity(source)
    assert identity(downloaded(source, modified={})) == plain and origin(source).repo is None


def test_other_hashes_make_another_source(source: Path) -> None:
    assert len({identity(downloaded(source, digest)) for digest in ("abc", "abd")}) == 2


@pytest.mark.parametrize("name", ["ferry.json", "provenance.json", "ferry_commit.json", ".ferry_mirror_of"])
def test_what_a_repository_brings_along_is_no_record(source: Path, name: str) -> None:
    plain = identity(source)
    forged = {"repo": "o/r", "commit": "../../x", "fingerprint": "f", "files": [], "origin": {"path": "/x"}}
    for content in (json.dumps(forged), "{", "\xff", "[" * 100_000):
        (source / name).write_text(content)
        assert identity(source) == plain and origin(source) == Origin(path=str(source))


DAMAGED = [
    b"",
    b"{",
    b"[]",
    b'"x"',
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"repo":"o/r"}',
]


def spoiled(record: bytes) -> list[bytes]:
    """A record with each of its fields missing, null, and of another type."""
    found = json.loads(record)
    values: tuple[Any, ...] = (None, 5, [1], {"a": [1]}, "../../x", -1, True, 1e400)
    kept = [{**found, key: value} for key in found for value in values]
    missing = [{name: value for name, value in found.items() if name != key} for key in found]
    return [json.dumps(one).encode() for one in [*kept, *missing]]


@pytest.mark.parametrize("record", [downloaded, written])
def test_a_damaged_record(source: Path, record: Any) -> None:
    (path,) = set(record(source).iterdir()) - {source / NAME}
    whole, refused = path.read_bytes(), 0
    for content in [*DAMAGED, *spoiled(whole)]:
        path.write_bytes(content)
        try:
            origin(source)
        except BadInput as error:
            refused += 1
            assert str(error).startswith(f"{path} is not a ") and len(str(error).splitlines()) == 1
    assert refused > 40


def test_other_names_make_another_source(source: Path) -> None:
    before = identity(source)
    safetensors.numpy.save_file({"y": np.ones(4, np.float32)}, source / NAME)
    assert identity(source) != before
