"""Identifies a source without reading its weights. Two runs with the same identity are the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import QUANTIZATION_KEY, ModelConfig
from conversion_lib.record import HF_RECORD_NAME, PROVENANCE_NAME, Origin
from conversion_lib.sources.files import Files, LocalFiles
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.storage.interface import Location


def origin_of(files: Files) -> Origin:
    """Returns where a checkpoint came from.

    Returns:
        The repository and the commit from the download's provenance, None if there is none, and the checkpoint's path.
        For a directory that Ferry dequantized, the path is the path of the original.

    Raises:
        BadInput: provenance.json or ferry.json is not JSON.
    """
    provenance, path = _load(files, PROVENANCE_NAME), files.name
    if isinstance(files, LocalFiles):
        path = (_load(files, HF_RECORD_NAME).get("origin") or {}).get("path") or path
    return Origin(path=path, repo=provenance.get("repo"), commit=provenance.get("commit"))


def files_identity(stored: SafetensorsSource, config: ModelConfig) -> dict[str, str]:
    """Returns the part of a plan's identity that describes a Hugging Face checkpoint: its files and its config.

    Raises:
        BadInput: As `source_content` raises it.
    """
    return {"source": json.dumps(source_content(stored)), "config": json.dumps(config.raw, sort_keys=True)}


def dequantized_identity(record: bytes | None, source: str, config: str) -> dict[str, str] | None:
    """Returns what `files_identity` returned for the quantized original of a dequantized checkpoint.

    Args:
        record: The content of the dequantized checkpoint's ferry.json; None if there is none.
        source: The JSON of its `source_content`.
        config: The JSON of its config.

    Returns:
        None if Ferry did not dequantize the checkpoint, or if a file was changed afterwards. An exported checkpoint
        also has a ferry.json, but with more keys in its identity.
    """
    try:
        written = json.loads(record or b"")
        identity, fingerprint = written["identity"], written["fingerprint"]
        original = {"source": identity["source"], "config": identity["config"]}
        plain = json.loads(original["config"])
    except (ValueError, KeyError, TypeError):
        return None
    plain.pop(QUANTIZATION_KEY, None)
    shards = {name: what for name, what in json.loads(source).items() if name != "headers"}
    unchanged = bool(shards) and all(what.endswith(f", {fingerprint}") for what in shards.values())
    dequantized = identity.keys() == {*original, "format"} and plain == json.loads(config)
    return original if unchanged and dequantized else None


def source_identity(source: SafetensorsSource) -> str:
    """Returns the hexadecimal SHA-256 of `source_content`.

    Raises:
        BadInput: As `source_content` raises it.
    """
    return hashlib.sha256(json.dumps(source_content(source)).encode()).hexdigest()


def source_content(source: SafetensorsSource) -> dict[str, str]:
    """Returns what identifies a checkpoint's weights.

    The content of a file is identified by the fingerprint of the run that wrote it, or by the hash that the download
    verified. If there is neither, or if the file was changed afterwards, its modification time is used instead. Then a
    changed or copied file counts as another file.

    Returns:
        For each shard's name, its size in bytes and what identifies its content; for `headers`, the hash of all
        headers.

    Raises:
        BadInput: provenance.json or ferry.json is not JSON.
    """
    files = source.files
    written = _load(files, HF_RECORD_NAME).get("fingerprint")
    hashes = _verified_hashes(_load(files, PROVENANCE_NAME))
    # a run and a download each write their file last
    sealed = max(files.modified(name) for name in (HF_RECORD_NAME, PROVENANCE_NAME))
    content = {}
    for shard in source.shards:
        known = written or shard.content or hashes.get((shard.name, shard.size))
        seal = known if known and shard.modified <= sealed else f"modified {shard.modified}"
        content[shard.name] = f"{shard.size} bytes, {seal}"
    return content | {"headers": source.header_digest}


def orbax_content(items: Location) -> dict[str, str]:
    """Returns what identifies a MaxText checkpoint: a hash of the name, size and modification time of each file.

    In a bucket, an object's generation is used instead of the time.

    Returns:
        One entry, `items`.
    """
    digest, count, total = hashlib.sha256(), 0, 0
    for name, size, written in items.versions():
        digest.update(f"{name}\0{size}\0{written}\n".encode())
        count, total = count + 1, total + size
    return {"items": f"{count} files, {total} bytes, names and times {digest.hexdigest()}"}


def refuse_change(name: str, noted: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Refuses a source that changed during a run: data from before and after the change do not fit together.

    Args:
        name: The source's name in the message.
        noted: `source_content` or `orbax_content` from the start of the run.
        now: The same at the end.

    Raises:
        BadInput: The two differ.
    """
    changed = [name for name in {**noted, **now} if noted.get(name) != now.get(name)]
    if changed:
        raise BadInput(
            f"{name}/{changed[0]} changed while it was read: {noted.get(changed[0])} at the start, now "
            f"{now.get(changed[0])}. The output of this run is discarded; run again when nothing writes to the source"
        )


def _verified_hashes(provenance: dict[str, Any]) -> dict[tuple[str, int], str]:
    files = provenance.get("files")
    entries = [entry for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    return {(e["path"], e["size"]): e["sha256"] for e in entries if e.get("sha256") and "path" in e and "size" in e}


def _load(files: Files, name: str) -> dict[str, Any]:
    try:
        value = json.loads((files.directory / name).read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadInput(f"{files.name}/{name} is not JSON: {error}") from None
    return value if isinstance(value, dict) else {}
