"""What the tests of runs in a bucket share: where they write, and how."""

from __future__ import annotations

from pathlib import Path

from conversion_lib.conversions.compare import compare
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from tests.support.fakes.cloud_storage import FakeCloudStorage

URL = "gs://bucket/models/qwen"
ROOT = "models/qwen/"
STORAGES = [Target(ocdbt=ocdbt, zarr3=zarr3) for ocdbt in (True, False) for zarr3 in (True, False)]
WHOLE = Options(memory_budget=64 << 20, threads=2)


def names(fake: FakeCloudStorage) -> list[str]:
    return [name.removeprefix(ROOT) for name in fake.names("bucket", ROOT)]


def upload(fake: FakeCloudStorage, directory: Path, prefix: str) -> str:
    """Puts every file below `directory` in the bucket; the URL of the prefix."""
    for path in directory.rglob("*"):
        if path.is_file():
            fake.put("bucket", f"{prefix}/{path.relative_to(directory).as_posix()}", path.read_bytes())
    return f"gs://bucket/{prefix}"


def assert_the_same(fake: FakeCloudStorage, beside: Path, copy: Path) -> None:
    """Every leaf bit for bit, the files beside them, and nothing of the work."""
    for name in names(fake):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(fake.read("bucket", ROOT + name))
    comparison = compare(beside, copy)
    assert comparison.same and comparison.leaves > 5
    assert not [name for name in names(fake) if name.startswith(".ferry")]
    assert (copy / "hf/tokenizer.json").read_bytes() == (beside / "hf/tokenizer.json").read_bytes()
    assert (copy / "ferry.json").exists()
