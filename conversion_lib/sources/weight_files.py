"""The choice of a checkpoint's weight files: the ones that transformers reads, and a line for the others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from conversion_lib.core.documents import parse_json
from conversion_lib.errors import BadInput

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
SUFFIX = ".safetensors"
ADAPTER = "adapter_model"

SHOWN = 3
"""The most names in a message."""


@dataclass(frozen=True)
class WeightFiles:
    """The files to read.

    Attributes:
        names: Their names, in order.
        index: The file of each tensor, as the index says; empty if there is no index, or it is not read.
        notes: A line for the files that are not read.
    """

    names: tuple[str, ...]
    index: Mapping[str, str]
    notes: tuple[str, ...]


def weight_files(checkpoint: str, there: Collection[str], index: bytes | None) -> WeightFiles:
    """Chooses the weights as transformers does: `model.safetensors` if there is one, else the files in the index.

    Args:
        checkpoint: The checkpoint's name in messages.
        there: The names of its safetensors files.
        index: The content of its index; None if there is none.

    Raises:
        BadInput: There are no weights of either kind, the index is malformed, or a file that it names is missing.
    """
    if SINGLE_NAME in there:
        return _single(there, index)
    if index is None:
        raise BadInput(f"{checkpoint} has neither {INDEX_NAME} nor {SINGLE_NAME}: {_what_there_is(there)}")
    found = read_index(f"{checkpoint}/{INDEX_NAME}", index)
    names = tuple(sorted(set(found.values())))
    missing = [name for name in names if name not in there]
    if missing:
        raise BadInput(
            f"{checkpoint}: shard {missing[0]} is missing ({len(missing)} of {len(names)}), which {INDEX_NAME} names. "
            "Download it again"
        )
    return WeightFiles(names, found, _leftovers(set(there) - set(names), f"{INDEX_NAME} names others"))


def read_index(path: str, content: bytes) -> dict[str, str]:
    """Returns an index's weight_map: the file of each tensor. Raises BadInput if it is malformed."""
    try:
        items = list(parse_json(content, "it", strict=True)["weight_map"].items())
    except (BadInput, KeyError, AttributeError) as error:
        raise BadInput(f"{path} is not a safetensors index: {error}") from None
    bad = [file for _, file in items if not _is_beside(file)]
    if bad or not items:
        what = f"not {bad[0]!r}" if bad else "and names none"
        raise BadInput(f"{path}: weight_map should name safetensors files beside it, {what}")
    return dict(items)


def _is_beside(file: object) -> bool:
    return isinstance(file, str) and Path(file).name == file and file.endswith(SUFFIX)


def _single(there: Collection[str], index: bytes | None) -> WeightFiles:
    others = set(there) - {SINGLE_NAME}
    if index is not None:
        try:
            named = set(read_index(INDEX_NAME, index).values())
        except BadInput:
            named = set[str]()
        others |= {INDEX_NAME} if named != {SINGLE_NAME} else set()
    return WeightFiles((SINGLE_NAME,), {}, _leftovers(others, f"{SINGLE_NAME} comes first, as in transformers"))


def _leftovers(names: Collection[str], why: str) -> tuple[str, ...]:
    if not names:
        return ()
    adapter = any(name.startswith(ADAPTER) for name in names)
    cure = "; an adapter changes nothing until it is merged" if adapter else ""
    return (f"not read: {_some(names)}; {why}{cure}",)


def _what_there_is(there: Collection[str]) -> str:
    if not there:
        return "only safetensors weights are read"
    if all(name.startswith(ADAPTER) for name in there):
        return f"{_some(there)} is an adapter, which is no model; merge it into its base model first"
    return f"only safetensors weights under these names are read, and it has {_some(there)}"


def _some(names: Collection[str]) -> str:
    shown = sorted(names)[:SHOWN]
    return ", ".join(shown) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
