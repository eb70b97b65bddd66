"""Checkpoints small enough to publish many of, with a record and a passed check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from conversion_lib.progress import SILENT
from conversion_lib.publish.destinations import open_destination
from conversion_lib.publish.staged import checkpoint_digest, open_staged, sha256_of
from conversion_lib.record import CheckpointRecord, Origin, Target

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TARGET = "scanned-bf16-ocdbt-zarr3-maxtext0.2.5"
PLACE = f"tiny/{COMMIT}/{TARGET}"
LATEST = f"tiny/latest-{TARGET}.json"
STEP = {
    "0/_CHECKPOINT_METADATA": b"{}",
    "0/commit_success.txt": b"done",
    "0/items/_METADATA": b"{}",
    "0/items/d/large": bytes(range(256)) * 40_000,  # more than the client sends in one request
    "0/items/d/empty": b"",
    "0/items/manifest.ocdbt": b"manifest",
}
OTHERS = {"hf/config.json": b"{}", "hf/tokenizer/x.json": b"[]", "report/report.html": b"<html>"}


def make_checkpoint(
    root: Path,
    *,
    salt: bytes = b"",
    commit: str | None = COMMIT,
    passed: bool = True,
    target: Target | None = None,
    large: bytes = STEP["0/items/d/large"],
) -> Path:
    for name, content in {**STEP, **OTHERS, "0/items/d/salt": salt, "0/items/d/large": large}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    record = CheckpointRecord(
        ferry_version="0.1.0",
        fingerprint="sha256:" + "ab" * 32,
        identity={},
        family="llama3",
        model_name="tiny",
        origin=Origin(path="/somewhere", repo="acme/tiny", commit=commit),
        target=target or Target(),
        arrays=3,
        bytes_in=1,
        bytes_out=1,
        exact=True,
    )
    (root / "ferry.json").write_text(record.model_dump_json())
    if passed:
        write_verdict(root)
    return root


def write_verdict(root: Path, **changes: Any) -> None:
    covers = open_staged(root).companions()
    if (page := root / "report/report.html").exists():
        covers["report/report.html"] = sha256_of(page.read_bytes())
    verdict = {"verdict": "pass", "digest": checkpoint_digest(root), "covers": covers, "max_kl": 1e-4, "layers": []}
    verdict |= changes
    (root / "report" / "check.json").write_text(json.dumps(verdict))


def read(url: str, path: str) -> bytes | None:
    return open_destination(url).read(path)


def names(url: str) -> list[str]:
    return [entry.path for entry in open_destination(url).entries(SILENT)]
