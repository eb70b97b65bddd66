"""Downloads with the real client from the local Hub, faults and all."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from conversion_lib.core.retry import Backoff
from conversion_lib.demo import hub_repository, local_hub
from conversion_lib.demo.local_hub import Fault, LocalHub
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub import DownloadResult, cached_download, download, resolve
from conversion_lib.progress import Reporter
from conversion_lib.sources.noted import download_record
from conversion_lib.storage import disk

QUICK = Backoff(attempts=3, first_seconds=0.01, longest_seconds=0.02)
SHARDS = [f"model-{n:05d}-of-00003.safetensors" for n in (1, 2, 3)]
SMALL = ["LICENSE", "README.md", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt"]
SMALL += ["model.safetensors.index.json", "tokenizer.json", "tokenizer.model"]
INDEX = "model.safetensors.index.json"
OTHERS = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", "original/params.json"]
OTHERS += ["original/model.safetensors", "modeling_custom.py", "figures/plot.png", "model.pt", "tf_model.h5"]


def content(name: str) -> bytes:
    if name == INDEX:
        return json.dumps({"weight_map": {f"tensor.{number}": shard for number, shard in enumerate(SHARDS)}}).encode()
    size = 600_000 if name.endswith((".safetensors", ".bin")) else 700
    return (hashlib.sha256(name.encode()).digest() * (size // 32 + 1))[:size]


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    for name in [*SHARDS, *SMALL, *OTHERS]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content(name))
    return root


@pytest.fixture
def hub(repo: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    with LocalHub({"acme/tiny": repo}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def fetch(out: Path, repo: str = "acme/tiny", revision: str = "main", backoff: Backoff = QUICK) -> DownloadResult:
    return download(repo, out, revision=revision, backoff=backoff)


def bodies(hub: LocalHub) -> list[str]:
    """Names of the files whose content was asked for, in order."""
    return [path.rsplit("/", 1)[1] for method, path in hub.requests if method == "GET" and "/api/" not in path]


def assert_whole(out: Path) -> None:
    names = sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())
    assert names == sorted([*SHARDS, *SMALL, ".ferry_provenance.json"])
    assert all((out / name).read_bytes() == content(name) for name in [*SHARDS, *SMALL])
    assert not (out / ".ferry").exists() and not (out / ".cache").exists()


def test_only_what_a_job_needs_and_where_it_came_from(hub: LocalHub, out: Path) -> None:
    result = fetch(out)
    assert_whole(out)
    commit = hub.repos["acme/tiny"].commit
    assert (result.commit, result.revision, result.path) == (commit, "main", out)
    assert result.files == len(SHARDS) + len(SMALL)
    assert result.bytes == result.bytes_downloaded == sum(len(content(n)) for n in [*SHARDS, *SMALL])
    provenance = download_record(out)
    assert provenance is not None
    assert (provenance.repo, provenance.commit, provenance.endpoint) == ("acme/tiny", commit, hub.endpoint)
    hashes = {file.path: file.sha256 for file in provenance.files}
    assert hashes[SHARDS[0]] == hashlib.sha256(content(SHARDS[0])).hexdigest()
    assert hashes["config.json"] is None
    assert provenance.started <= provenance.finished


def test_a_second_download_fetches_nothing(hub: LocalHub, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    commit = fetch(out).commit
    hub.requests.clear()
    result = download("acme/tiny", out, reporter=Reporter())
    assert result.bytes_downloaded == 0 and result.files == len(SHARDS) + len(SMALL)
    assert "is already in" in capsys.readouterr().err
    assert bodies(hub) == []
    hub.requests.clear()
    assert fetch(out, revision=commit).bytes_downloaded == 0
    assert hub.requests == []  # a commit never changes: the Hub need not be there


def test_a_lost_file_is_fetched_again_alone(hub: LocalHub, out: Path) -> None:
    fetch(out)
    (out / SHARDS[1]).unlink()
    hub.requests.clear()
    assert fetch(out).bytes_downloaded == len(content(SHARDS[1]))
    assert bodies(hub) == [SHARDS[1]]
    assert_whole(out)


def test_a_changed_file_is_not_overwritten(hub: LocalHub, out: Path) -> None:
    """A dequantized checkpoint carries the provenance of its source, for one."""
    fetch(out)
    (out / SHARDS[1]).write_bytes(b"mine")
    with pytest.raises(BadInput, match=f"has files that are not from acme/tiny at .*{SHARDS[1]}"):
        fetch(out)
    assert (out / SHARDS[1]).read_bytes() == b"mine"
    assert download_record(out) is not None


def test_the_cache_has_a_directory_for_each_commit(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    commit = hub.repos["acme/tiny"].commit
    path = cached_download("acme/tiny")
    assert path == tmp_path / "cache" / "acme--tiny" / commit
    assert_whole(path)
    hub.requests.clear()
    assert cached_download("acme/tiny") == path
    assert bodies(hub) == []
    hub.requests.clear()
    assert cached_download("acme/tiny", revision=commit) == path
    assert hub.requests == []  # as on a closed network


@pytest.mark.parametrize("kind", ["reset", "truncate", "corrupt", "slow", "unavailable", "busy"])
def test_a_fault_is_survived(hub: LocalHub, out: Path, kind: str) -> None:
    hub.faults.planned = [Fault(kind, SHARDS[1], after=300_000)]  # type: ignore[arg-type]
    fetch(out)
    assert_whole(out)
    assert bodies(hub).count(SHARDS[0]) == 1


def test_a_small_file_is_checked_too(hub: LocalHub, out: Path) -> None:
    hub.faults.planned = [Fault("corrupt", "config.json", after=3)]
    fetch(out)
    assert_whole(out)
    assert bodies(hub).count("config.json") == 2


def test_wrong_bytes_again_and_again(hub: LocalHub, out: Path) -> None:
    hub.faults.planned = [Fault("corrupt", SHARDS[2], times=99, after=5)]
    with pytest.raises(OutsideFailure) as caught:
        fetch(out)
    expected = hashlib.sha256(content(SHARDS[2])).hexdigest()
    assert SHARDS[2] in str(caught.value) and f"sha256 expected {expected}, got " in str(caught.value)
    assert bodies(hub).count(SHARDS[2]) == QUICK.attempts
    assert not (out / SHARDS[2]).exists() and not (out / ".ferry_provenance.json").exists()
    hub.faults.planned = []
    fetch(out)
    assert_whole(out)


def test_the_api_failing_for_a_while(hub: LocalHub, out: Path) -> None:
    hub.faults.planned = [Fault("unavailable", "api", times=2)]
    fetch(out)
    assert_whole(out)


def test_a_busy_hub_is_left_alone_for_as_long_as_it_asks(hub: LocalHub, out: Path) -> None:
    hub.faults.planned = [Fault("busy", "api")]
    started = time.monotonic()
    fetch(out)
    assert time.monotonic() - started >= 1.0
    assert_whole(out)


def test_a_hub_that_sends_nothing_more(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    hub.faults.planned = [Fault("stall", SHARDS[1], after=300_000)]
    fetch(out)
    assert_whole(out)


def test_a_repository_that_was_renamed(hub: LocalHub, out: Path) -> None:
    hub.faults.renamed["acme/old"] = "acme/tiny"
    assert fetch(out, "acme/old").commit == hub.repos["acme/tiny"].commit
    assert_whole(out)


def test_a_token_file(hub: LocalHub, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.gated["acme/tiny"] = "hf_right"
    (tmp_path / "token").write_text("hf_right\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    fetch(out)
    assert_whole(out)


def test_killed_and_run_again_keeps_what_was_checked(hub: LocalHub, out: Path) -> None:
    stalled = SHARDS[2]
    hub.faults.planned = [Fault("stall", stalled, after=100_000)]
    code = f"import pathlib; from conversion_lib.hub import download; download('acme/tiny', pathlib.Path({str(out)!r}))"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ.copy())
    deadline = time.monotonic() + 60
    while not all((out / name).exists() for name in [*SHARDS[:2], *SMALL]):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / ".ferry_provenance.json").exists() and not (out / stalled).exists()
    hub.requests.clear()
    assert fetch(out).bytes_downloaded == len(content(stalled))
    assert bodies(hub) == [stalled]
    assert_whole(out)


def test_two_at_once_fetch_each_file_once(hub: LocalHub, out: Path) -> None:
    results: list[DownloadResult] = []
    threads = [threading.Thread(target=lambda: results.append(fetch(out))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.bytes_downloaded > 0 for result in results) == [False, False, True]
    # the index tells which weights are needed: each may have to read it to know
    assert all(bodies(hub).count(name) == 1 for name in [*SHARDS, *SMALL] if name != INDEX)
    assert_whole(out)


def test_files_of_another_tool_are_kept_where_they_are_right(hub: LocalHub, out: Path) -> None:
    out.mkdir()
    (out / SHARDS[0]).write_bytes(content(SHARDS[0]))
    (out / "notes.txt").write_text("mine")
    result = fetch(out)
    assert result.bytes_downloaded == result.bytes - len(content(SHARDS[0]))
    assert SHARDS[0] not in bodies(hub)
    (out / "notes.txt").unlink()
    assert_whole(out)


@pytest.mark.parametrize("name", ["other.safetensors", "config.json"])
def test_files_of_something_else_are_left_alone(hub: LocalHub, out: Path, name: str) -> None:
    out.mkdir()
    (out / name).write_text("mine")
    with pytest.raises(BadInput, match=f"{out} has files that are not from acme/tiny at .*{name}"):
        fetch(out)
    assert [p.name for p in out.iterdir()] == [name]
    assert (out / name).read_text() == "mine"


def test_another_commit_in_the_destination(
    hub: LocalHub, repo: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fetch(out).commit
    (repo / "config.json").write_text("{}")
    with LocalHub({"acme/tiny": repo}) as changed:
        monkeypatch.setenv("HF_ENDPOINT", changed.endpoint)
        second = changed.repos["acme/tiny"].commit
        with pytest.raises(BadInput, match=f"has acme/tiny at {first}, not acme/tiny at {second}"):
            fetch(out)
        unfinished = out.with_name("unfinished")
        (unfinished / ".ferry").mkdir(parents=True)
        (unfinished / ".ferry" / "download.json").write_text(json.dumps({"repo": "acme/tiny", "commit": first}))
        with pytest.raises(BadInput, match=f"has acme/tiny at {first}"):
            fetch(unfinished)


def test_a_gated_repository(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.gated["acme/tiny"] = "hf_right"
    with pytest.raises(BadInput, match=r"gated.*HF_TOKEN"):
        fetch(out)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(BadInput, match=r"gated.*HF_TOKEN") as caught:
        fetch(out)
    assert "hf_wrong" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    fetch(out)
    assert_whole(out)
    assert "hf_right" not in (out / ".ferry_provenance.json").read_text()


def test_a_token_that_cannot_be_sent_is_not_shown(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(BadInput, match="stray character in HF_TOKEN") as caught:
        fetch(out)
    assert "cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("repo_name", "revision", "message"),
    [
        ("acme/none", "main", "acme/none: no such repository"),
        ("acme/tiny", "v9", "acme/tiny at v9: no such revision"),
        ("a/b/c", "main", "not the name of a repository"),
    ],
)
def test_unknown_names(hub: LocalHub, out: Path, repo_name: str, revision: str, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        fetch(out, repo_name, revision)
    assert not out.exists()


def test_no_safetensors(tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "config.json").write_text("{}")
    (old / "pytorch_model.bin").write_bytes(b"\x80pickle")
    with LocalHub({"old": old}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        with pytest.raises(BadInput, match=r"no safetensors .* it has pytorch_model\.bin"):
            fetch(out, "old")


def test_the_network_down(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(OutsideFailure, match=r"acme/tiny at main from http://127\.0\.0\.1:9: ConnectError") as caught:
        fetch(out)
    assert "secret" not in str(caught.value)


def test_not_a_hub(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "hub.example.com")
    with pytest.raises(BadInput, match=r"HF_ENDPOINT is 'hub\.example\.com': expected http://"):
        fetch(out)
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.endpoint}/nowhere")
    with pytest.raises(BadInput, match="no such repository at"):
        fetch(out)
    html = out.with_name("html")
    (html / "api" / "models" / "acme" / "tiny" / "revision").mkdir(parents=True)
    (html / "api" / "models" / "acme" / "tiny" / "revision" / "main").write_text("<html>Welcome</html>")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    with pytest.raises(BadInput, match="does not answer as a Hub does"):
        fetch(out)
    server.shutdown()
    server.server_close()


def test_offline(out: Path) -> None:
    code = f"import pathlib; from conversion_lib.hub import download; download('acme/tiny', pathlib.Path({str(out)!r}))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert process.stderr.splitlines()[-1].startswith("conversion_lib.errors.BadInput: acme/tiny at main cannot be")
    assert "HF_HUB_OFFLINE is set" in process.stderr


def test_a_disk_too_small(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "free_bytes", lambda path: 1000)
    needed = r"the disk has 1\.0 kB free and 1\.8 MB are needed; free some space, or choose another destination$"
    with pytest.raises(BadInput, match=needed):
        fetch(out)
    assert bodies(hub) == [INDEX]


def test_a_destination_that_is_a_file(hub: LocalHub, out: Path) -> None:
    out.write_text("mine")
    with pytest.raises(BadInput, match="cannot write to"):
        fetch(out)
    assert out.read_text() == "mine"


def test_resolve_names_every_file(hub: LocalHub) -> None:
    resolved = resolve("acme/tiny")
    assert [file.path for file in resolved.files] == sorted([*SHARDS, *SMALL, *OTHERS])
    assert resolve("acme/tiny", resolved.commit) == resolved
    config = next(file for file in resolved.files if file.path == "config.json")
    git = subprocess.run(["git", "hash-object", "--stdin"], input=content("config.json"), capture_output=True)
    assert config.blob_id == git.stdout.decode().strip()


@pytest.mark.parametrize(
    "commit", ["../../home/.ssh/x", "main", "", "a" * 39, "A" * 40, "a" * 41, "a" * 40 + "\n", "/etc", None]
)
def test_a_commit_that_is_none(hub: LocalHub, out: Path, tmp_path: Path, commit: str | None, monkeypatch: Any) -> None:
    monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(local_hub, "model_info", lambda repo: {**hub_repository.model_info(repo), "sha": commit})
    for run in (lambda: fetch(out), lambda: cached_download("acme/tiny")):
        with pytest.raises(BadInput, match="does not answer as a Hub does for acme/tiny at main: commit: "):
            run()
    assert not out.exists() and not (tmp_path / "cache").exists()


def test_names_that_are_no_paths_are_not_fetched(
    repo: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nor are hidden files, and those that a person would take for Ferry's own."""
    bad = ["a\nb.json", "a\x1b[2Jb.json", "a\\x.json", "C:x.json", "x" * 300 + ".json"]
    own = ["ferry.json", "provenance.json"]
    hidden = [".ferry.json", "..json", ".ferry_provenance.json", ".ferry_record.json"]
    for name in own:
        (repo / name).write_bytes(b"{}")
    with LocalHub({"acme/tiny": repo}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        listed = running.repos["acme/tiny"].files
        for name in [*bad, *hidden]:
            listed[name] = replace(listed["config.json"], path=name)
        download("acme/tiny", out, reporter=Reporter(), backoff=QUICK)
    assert_whole(out)
    said = capsys.readouterr().err
    assert "acme/tiny: not fetched: " in said and "'a\\nb.json', 'a\\x1b[2Jb.json'" in said and "\x1b" not in said


def test_names_that_meet_are_refused(repo: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (repo / "CONFIG.json").write_bytes(b"{}")
    with LocalHub({"acme/tiny": repo}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        with pytest.raises(BadInput, match=r"acme/tiny has 'CONFIG\.json' and 'config\.json', which many file systems"):
            fetch(out)
    assert not out.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"repo": 5}', b"\xff", b'{"repo": "a/b", "commit": "../.."}'])
@pytest.mark.parametrize("name", [".ferry/download.json", ".ferry_provenance.json"])
def test_a_damaged_note(hub: LocalHub, out: Path, name: str, content: bytes) -> None:
    (out / name).parent.mkdir(parents=True)
    (out / name).write_bytes(content)
    with pytest.raises(BadInput, match=f"{name} is not a .* of this version"):
        fetch(out)


@pytest.mark.parametrize("at", [".ferry", ".ferry/hub", ".ferry/lock"])
def test_a_link_in_a_work_directory(hub: LocalHub, out: Path, tmp_path: Path, at: str) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.txt").write_text("mine")
    (out / at).parent.mkdir(parents=True)
    (out / at).symlink_to(victim)
    with pytest.raises(BadInput, match=f"{at} is a symbolic link among ferry's own files"):
        fetch(out)
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


def test_a_file_that_is_a_link_is_replaced(hub: LocalHub, out: Path, tmp_path: Path) -> None:
    out.mkdir()
    (tmp_path / "elsewhere").write_bytes(content("config.json"))
    (out / "config.json").symlink_to(tmp_path / "elsewhere")
    fetch(out)
    assert_whole(out)
    assert not (out / "config.json").is_symlink() and (tmp_path / "elsewhere").exists()


def test_without_a_home_directory(hub: LocalHub, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenShift runs pods: a number for a user, without an entry in passwd."""

    def nobody(uid: int) -> None:
        raise KeyError(f"uid not found: {uid}")

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "~/.cache/huggingface/hub")
    for variable in ("HOME", "FERRY_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    fetch(out)
    assert_whole(out)
    with pytest.raises(BadInput, match=r"no home directory is known .* set FERRY_CACHE to a directory"):
        cached_download("acme/tiny")
    with pytest.raises(BadInput, match="~/x: no home directory is known"):
        fetch(Path("~/x"))
