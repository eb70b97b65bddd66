"""What a checkpoint from a stranger may not do: lead out of its directory, or pass for another one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.dequantize import dequantize
from conversion_lib.demo.hub_repository import index_repo
from conversion_lib.demo.local_hub import LocalHub
from conversion_lib.demo.tiny_checkpoint import make_tiny_deepseek_v3
from conversion_lib.errors import BadInput
from conversion_lib.hub import download
from conversion_lib.publish.publish import publish
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.sources.orbax import OrbaxSource, record_of
from tests.support.checkpoints import QWEN3, ferry_here, random_tensors, refused, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors

WHOLE = Options(memory_budget=64 << 20, threads=2)
ZARR = Target(ocdbt=False)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("original") / "tiny", QWEN3, random_tensors(llama_tensors(QWEN3)))


@pytest.fixture(scope="module")
def original_converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for each array, so that every leaf's name is a path."""
    out = tmp_path_factory.mktemp("converted") / "out"
    convert(original, out, ZARR, options=WHOLE)
    return out


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "source")


@pytest.fixture
def converted(original_converted: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original_converted, tmp_path / "converted")


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    directory = tmp_path / "victim"
    directory.mkdir()
    (directory / "thesis.txt").write_text("mine")
    return directory


@pytest.mark.parametrize("name", ["LICENSE", "config.json", "model-00001-of-00002.safetensors", "new.json"])
@pytest.mark.parametrize("command", ["convert", "plan", "inspect", "dequantize"])
def test_a_link_out_of_a_source(source: Path, tmp_path: Path, name: str, command: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if (source / name).exists():
        shutil.move(source / name, elsewhere)
    else:
        elsewhere.write_text("secret")
    (source / name).symlink_to(elsewhere)
    destination = [tmp_path / "out"] if command in ("convert", "dequantize") else []
    refused(ferry_here(command, source, *destination), f"{source / name} is a symbolic link that leads out of {source}")
    assert not (tmp_path / "out").exists()


def test_a_snapshot_of_the_hubs_client(source: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--acme--tiny"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.move(source, repo / "blobs")
    for path in (repo / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    convert(snapshot, tmp_path / "out", Target(), options=WHOLE)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_symlink()]
    assert (tmp_path / "out/hf/config.json").exists()


@pytest.mark.parametrize("name", ["hf/config.json", "hf/LICENSE", "hf", "0/items/_METADATA", "0/items"])
def test_a_link_out_of_a_maxtext_checkpoint(converted: Path, tmp_path: Path, name: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    if (converted / name).exists():
        shutil.move(converted / name, elsewhere)
    else:
        elsewhere.write_text("secret")
    (converted / name).symlink_to(elsewhere)
    for words in (("export", converted, tmp_path / "out"), ("convert", converted, tmp_path / "out")):
        refused(ferry_here(*words), "is a symbolic link that leads out of")
        assert not (tmp_path / "out").exists()


def test_a_chunk_that_is_a_link(converted: Path, tmp_path: Path) -> None:
    """The bytes of any file of a fitting size would be weights, and be exported and published."""
    chunk = next(path for path in (converted / "0/items").glob("*/c/**/*") if path.is_file())
    shutil.move(chunk, tmp_path / "elsewhere")
    chunk.symlink_to(tmp_path / "elsewhere")
    for words in (("inspect", converted), ("compare", converted, converted), ("export", converted, tmp_path / "out")):
        refused(ferry_here(*words), f"{chunk} is a symbolic link that leads out of {converted}")


@pytest.mark.parametrize("at", [".ferry", ".ferry/journal-0.jsonl", ".ferry/lease.json", ".ferry/0", ".ferry/hf"])
@pytest.mark.parametrize("command", ["convert", "finalize", "clean"])
def test_a_link_in_a_work_directory(source: Path, victim: Path, tmp_path: Path, at: str, command: str) -> None:
    link = tmp_path / "out" / at
    link.parent.mkdir(parents=True)
    link.symlink_to(victim if "." not in Path(at).name[1:] else victim / "thesis.txt")
    words = (source, tmp_path / "out") if command == "convert" else (tmp_path / "out",)
    refused(ferry_here(command, *words), f"{link} is a symbolic link among ferry's own files")
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


@pytest.mark.parametrize("command", ["export", "clean"])
def test_a_link_in_place_of_an_exports_work_directory(
    converted: Path, victim: Path, tmp_path: Path, command: str
) -> None:
    (tmp_path / ".out.ferry").symlink_to(victim)
    words = (converted, tmp_path / "out") if command == "export" else (tmp_path / "out",)
    refused(ferry_here(command, *words), ".out.ferry is a symbolic link among ferry's own files")
    assert [path.read_text() for path in victim.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["provenance.json", "ferry.json", ".ferry_provenance.json", ".ferry_record.json"])
def test_a_source_cannot_say_where_it_came_from(source: Path, tmp_path: Path, name: str) -> None:
    """Not as a clone of a repository that has such a file: hidden ones count for the times that their files had."""
    forged = {"repo": "Qwen/Qwen3-0.6B", "commit": "1" * 40, "files": []}
    if name == ".ferry_provenance.json":
        forged |= dict.fromkeys(("revision", "endpoint", "started", "finished", "huggingface_hub", "ferry"), "")
        forged["modified"] = {path.name: path.stat().st_mtime_ns - 5 for path in source.glob("*.safetensors")}
    if name == ".ferry_record.json":
        origin = {"path": "/x", "repo": "Qwen/Qwen3-0.6B", "commit": "1" * 40}
        forged = {"ferry_version": "", "fingerprint": "f", "identity": {}, "origin": origin, "modified": {}}
    (source / name).write_text(json.dumps(forged))
    convert(source, tmp_path / "out", Target(), options=WHOLE)
    record = record_of(tmp_path / "out")
    assert record is not None and (record.origin.repo, record.origin.commit) == (None, None)
    assert record.model_name == "source" and not (tmp_path / "out/hf" / name).exists()
    assert "/source/local-" in publish(tmp_path / "out", str(tmp_path / "pub"), unchecked=True).url


def test_forks_of_one_name(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The catalogue's name is for its own repository, and --model renames nothing."""
    fork = write_checkpoint(tmp_path / "fork", QWEN3, random_tensors(llama_tensors(QWEN3), seed=1))
    local = shutil.copytree(original, tmp_path / "Qwen3-0.6B")
    names = []
    with LocalHub({"Qwen/Qwen3-0.6B": original, "mallory/Qwen3-0.6B": fork}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        for repo in hub.repos:
            download(repo, tmp_path / repo)
    for source in (tmp_path / "Qwen/Qwen3-0.6B", tmp_path / "mallory/Qwen3-0.6B", local):
        for model in ((), ("--model", "qwen3-0.6b")):
            done = ferry_here("convert", source, tmp_path / "out", "--overwrite", *model)
            assert done.returncode == 0, done.stderr
            assert ("differs from MaxText's qwen3-0.6b in hidden_size (24, not 1024)" in done.stderr) == bool(model)
            base = tmp_path / f"published{len(model)}"  # what is converted again has other times in it
            url = publish(tmp_path / "out", str(base), unchecked=True).url
            names.append(Path(url).relative_to(base).parts[0])
    official, someones, own = names[::2]
    assert names[1::2] == names[::2]
    assert (official, someones, own) == ("qwen3-0.6b", "mallory--qwen3-0.6b", "local-qwen3-0.6b")
    pointers = sorted(path.parent.name for path in (tmp_path / "published0").glob("*/latest-*.json"))
    assert pointers == sorted({official, someones, own})


def test_a_copy_that_ferry_dequantized_is_known_by_its_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = make_tiny_deepseek_v3(tmp_path / "tiny")
    with LocalHub({"acme/tiny": tiny}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        download("acme/tiny", tmp_path / "hf")
    dequantize(tmp_path / "hf", tmp_path / "bf16", options=WHOLE)
    for name in ("hf", "bf16"):
        convert(tmp_path / name, tmp_path / f"{name}.mt", Target(), options=WHOLE)
    fused, staged = (record_of(tmp_path / f"{name}.mt") for name in ("hf", "bf16"))
    assert fused is not None and staged is not None
    assert (fused.model_name, fused.origin.repo, fused.origin.commit) == ("acme--tiny", *_known(tiny))
    assert (staged.model_name, staged.origin) == (fused.model_name, fused.origin)
    assert staged.origin_fingerprint == fused.fingerprint


def _known(directory: Path) -> tuple[str, str]:
    return "acme/tiny", index_repo("acme/tiny", directory).commit


LEAVES = [
    ["..", "..", "..", "victim"],
    ["", ""],
    ["", "", ""],
    ["/etc/passwd"],
    ["../../../victim"],
    ["a\0b"],
    ["a\\b"],
    ["\ud800"],
    ["x" * 300],
    [""],
]


@pytest.mark.parametrize("keys", LEAVES, ids=str)
@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_leaf_that_leads_out(converted: Path, victim: Path, keys: list[str], ocdbt: bool) -> None:
    metadata = json.loads((converted / "0/items/_METADATA").read_text())
    key_metadata = [{"key": key, "key_type": 2} for key in keys]
    value = {"value_type": "jax.Array", "skip_deserialize": False}
    metadata["tree_metadata"] = {"x": {"key_metadata": key_metadata, "value_metadata": value}}
    (converted / "0/items/_METADATA").write_text(json.dumps(metadata | {"use_ocdbt": ocdbt}))
    for command in ("inspect", "plan"):
        refused(ferry_here(command, converted), str(converted))
    assert [path.name for path in victim.iterdir()] == ["thesis.txt"]


VALUES: tuple[Any, ...] = (None, 5, "x", [], [1], {"a": 1}, True, 1e400, -1)


def _spoiled(value: Any) -> list[Any]:
    """A JSON value with each part of it missing or of another type; of many alike, one."""
    found: list[Any] = []
    if isinstance(value, dict):
        for key in list(value)[:6]:
            rest = {name: part for name, part in value.items() if name != key}
            found += [rest, *(rest | {key: other} for other in (*VALUES, *_spoiled(value[key])))]
    elif isinstance(value, list) and value:
        found += [[other, *value[1:]] for other in (*VALUES, *_spoiled(value[0]))] + [value[1:]]
    return found


@pytest.mark.parametrize("name", ["0/items/_METADATA", "0/_CHECKPOINT_METADATA", "ferry.json"])
def test_damaged_metadata_is_one_line(converted: Path, name: str) -> None:
    path = converted / name
    whole = path.read_bytes()
    contents = [json.dumps(value).encode() for value in _spoiled(json.loads(whole))]
    contents += [b"", b"{", b"[]", b"null", b"\xff\xfe{}", whole[: len(whole) // 2], b"[" * 100_000, b'{"a":' * 10_000]
    refusals = 0
    for content in contents:
        path.write_bytes(content)
        try:
            record_of(converted) if name == "ferry.json" else OrbaxSource(converted)
        except BadInput as error:
            refusals += 1
            assert str(error).startswith(str(converted)) and len(str(error).splitlines()) == 1
    assert refusals > 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b'{"zarr_format": 3}',
        b'{"zarr_format": 3, "node_type": "array", "shape": [2], "data_type": "string"}',
        b'{"zarr_format": 3, "node_type": "array", "shape": [-1], "data_type": "bfloat16"}',
    ],
)
def test_a_damaged_array_is_one_line(converted: Path, content: bytes) -> None:
    next((converted / "0/items").glob("params*/zarr.json")).write_bytes(content)
    refused(ferry_here("inspect", converted), str(converted))


@pytest.mark.parametrize("name", ["run.json", "plan.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"identity": {"target": "{"}, "chunk_limit": 0}'])
def test_a_damaged_note_of_a_run(source: Path, tmp_path: Path, name: str, content: bytes) -> None:
    out = tmp_path / "out"
    for part in ("0/2", "1/2"):
        assert ferry_here("convert", source, out, "--part", part).returncode == 0
    os.chmod(out / ".ferry" / name, 0o644)
    (out / ".ferry" / name).write_bytes(content)
    refused(ferry_here("finalize", out), str(out))
    assert not (out / "0").exists()
