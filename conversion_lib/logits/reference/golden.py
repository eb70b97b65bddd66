"""Reference logits kept in a file, so that a check needs neither the original weights nor transformers.

Ferry writes an .npz. It also reads MaxText's golden files: lines of JSON (.jsonl), or a pickle (.pickle, .pkl) of a
list, with `prompt`, `tokens` and `logits` for each prompt.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.core.documents import parse_json
from conversion_lib.core.tensors import Array
from conversion_lib.errors import BadInput
from conversion_lib.limits import GOLDEN_EXPANSION, GOLDEN_FREE_BYTES, GOLDEN_LINE_BYTES
from conversion_lib.logits.reference import pickles
from conversion_lib.logits.reference.arrays import NpzReader
from conversion_lib.logits.reference.reference import Reference
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.storage.locations import local_path

FORMAT = 2
NUMBERS = frozenset({int, float})
NPZ, JSON_LINES, PICKLES = ".npz", ".jsonl", (".pickle", ".pkl")


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
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        OverflowError,
        NotImplementedError,
        RuntimeError,
    ) as error:
        raise BadInput(f"{path} is not a golden file, or is truncated: {_said(error)}") from error
    except (zipfile.BadZipFile, zlib.error) as error:
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
    with NpzReader(path, _most_bytes(path)) as arrays:
        where = f"{path}: identity"
        identity = parse_json(arrays.text("identity").encode(), where)
        if identity.get("format") != FORMAT:
            raise BadInput(
                f"{path} is a golden file of format {identity.get('format')}; this version reads format {FORMAT}"
            )
        config, origin, count = identity["config"], identity["origin"], identity["prompts"]
        if not isinstance(config, dict) or not isinstance(origin, dict) or type(count) is not int:
            raise BadInput(f"{where} is not what ferry writes: config and origin are objects, prompts is a number")
        prompts = [_tokens(arrays.numbers(f"tokens_{index}")) for index in range(count)]
        logits = [arrays.numbers(f"logits_{index}") for index in range(count)]
    return Reference(config, prompts, logits, origin, str(identity["dtype"]))


def _load_maxtexts(path: Path, config: Mapping[str, Any] | None) -> Reference:
    if config is None:
        raise BadInput(f"{path} has no config, and the checkpoint no hf/config.json: the model is unknown")
    if path.suffix == JSON_LINES:
        return _points(path, _lines(path), config)
    if path.suffix in PICKLES:
        points = pickles.load(path.read_bytes())
        if not isinstance(points, list):
            raise BadInput(f"{path} should hold a list of prompts, not {type(points).__name__}")
        return _points(path, points, config)
    raise BadInput(f"{path}: a golden file's name ends in {', '.join((NPZ, JSON_LINES, *PICKLES))}")


def _most_bytes(path: Path) -> int:
    """How many bytes the arrays of a golden file may have in memory: far fewer bytes than that cannot hold them."""
    return max(GOLDEN_FREE_BYTES, GOLDEN_EXPANSION * path.stat().st_size)


def _lines(path: Path) -> Iterator[Any]:
    number = 0
    with path.open("rb") as stream:
        while line := stream.readline(GOLDEN_LINE_BYTES + 1):
            number += 1
            if line.strip():
                yield parse_json(line, f"{path}, line {number}", limit=GOLDEN_LINE_BYTES)


def _points(path: Path, points: Iterable[Any], config: Mapping[str, Any]) -> Reference:
    prompts: list[Array] = []
    logits: list[Array] = []
    room = _most_bytes(path)
    for point in points:
        if not isinstance(point, dict) or not {"tokens", "logits"} <= point.keys():
            raise BadInput(f"{path}: prompt {len(prompts) + 1} should have tokens and logits")
        if "pixel_values" in point:
            raise BadInput(f"{path}: prompt {len(prompts) + 1} has an image; the check supports text only")
        tokens, room = _array(point["tokens"], 1, room)
        found, room = _array(point["logits"], 2, room)
        prompts.append(_tokens(tokens))
        with np.errstate(over="ignore"):  # they are infinite then, and the check says so
            logits.append(found.astype(np.float32, copy=False))
    return Reference(dict(config), prompts, logits, {"reference": str(path)})


def _array(value: Any, axes: int, room: int) -> tuple[Array, int]:
    """Makes an array of numbers, lists of them, or arrays.

    Args:
        value: What the file has.
        axes: Levels of lists at most.
        room: Bytes that it may take, as float32.

    Returns:
        The array, and what is left of the room.
    """
    plain, room = _unwrapped(value, axes, room)
    array = np.asarray(plain)
    if array.dtype.kind not in pickles.KINDS:
        raise ValueError("its arrays should be numbers")
    return array, room


def _unwrapped(value: Any, axes: int, room: int) -> tuple[Any, int]:
    if isinstance(value, pickles.PickledArray):
        value = value.array
    if isinstance(value, list | tuple) and axes and NUMBERS.issuperset(map(type, value[: room // 4 + 1])):
        return value, _less(room, len(value))
    if isinstance(value, list | tuple) and axes:
        inner = []
        for entry in value:  # it may be the same list a million times
            plain, room = _unwrapped(entry, axes - 1, room)
            inner.append(plain)
        return inner, room
    if not isinstance(value, int | float | np.ndarray):
        raise ValueError("its arrays should be numbers")
    return value, _less(room, int(np.size(value)))


def _less(room: int, elements: int) -> int:
    if 4 * elements > room:
        raise ValueError(f"its arrays would take more than {GOLDEN_EXPANSION} times its size")
    return room - 4 * elements


def _tokens(array: Array) -> Array:
    if array.dtype.kind not in "iu" or (array.size and not 0 <= int(array.min()) <= int(array.max()) < 2**31):
        raise ValueError("tokens should be whole numbers, and not negative")
    return array.astype(np.int32)


def _said(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
