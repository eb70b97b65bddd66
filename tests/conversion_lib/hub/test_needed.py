"""Of a repository with several sets of weights, what is fetched: those that transformers would take."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from conversion_lib.core.retry import Backoff
from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.hub import download, needed_files, resolve
from conversion_lib.progress import Reporter
from conversion_lib.sources.weight_files import INDEX_NAME, SINGLE_NAME
from tests.support.checkpoints import QWEN3, answer, ferry_here, random_tensors, refused, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors

REPO = "acme/tiny"
QUICK = Backoff(attempts=2, first_seconds=0.01, longest_seconds=0.02)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    directory = write_checkpoint(tmp_path / "repo", QWEN3, random_tensors(llama_tensors(QWEN3)))
    for name in ("tokenizer.json", "adapter_config.json", "pytorch_model.bin.index.json"):
        (directory / name).write_text("{}")
    return directory


@pytest.fixture
def hub(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Serves what lies in `repo` when it is first asked."""
    with LocalHub({REPO: repo}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        monkeypatch.setenv("FERRY_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def needed() -> set[str]:
    return {file.path for file in needed_files(resolve(REPO, backoff=QUICK), backoff=QUICK)}


def single(repo: Path) -> None:
    write_checkpoint(repo, QWEN3, random_tensors(llama_tensors(QWEN3)), shards=1)


def second_set(repo: Path) -> None:
    for shard in SHARDS:
        shutil.copy(repo / shard, repo / shard.replace("-of-", "-of-1"))


def variant(repo: Path) -> None:
    single(repo)
    for shard in (*SHARDS, INDEX_NAME):
        (repo / shard).unlink()
    shutil.copy(repo / SINGLE_NAME, repo / "model.fp16.safetensors")


def consolidated(repo: Path) -> None:
    shutil.copy(repo / SHARDS[0], repo / "consolidated.safetensors")


def adapter_beside(repo: Path) -> None:
    shutil.copy(repo / SHARDS[0], repo / "adapter_model.safetensors")


def everything(repo: Path) -> None:
    second_set(repo)
    consolidated(repo)
    single(repo)


SMALL = {"config.json", "tokenizer.json"}


@pytest.mark.parametrize(
    ("prepare", "weights", "told"),
    [
        (lambda repo: None, {*SHARDS, INDEX_NAME}, ""),
        (second_set, {*SHARDS, INDEX_NAME}, "model-00001-of-100002.safetensors, model-00002-of-100002.safetensors"),
        (variant, {SINGLE_NAME}, "model.fp16.safetensors"),
        (consolidated, {*SHARDS, INDEX_NAME}, "consolidated.safetensors"),
        (adapter_beside, {*SHARDS, INDEX_NAME}, "an adapter changes nothing until it is merged"),
        (single, {SINGLE_NAME}, f"{SHARDS[0]}, {SHARDS[1]}, {INDEX_NAME}; {SINGLE_NAME} comes first"),
        (everything, {SINGLE_NAME}, "consolidated.safetensors, model-00001-of-00002.safetensors"),
    ],
)
def test_only_the_weights_that_are_read_are_fetched(
    repo: Path,
    request: pytest.FixtureRequest,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    prepare,
    weights,
    told,
) -> None:
    prepare(repo)
    request.getfixturevalue("hub")
    assert needed() == SMALL | weights
    result = download(REPO, tmp_path / "out", backoff=QUICK, reporter=Reporter())
    assert {path.name for path in (tmp_path / "out").iterdir()} == SMALL | weights | {".ferry_provenance.json"}
    assert result.files == len(SMALL | weights)
    err = " ".join(capsys.readouterr().err.split())
    assert told in err and ("not read" in err) == bool(told)


def test_plan_and_stream_and_convert_agree(repo: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A repository with a second set, and a model.safetensors that transformers takes instead."""
    everything(repo)
    hub = request.getfixturevalue("hub")
    plan = answer(ferry_here("plan", REPO, "--json", "--quiet"))
    streamed = answer(ferry_here("convert", REPO, tmp_path / "a", "--stream-download", "--json", "--quiet"))
    plain = answer(ferry_here("convert", REPO, tmp_path / "b", "--json", "--quiet"))
    assert plan["fingerprint"] == streamed["fingerprint"] == plain["fingerprint"]
    asked = {path.rpartition("/")[2] for method, path in hub.requests if method == "GET"}
    assert {name for name in asked if name.endswith(".safetensors")} == {SINGLE_NAME}


def test_files_of_another_tool_may_be_those_that_are_not_needed(
    repo: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A clone of the repository has them all."""
    everything(repo)
    request.getfixturevalue("hub")
    shutil.copytree(repo, tmp_path / "clone")
    assert download(REPO, tmp_path / "clone", backoff=QUICK).bytes_downloaded == 0
    (tmp_path / "clone" / "other.safetensors").write_bytes(b"of nobody")
    (tmp_path / "clone" / ".ferry_provenance.json").unlink()
    with pytest.raises(BadInput, match=r"other\.safetensors"):
        download(REPO, tmp_path / "clone", backoff=QUICK)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["adapter_model.safetensors"], "adapter_model.safetensors is an adapter, which is no model"),
        (["consolidated.safetensors"], "and it has consolidated.safetensors"),
        (["model.fp16.safetensors"], "and it has model.fp16.safetensors"),
        ([], "has no safetensors at its top level"),
    ],
)
def test_weights_that_are_not_read_are_refused(
    repo: Path, request: pytest.FixtureRequest, tmp_path: Path, names: list[str], words: str
) -> None:
    for shard in (*SHARDS, INDEX_NAME):
        (repo / shard).unlink()
    for name in names:
        (repo / name).write_bytes(b"weights")
    request.getfixturevalue("hub")
    for command in (("download", REPO, tmp_path / "out"), ("plan", REPO), ("convert", REPO, tmp_path / "out")):
        refused(ferry_here(*command), words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["<html>", json.dumps({"weight_map": {"a": "gone.safetensors"}})])
def test_an_index_that_is_none_is_refused(
    repo: Path, request: pytest.FixtureRequest, tmp_path: Path, content: str
) -> None:
    (repo / INDEX_NAME).write_text(content)
    request.getfixturevalue("hub")
    refused(ferry_here("download", REPO, tmp_path / "out"), INDEX_NAME)
    assert not (tmp_path / "out").exists()


def test_an_index_that_does_not_come_is_an_outage(repo: Path, hub: LocalHub, tmp_path: Path) -> None:
    from conversion_lib.demo.local_hub import Fault

    hub.faults.planned = [Fault("unavailable", INDEX_NAME) for _ in range(QUICK.attempts)]
    with pytest.raises(OutsideFailure, match="503"):
        download(REPO, tmp_path / "out", backoff=QUICK)
