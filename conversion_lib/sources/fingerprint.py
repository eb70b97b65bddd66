"""Identifies a source without reading its weights. Two runs with the same identity are the same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

from conversion_lib.errors import BadInput
from conversion_lib.models.hf_config import QUANTIZATION_KEY, ModelConfig
from conversion_lib.record import HfRecord, Origin
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.storage.interface import Location


def origin_of(stored: SafetensorsSource) -> Origin:
    """Returns where a checkpoint came from.

    Returns:
        What Ferry recorded about it, for a directory that Ferry dequantized about the original; without a record, or
        if the weights were changed since, the checkpoint's path alone.

    Raises:
        BadInput: A record is damaged.
    """
    return stored.files.origin(stored.shards)


def files_identity(stored: SafetensorsSource, config: ModelConfig) -> dict[str, str]:
    """Returns the part of a plan's identity that describes a Hugging Face checkpoint: its files and its config.

    Raises:
        BadInput: As `source_content` raises it.
    """
    return {"source": json.dumps(source_content(stored)), "config": json.dumps(config.raw, sort_keys=True)}


def dequantized_identity(record: HfRecord | None, source: str, config: str) -> dict[str, str] | None:
    """Returns what `files_identity` returned for the quantized original of a dequantized checkpoint.

    Args:
        record: The record of the run that wrote the dequantized checkpoint; None if there is none.
        source: The JSON of its `source_content`.
        config: The JSON of its config.

    Returns:
        None if Ferry did not dequantize the checkpoint, or if a file was changed afterwards. An exported checkpoint
        also has a record, but with more keys in its identity.
    """
    if record is None or record.identity.keys() != {"source", "config", "format"}:
        return None
    original = {"source": record.identity["source"], "config": record.identity["config"]}
    try:
        plain = json.loads(original["config"])
    except ValueError:
        return None
    shards = {name: what for name, what in json.loads(source).items() if name != "headers"}
    unchanged = bool(shards) and all(what.endswith(f", {record.fingerprint}") for what in shards.values())
    if isinstance(plain, dict):
        plain.pop(QUANTIZATION_KEY, None)
    return original if unchanged and plain == json.loads(config) else None


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
        BadInput: A record is damaged.
    """
    content = {}
    for shard in source.shards:
        known = source.files.content(shard) or f"modified {shard.modified}"
        content[shard.name] = f"{shard.size} bytes, {known}"
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
