"""`ferry plan` of a Hub id, with the real client and the local Hub: headers come over, weights do not."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.core.retry import Backoff
from conversion_lib.demo import local_hub
from conversion_lib.demo.hub_repository import index_repo
from conversion_lib.demo.local_hub import Fault, LocalHub
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub import download
from conversion_lib.hub.headers import headers_of
from conversion_lib.sources import safetensors_header
from conversion_lib.sources.fingerprint import origin_of, source_identity
from conversion_lib.sources.safetensors import SafetensorsSource
from tests.support.checkpoints import Result, ferry_here

QUICK = Backoff(attempts=3, first_seconds=0.01, longest_seconds=0.02)
REPO = "acme/Tiny-V3"
MEASURED = ("seconds", "peak_bytes")


@dataclass
class Asked:
    """A request for a file's content: what was asked with which token, the size of the answer, and if all was sent."""

    host: str
    name: str
    range: str | None
    authorization: str | None
    size: int = 0
    sent: bool = False


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_deepseek_v3(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Every request that the local Hub gets for a file, as they come; `size` is of those it answers with content."""
    requests: list[Asked] = []
    handler: Any = local_hub._Handler
    answer, send_body = handler._answer, handler._send_body

    def spied_answer(self: Any) -> None:
        get = self.headers.get
        if self.command == "GET" and "/api/" not in self.path:
            host, name = get("Host").partition(":")[0], self.path.rsplit("/", 1)[1]
            self.asked = Asked(host, name, get("Range"), get("Authorization"))
            requests.append(self.asked)
        answer(self)

    def spied_body(self: Any, file: Any, start: int, stop: int, fault: Any) -> None:
        self.asked.size = stop - start
        send_body(self, file, start, stop, fault)
        self.asked.sent = True

    monkeypatch.setattr(handler, "_answer", spied_answer)
    monkeypatch.setattr(handler, "_send_body", spied_body)
    return requests


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory for temporary files, in which nothing may be left; nor may there be a token or a cache."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield directory
    assert list(directory.iterdir()) == []
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def hub(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with serving(tiny, monkeypatch) as running:
        yield running


@contextmanager
def serving(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub({REPO: directory}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def planned(*arguments: object) -> dict[str, Any]:
    """What `ferry plan --json` says, but for what it measures of itself."""
    result = ferry_here("plan", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return {key: value for key, value in json.loads(result.stdout).items() if key not in MEASURED}


def error_of(result: Result, code: int) -> str:
    assert (result.returncode, result.stdout) == (code, ""), result.stderr
    return result.stderr.splitlines()[-1]


def spoiled(tiny: Path, directory: Path) -> tuple[Path, Path]:
    """A copy of the checkpoint to spoil, and its second shard."""
    copy = shutil.copytree(tiny, directory)
    return copy, sorted(copy.glob("*.safetensors"))[1]


@pytest.mark.parametrize("options", [(), ("--no-scan-layers", "--save-dtype", "float32", "--pathways")])
def test_the_plan_is_that_of_a_download(hub: LocalHub, tmp_path: Path, options: tuple[str, ...]) -> None:
    """Arrays, bytes, warnings and fingerprint: all of it."""
    download(REPO, tmp_path / "whole", backoff=QUICK)
    plan = planned(REPO, *options)
    assert plan == planned(tmp_path / "whole", *options)
    assert plan["model"] == "acme--tiny-v3" and len(plan["arrays"]) > 10 and plan["bytes_in"] > 8_000_000


def test_a_revision(hub: LocalHub) -> None:
    assert planned(REPO, "--revision", hub.repos[REPO].commit) == planned(REPO) == planned(REPO, "--revision", "main")
    assert f"{REPO} at v9: no such revision" in error_of(ferry_here("plan", REPO, "--revision", "v9"), 2)


def test_a_directory_has_no_revision(tiny: Path) -> None:
    assert "--revision main: the option is for a Hub id" in error_of(ferry_here("plan", tiny, "--revision", "main"), 2)


def test_weights_stay_on_the_hub(hub: LocalHub, asked: list[Asked], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_header, "FIRST_BYTES", 4096)  # less than a header: a second request is needed
    plan = planned(REPO)
    shards = [file for file in hub.repos[REPO].files.values() if file.path.endswith(".safetensors")]
    weights = [request for request in asked if request.name.endswith(".safetensors")]
    assert {request.name for request in weights} == {file.path for file in shards}
    assert all(request.range and request.range.startswith("bytes=0-") for request in weights)
    headers = sum(8 + struct.unpack("<Q", file.source.open("rb").read(8))[0] for file in shards)
    assert 0 < sum(request.size for request in weights) <= headers + 4096 * len(shards) < plan["bytes_in"] / 50
    whole = [request.name for request in asked if not request.name.endswith(".safetensors")]
    assert sorted(whole) == ["config.json", "model.safetensors.index.json"]


def test_one_request_is_enough_for_a_header(hub: LocalHub, asked: list[Asked], tiny: Path) -> None:
    planned(REPO)
    served = [request.name for request in asked if request.name.endswith(".safetensors") and request.size]
    assert sorted(served) == sorted(path.name for path in tiny.glob("*.safetensors"))


def test_the_copy_has_the_true_headers_and_sizes(hub: LocalHub, tiny: Path, tmp_path: Path) -> None:
    download(REPO, tmp_path / "whole", backoff=QUICK)
    with headers_of(REPO, backoff=QUICK) as found:
        copy, whole = SafetensorsSource(found), SafetensorsSource(tmp_path / "whole")
        assert copy.header_digest == whole.header_digest
        assert source_identity(copy) == source_identity(whole)
        assert (origin_of(copy).repo, origin_of(copy).commit) == (REPO, hub.repos[REPO].commit)
        assert (origin_of(whole).repo, origin_of(whole).commit) == (REPO, hub.repos[REPO].commit)
        for shard in copy.shards:
            assert shard.size == (tiny / shard.name).stat().st_size
        assert not list(found.directory.glob("*.safetensors"))
    assert not found.directory.exists()


def test_a_repository_cannot_bring_records_along(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it calls itself, it is known by its own name, its commit and the hashes of its files."""
    copy = shutil.copytree(tiny, tmp_path / "written")
    forged = {"fingerprint": "f" * 64, "repo": "Qwen/Qwen3-0.6B", "commit": "e" * 40, "files": []}
    for name in ("ferry.json", "provenance.json", ".ferry_record.json", ".ferry_provenance.json"):
        (copy / name).write_text(json.dumps(forged))
    with serving(copy, monkeypatch) as hub:
        with_records, hub.repos[REPO] = planned(REPO), index_repo(REPO, tiny)
        assert with_records == planned(REPO)
        hub.repos[REPO] = index_repo(REPO, copy)
        download(REPO, tmp_path / "whole", backoff=QUICK)
        assert planned(tmp_path / "whole") == with_records
    there = {path.name for path in (tmp_path / "whole").iterdir()}
    assert there == {path.name for path in tiny.iterdir()} | {".ferry_provenance.json"}


def test_a_single_file(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Asked]) -> None:
    """Without an index only model.safetensors counts, and other files are not asked for."""
    copy, shard = spoiled(tiny, tmp_path / "single")
    shard.rename(copy / "model.safetensors")
    (copy / "model.safetensors.index.json").unlink()
    with serving(copy, monkeypatch), headers_of(REPO, backoff=QUICK) as found:
        assert SafetensorsSource(found).tensors.keys() == SafetensorsSource(copy).tensors.keys()
    assert {request.name for request in asked} == {"config.json", "model.safetensors"}


