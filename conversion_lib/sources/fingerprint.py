"""What makes two runs the same run: where the weights came from and what they are, without reading them."""

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
    """Where a checkpoint came from, as the download's provenance says; else its name alone.

    Of a directory that Ferry dequantized, the path is that of the original.
    """
    provenance, path = _load(files, PROVENANCE_NAME), files.name
    if isinstance(files, LocalFiles):
        path = (_load(files, HF_RECORD_NAME).get("origin") or {}).get("path") or path
    return Origin(path=path, repo=provenance.get("repo"), commit=provenance.get("commit"))


def files_identity(stored: SafetensorsSource, config: ModelConfig) -> dict[str, str]:
    """What a plan's identity says of a Hugging Face checkpoint: its files and its config."""
    return {"source": json.dumps(source_content(stored)), "config": json.dumps(config.raw, sort_keys=True)}


def dequantized_identity(record: bytes | None, source: str, config: ModelConfig) -> dict[str, str] | None:
    """What `files_identity` said of the quantized checkpoint that another one was dequantized from.

    record, source, config: of the dequantized one: its ferry.json, its part of a plan's identity, its config.json.
    None where Ferry did not dequantize it (what it exported has more in its record), or a file was changed since.
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
    dequantized = identity.keys() == {*original, "format"} and plain == config.raw
    return original if unchanged and dequantized else None


def source_identity(source: SafetensorsSource) -> str:
    """Hex sha256 over `source_content`."""
    return hashlib.sha256(json.dumps(source_content(source)).encode()).hexdigest()


def source_content(source: SafetensorsSource) -> dict[str, str]:
    """By file name, size and what is known of its content; and the hash of all headers, as `headers`.

    What is known is the fingerprint of the run that wrote the files, or the hashes that the download verified. Where
    there is neither, or a file was changed after it was written or verified, the time of modification stands in, so
    that a file that was changed or copied counts as another.
    """
    files = source.files
    written = _load(files, HF_RECORD_NAME).get("fingerprint")
    hashes = _verified_hashes(_load(files, PROVENANCE_NAME))
    # both are written last, by the run and by the download
    sealed = max(files.modified(name) for name in (HF_RECORD_NAME, PROVENANCE_NAME))
    content = {}
    for shard in source.shards:
        known = written or shard.content or hashes.get((shard.name, shard.size))
        seal = known if known and shard.modified <= sealed else f"modified {shard.modified}"
        content[shard.name] = f"{shard.size} bytes, {seal}"
    return content | {"headers": source.header_digest}


def orbax_content(items: Location) -> dict[str, str]:
    """The hash over name, size and time of modification of every file of a MaxText checkpoint, as `items`.

    In a bucket an object's generation stands for the time.
    """
    digest, count, total = hashlib.sha256(), 0, 0
    for name, size, written in items.versions():
        digest.update(f"{name}\0{size}\0{written}\n".encode())
        count, total = count + 1, total + size
    return {"items": f"{count} files, {total} bytes, names and times {digest.hexdigest()}"}


def refuse_change(name: str, noted: Mapping[str, str], now: Mapping[str, str]) -> None:
    """Raises BadInput where the source called `name` is not `now` what it was when `noted`, its content, was taken.

    What was read of it before and after a change does not belong together.
    """
    changed = [name for name in {**noted, **now} if noted.get(name) != now.get(name)]
    if changed:
        raise BadInput(
            f"{name}/{changed[0]} changed while it was read: {noted.get(changed[0])} at first, now "
            f"{now.get(changed[0])}. Nothing of this run is kept; run again when the source is at rest"
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
