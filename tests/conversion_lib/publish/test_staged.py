"""The digest of a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.publish.staged import checkpoint_digest
from tests.conversion_lib.storage.test_checksums import make_checkpoint


def test_digest_takes_any_of_the_three_paths_and_the_checkpoint_alone(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path)
    digest = checkpoint_digest(root)
    assert digest.startswith("sha256:") and len(digest) == 7 + 64
    assert checkpoint_digest(root / "0") == checkpoint_digest(root / "0" / "items") == digest
    (root / "ferry.json").write_text("changed")
    (root / "report").mkdir()
    assert checkpoint_digest(root) == digest


@pytest.mark.parametrize("change", ["content", "name", "extra", "gone"])
def test_digest_sees_every_change(tmp_path: Path, change: str) -> None:
    root = make_checkpoint(tmp_path)
    digest = checkpoint_digest(root)
    big = root / "0" / "items" / "d" / "big"
    if change == "content":
        content = bytearray(big.read_bytes())
        content[-1] ^= 1
        big.write_bytes(content)
    elif change == "name":
        big.rename(big.with_name("bag"))
    elif change == "extra":
        big.with_name("x").write_bytes(b"")
    else:
        big.unlink()
    assert checkpoint_digest(root) != digest


def test_missing_and_uncommitted_are_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="does not exist"):
        checkpoint_digest(tmp_path / "none")
    make_checkpoint(tmp_path / "half", committed=False)
    with pytest.raises(BadInput, match=r"not committed.*commit_success\.txt"):
        checkpoint_digest(tmp_path / "half" / "0" / "items")