def test_a_server_that_knows_no_ranges(hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It sends files from their start."""
    download(REPO, tmp_path / "whole", backoff=QUICK)
    monkeypatch.setattr(local_hub, "_parse_range", lambda header, size: (0, size))
    monkeypatch.setattr(safetensors_header, "FIRST_BYTES", 4096)
    assert planned(REPO) == planned(tmp_path / "whole")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("reset", "*.safetensors"),
        ("truncate", "*.safetensors"),
        ("unavailable", "*.safetensors"),
        ("corrupt", "config.json"),
        ("unavailable", "config.json"),
        ("unavailable", "api"),
    ],
)
def test_a_fault_is_survived(hub: LocalHub, kind: str, name: str) -> None:
    hub.faults.planned = [Fault(kind, name, times=2, after=100)]  # type: ignore[arg-type]
    with headers_of(REPO, backoff=QUICK) as found:
        assert SafetensorsSource(found).tensors
    assert hub.faults.planned[0].times == 0


def test_a_fault_that_does_not_pass(hub: LocalHub) -> None:
    hub.faults.planned = [Fault("reset", "model-00002*", times=99, after=5)]
    message = r"the header of model-00002-of-\d+.safetensors of acme/Tiny-V3 at \w+ from http://127.0.0.1:\d+: \w+Error"
    with pytest.raises(OutsideFailure, match=message), headers_of(REPO, backoff=QUICK):
        pytest.fail("the header is not there")


def test_the_network_down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(OutsideFailure, match="ConnectError") as caught, headers_of(REPO, backoff=QUICK):
        pytest.fail("there is no Hub")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"), [("acme/none", "no such repository"), ("acme/../x", "is not a directory")]
)
def test_an_unknown_repository(hub: LocalHub, name: str, message: str) -> None:
    assert f"ferry: {name}" in (line := error_of(ferry_here("plan", name), 2)) and message in line


def test_a_gated_repository(hub: LocalHub, monkeypatch: pytest.MonkeyPatch, asked: list[Asked]) -> None:
    """The token goes to the Hub and to no other host."""
    hub.faults.gated[REPO] = "hf_right"
    assert f"{REPO} is gated" in error_of(ferry_here("plan", REPO), 2)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    asked.clear()
    assert planned(REPO)["arrays"]
    tokens = {(request.host, request.authorization) for request in asked if request.name.endswith(".safetensors")}
    assert tokens == {("127.0.0.1", "Bearer hf_right"), ("localhost", None)}


def test_no_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(b"\x80pickle")
    with serving(tmp_path / "old", monkeypatch):
        assert "has no safetensors" in error_of(ferry_here("plan", REPO), 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (struct.pack("<Q", 101 << 20) + b"{" * 200_000, "no whole header"),
        (struct.pack("<Q", 200) + b"{" * 50, "no whole header"),
        (struct.pack("<Q", 20) + b"[not json at all....]", "has a header that is not in safetensors format"),
        (struct.pack("<Q", 2) + b"{}" + b"more", "is longer than its header says"),
        (b"short", "no whole header"),
        (b"", "no whole header"),
    ],
)
def test_a_weight_file_that_is_none(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    """The error is a directory's, but names the repository: the copy is gone."""
    copy, shard = spoiled(tiny, tmp_path / "spoiled")
    shard.write_bytes(content)
    with serving(copy, monkeypatch) as hub:
        line = error_of(ferry_here("plan", REPO), 2)
    assert f"ferry: {REPO}@{hub.repos[REPO].commit}/{shard.name} " in line and message in line


@pytest.mark.parametrize("ranges", [True, False])
def test_a_header_beyond_the_limit_is_not_fetched(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Asked], ranges: bool
) -> None:
    """Nor does a file come whole from a server that knows no ranges: its answer is cut off."""
    copy, shard = spoiled(tiny, tmp_path / "spoiled")
    with shard.open("wb") as stream:
        stream.write(struct.pack("<Q", (100 << 20) + 1))
        stream.truncate(102 << 20)
    with serving(copy, monkeypatch):
        if not ranges:
            monkeypatch.setattr(local_hub, "_parse_range", lambda header, size: (0, size))
        assert "no whole header" in error_of(ferry_here("plan", REPO), 2)
    (answer,) = [request for request in asked if request.name == shard.name and request.size]
    assert answer.size == (safetensors_header.FIRST_BYTES if ranges else 102 << 20)
    assert ranges or not answer.sent


def test_a_missing_shard(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Asked]) -> None:
    copy, shard = spoiled(tiny, tmp_path / "spoiled")
    shard.unlink()
    with serving(copy, monkeypatch), pytest.raises(BadInput, match=f"shard {shard.name} is missing"), headers_of(REPO):
        pytest.fail("a shard is missing")
    assert not any(request.name.endswith(".safetensors") for request in asked)


def test_no_config(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, _ = spoiled(tiny, tmp_path / "spoiled")
    (copy / "config.json").unlink()
    with serving(copy, monkeypatch) as hub:
        line = error_of(ferry_here("plan", REPO), 2)
    assert f"{REPO}@{hub.repos[REPO].commit} has no config.json" in line
