"""The local Hub against the real huggingface_hub client."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from conversion_lib.demo.local_hub import SLOW_BLOCK, Fault, Faults, LocalHub

WEIGHTS = bytes(range(256)) * 4096


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    root = tmp_path / "repo"
    (root / "sub").mkdir(parents=True)
    (root / "config.json").write_text('{"model_type": "llama"}')
    (root / "model.safetensors").write_bytes(WEIGHTS)
    (root / "sub" / "empty.txt").write_bytes(b"")
    (root / ".hidden").write_text("no")
    return root


def test_the_client_downloads_a_snapshot(repo: Path, tmp_path: Path) -> None:
    with LocalHub({"acme/tiny": repo}) as hub:
        out = snapshot_download("acme/tiny", endpoint=hub.endpoint, local_dir=tmp_path / "out")
    assert (Path(out) / "model.safetensors").read_bytes() == WEIGHTS
    assert (Path(out) / "config.json").read_bytes() == (repo / "config.json").read_bytes()
    assert (Path(out) / "sub" / "empty.txt").read_bytes() == b""
    assert not (Path(out) / ".hidden").exists()


def test_ids_are_git_and_lfs_ids(repo: Path) -> None:
    with LocalHub({"tiny": repo}) as hub:
        info = HfApi(hub.endpoint).model_info("tiny", files_metadata=True)
        assert HfApi(hub.endpoint).model_info("tiny", revision=info.sha).sha == info.sha
    files = {s.rfilename: s for s in info.siblings or []}
    content = (repo / "config.json").read_bytes()
    git_id = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    assert files["config.json"].blob_id == git_id
    assert files["config.json"].lfs is None
    lfs = files["model.safetensors"].lfs
    assert lfs is not None and lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert len(info.sha or "") == 40


def test_the_commit_follows_the_content(repo: Path) -> None:
    with LocalHub({"tiny": repo}) as hub, LocalHub({"tiny": repo}) as same:
        assert hub.repos["tiny"].commit == same.repos["tiny"].commit
    (repo / "config.json").write_text("{}")
    with LocalHub({"tiny": repo}) as changed:
        assert hub.repos["tiny"].commit != changed.repos["tiny"].commit


def test_the_errors_are_the_hubs(repo: Path, tmp_path: Path) -> None:
    faults = Faults(gated={"tiny": "hf_secret"})
    with LocalHub({"tiny": repo}, faults=faults) as hub:
        api = HfApi(hub.endpoint)
        with pytest.raises(RepositoryNotFoundError):
            api.model_info("none/such")
        with pytest.raises(RevisionNotFoundError):
            api.model_info("tiny", revision="v9")
        assert not api.file_exists("tiny", "nothing.json", token="hf_secret")
        with pytest.raises(GatedRepoError):
            hf_hub_download("tiny", "config.json", endpoint=hub.endpoint, local_dir=tmp_path / "o", token=False)
        hf_hub_download("tiny", "config.json", endpoint=hub.endpoint, local_dir=tmp_path / "o", token="hf_secret")


def get(url: str, span: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Range": f"bytes={span}"} if span else {})
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_ranges(repo: Path) -> None:
    with LocalHub({"acme/tiny": repo}) as hub:
        url = f"{hub.endpoint}/acme/tiny/resolve/main/model.safetensors"
        assert get(url, "10-19") == (206, WEIGHTS[10:20])
        assert get(url, "1048570-") == (206, WEIGHTS[1048570:])
        assert get(url, "1048576-") == (416, b"")
        assert get(url) == (200, WEIGHTS)


def test_faults_are_taken_once_each(repo: Path) -> None:
    planned = [
        Fault("corrupt", "*.safetensors", after=700_000),
        Fault("unavailable", "config.json", times=2),
        Fault("reset", "*.safetensors", after=1000),
        Fault("slow", "*.safetensors", seconds=0.01),
    ]
    with LocalHub({"tiny": repo}, faults=Faults(planned)) as hub:
        url = f"{hub.endpoint}/tiny/resolve/main"
        status, body = get(f"{url}/model.safetensors")
        assert status == 200 and len(body) == len(WEIGHTS)
        assert [i for i in range(len(body)) if body[i] != WEIGHTS[i]] == [700_000]
        with pytest.raises(ConnectionResetError):
            get(f"{url}/model.safetensors")
        began = time.monotonic()
        assert get(f"{url}/model.safetensors") == (200, WEIGHTS)
        assert time.monotonic() - began >= 0.01 * len(WEIGHTS) / SLOW_BLOCK
        assert [get(f"{url}/config.json")[0] for _ in range(3)] == [503, 503, 200]


def test_it_runs_as_a_command(repo: Path) -> None:
    command = [sys.executable, "-m", "conversion_lib.demo.local_hub", f"acme/tiny={repo}", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        assert get(f"{endpoint}/acme/tiny/resolve/main/config.json")[0] == 200
        process.terminate()
