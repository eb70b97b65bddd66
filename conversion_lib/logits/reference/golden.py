"""Reference logits kept in a file, so that a check needs neither the original weights nor transformers.

Ferry writes an .npz. It also reads MaxText's golden files: lines of JSON (.jsonl), or a pickle (.pickle, .pkl) of a
list, with `prompt`, `tokens` and `logits` for each prompt.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.logits.reference.reference import Reference
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.storage.locations import local_path

FORMAT = 2
NPZ, JSON_LINES, PICKLES = ".npz", ".jsonl", (".pickle", ".pkl")

PICKLED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    ("_codecs", "encode"),
}
"""All names that a pickle of arrays, numbers and texts needs. Anything else could run code."""


def save_golden(path: Path, reference: Reference) -> None:
    """Writes a golden file, atomically.

    It is an .npz with `tokens_<i>` int32 (tokens,) and `logits_<i>` float32 (tokens, vocabulary) for each prompt, and
    `identity`, a JSON text with the model's config, the dtype of its weights, and the origin of the logits.
    """
    arrays: dict[str, Any] = {}
    for index, (tokens, logits) in enumerate(zip(reference.prompts, reference.logits, strict=True)):
        arrays[f"tokens_{index}"] = tokens.astype(np.int32)
        arrays[f"logits_{index}"] = logits.astype(np.float32, copy=False)
    identity = {
        "format": FORMAT,
        "prompts": len(reference.prompts),
        "config": reference.config,
        "origin": reference.origin,
        "dtype": reference.dtype,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, identity=np.array(json.dumps(identity)), **arrays)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def require_golden_name(path: Path) -> None:
    """Checks the name for --save-golden.

    Raises:
        BadInput: It is a URL, or it does not end in .npz, so that the file could not be read again.
    """
    local_path(path, "a file on this machine, for --save-golden")
    if path.suffix != NPZ:
        raise BadInput(f"--save-golden {path}: the name should end in {NPZ}, the format that is written")


def load_golden(path: Path, config: Mapping[str, Any] | None) -> Reference:
    """Reads a golden file.

    Args:
        path: An .npz of Ferry's, or a .jsonl, .pickle or .pkl of MaxText's.
        config: The checkpoint's config.json, for MaxText's files, which have none. None: it has no copy.

    Raises:
        BadInput: It is not a golden file, is truncated, has no config, or its arrays do not match each other or the
            config.
    """
    try:
        reference = _load_npz(path) if path.suffix == NPZ else _load_maxtexts(path, config)
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, IndexError) as error:
        raise BadInput(f"{path} is not a golden file, or is truncated: {_said(error)}") from error
    except (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError) as error:
        raise BadInput(f"{path} is not a golden file, or is truncated: {_said(error)}") from error
    if not reference.prompts:
        raise BadInput(f"{path} holds no prompt")
    vocab = ModelConfig(reference.config, path).count("vocab_size")
    for number, (tokens, logits) in enumerate(zip(reference.prompts, reference.logits, strict=True), 1):
        if tokens.ndim != 1 or logits.shape != (len(tokens), vocab) or not len(tokens):
            raise BadInput(
                f"{path}: prompt {number} has logits {logits.shape} for tokens {tokens.shape}, "
                f"and config.json a vocabulary of {vocab}"
            )
        if tokens.min() < 0 or tokens.max() >= logits.shape[1]:
            raise BadInput(f"{path}: prompt {number} has token ids outside the vocabulary of {vocab}")
    return reference


def _load_npz(path: Path) -> Reference:
    with np.load(path, allow_pickle=False) as arrays:
        identity = json.loads(str(arrays["identity"]))
        if identity["format"] != FORMAT:
            raise BadInput(
                f"{path} is a golden file of format {identity['format']}; this version reads format {FORMAT}"
            )
        prompts = [arrays[f"tokens_{index}"] for index in range(identity["prompts"])]
        logits = [arrays[f"logits_{index}"] for index in range(identity["prompts"])]
    return Reference(dict(identity["config"]), prompts, logits, dict(identity["origin"]), str(identity["dtype"]))


def _load_maxtexts(path: Path, config: Mapping[str, Any] | None) -> Reference:
    if config is None:
        raise BadInput(f"{path} has no config, and the checkpoint no hf/config.json: the model is unknown")
    if path.suffix == JSON_LINES:
        with path.open(encoding="utf-8") as lines:
            return _points(path, (json.loads(line) for line in lines if line.strip()), config)
    if path.suffix in PICKLES:
        points = _Unpickler(io.BytesIO(path.read_bytes()), path).load()
        if not isinstance(points, list):
            raise BadInput(f"{path} should hold a list of prompts, not {type(points).__name__}")
        return _points(path, points, config)
    raise BadInput(f"{path}: a golden file's name ends in {', '.join((NPZ, JSON_LINES, *PICKLES))}")


def _points(path: Path, points: Iterable[Any], config: Mapping[str, Any]) -> Reference:
    prompts: list[Array] = []
    logits: list[Array] = []
    for point in points:
        if "pixel_values" in point:
            raise BadInput(f"{path}: prompt {len(prompts) + 1} has an image; the check supports text only")
        prompts.append(np.asarray(point["tokens"], np.int32))
        logits.append(np.asarray(point["logits"], np.float32))
    return Reference(dict(config), prompts, logits, {"reference": str(path)})


class _Unpickler(pickle.Unpickler):
    """Loads arrays, numbers, texts, lists and dictionaries; refuses whatever else a pickle could call."""

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PICKLED:
            raise BadInput(f"{self._path} names {module}.{name}: golden logits are arrays; nothing else is loaded")
        return super().find_class(module, name)


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
