"""Files by size and CRC32C: what is read once, what is read again, and what cannot be read."""

from __future__ import annotations

import base64
import errno
import os
import time
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import pytest

from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.storage import checksums
from conversion_lib.storage.checksums import BLOCK, FileEntry, entries_below


def make_checkpoint(root: Path, *, committed: bool = True) -> Path:
    items = root / "0" / "items" / "d"
    items.mkdir(parents=True)
    (items / "big").write_bytes(bytes(range(251)) * 20_000)
    (items / "empty").write_bytes(b"")
    (root / "0" / "items" / "_METADATA").write_text("{}")
    if committed:
        (root / "0" / "commit_success.txt").write_text("done")
    (root / "ferry.json").write_text("outside the digest")
    return root


def step_entries(root: Path) -> list[FileEntry]:
    return entries_below(root / "0", sums=root / "report" / "sums.json")


def test_entries_are_sorted_and_right(tmp_path: Path) -> None:
    entries = entries_below(make_checkpoint(tmp_path))
    assert [e.path for e in entries] == [
        "0/commit_success.txt",
        "0/items/_METADATA",
        "0/items/d/big",
        "0/items/d/empty",
        "ferry.json",
    ]
    big = entries[2]
    assert big.size == 251 * 20_000 > BLOCK
    expected = google_crc32c.value(bytes(range(251)) * 20_000).to_bytes(4, "big")
    assert big.crc32c == base64.b64encode(expected).decode()
    assert (entries[3].size, entries[3].crc32c) == (0, "AAAAAA==")


def test_crc32c_is_that_of_cloud_storage(tmp_path: Path) -> None:
    (tmp_path / "check").write_bytes(b"123456789")  # the check value of CRC-32C (Castagnoli): e3069283
    assert entries_below(tmp_path)[0].crc32c == base64.b64encode(bytes.fromhex("e3069283")).decode()


def test_links(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "a")
    (root / "0" / "items" / "link").symlink_to(root / "0" / "items" / "_METADATA")
    assert any(e.path == "0/items/link" and e.size == 2 for e in entries_below(root))
    (root / "0" / "items" / "deeper").symlink_to(root / "0" / "items" / "d")
    with pytest.raises(BadInput, match="deeper is a link to a directory"):
        entries_below(root)


def test_a_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "y").write_bytes(b"1")

    def broken(path: Path, mode: str) -> None:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(OutsideFailure, match=r"cannot read .*y: Input/output error"):
        entries_below(tmp_path)


def test_a_link_that_leads_out(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "y").symlink_to("/etc/passwd")
    with pytest.raises(BadInput, match=r"dir/y is a symbolic link that leads out of"):
        entries_below(tmp_path)


def test_memory_is_bounded(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as stream:
        stream.truncate(300 << 20)
    tracemalloc.start()
    entries_below(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * BLOCK


def test_what_has_not_changed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_checkpoint(tmp_path)
    later = SimpleNamespace(time_ns=lambda: time.time_ns() + 10 * checksums.YOUNG_NS)
    monkeypatch.setattr(checksums, "time", later)
    entries = step_entries(root)
    big = root / "0" / "items" / "d" / "big"
    content, times = big.read_bytes(), big.stat()

    reads: list[Path] = []
    original = Path.open

    def watched(path: Path, *arguments: Any, **options: Any) -> Any:
        reads.append(path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", watched)
    assert step_entries(root) == entries
    assert not [path for path in reads if "0" in path.relative_to(root).parts]
    with original(big, "r+b") as stream:
        stream.write(bytes([content[0] ^ 1]))
    os.utime(big, ns=(times.st_atime_ns, times.st_mtime_ns))  # whoever sets the time back is seen too
    assert step_entries(root) != entries
    assert {path for path in reads if "0" in path.relative_to(root).parts} == {big}


def test_young_files_and_broken_notes_are_read(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path)
    entries = step_entries(root)
    assert not (root / "report").exists()
    (root / "report").mkdir()
    (root / "report" / "sums.json").write_text("{broken")
    assert step_entries(root) == entries
