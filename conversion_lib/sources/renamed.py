"""A checkpoint whose names have something around them, shown under the names of its model.

torch, Lightning and PEFT put words into names, and may save them. transformers itself removes a `model.` too many, and
uses a tied head as the embedding if the files have only the head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from conversion_lib.core.boxes import Box
from conversion_lib.core.tensors import Array, Source, StoredSlice
from conversion_lib.errors import BadInput

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Words that torch puts anywhere into names: torch.compile, FSDP, activation checkpointing."""
AROUND = ("module.", "_forward_module.", "base_model.model.")
"""Prefixes of all names of a model that was saved with its wrapper: DDP and DeepSpeed, Lightning, PEFT."""
BASE = "model."
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class RenamedSource:
    """A source under other names.

    Args:
        source: The source.
        stored: The source's name for each shown name.

    Attributes:
        told: A line that names an example.
    """

    def __init__(self, source: Source, stored: Mapping[str, str]) -> None:
        self._source, self._stored = source, stored
        self.tensors = {shown: source.tensors[name]._replace(name=shown) for shown, name in stored.items()}
        shown, name = next((pair for pair in stored.items() if pair[0] != pair[1]), ("", ""))
        self.told = f"names: {name} is read as {shown}, and others likewise"

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return self._source.requires(self._stored[name], box)

    def read(self, name: str, box: Box | None = None) -> Array:
        return self._source.read(self._stored[name], box)


def plainly_named(source: Source, *, tied: bool) -> Source:
    """Shows a checkpoint under the names of its model.

    Args:
        source: The checkpoint.
        tied: Whether the config ties the head to the embedding.

    Returns:
        `source` itself if its names are the model's, else a RenamedSource.

    Raises:
        BadInput: Two tensors get the same name.
    """
    shown = plain_names(source.tensors, tied=tied)
    if all(name == plain for name, plain in shown.items()):
        return source
    stored: dict[str, str] = {}
    for name, plain in shown.items():
        if (other := stored.setdefault(plain, name)) != name:
            raise BadInput(f"{source.tensors[name].file}: tensors {other} and {name} are both {plain} of the model")
    return RenamedSource(source, stored)


def plain_names(names: Iterable[str], *, tied: bool) -> dict[str, str]:
    """Returns the model's name for each name; `tied` as for `plainly_named`."""
    shown = {name: _unwrapped(name) for name in names}
    while (around := _around(shown.values())) is not None:
        shown = {name: plain.removeprefix(around) for name, plain in shown.items()}
    for name, plain in shown.items():
        if plain == f"{BASE}{HEAD}":
            shown[name] = HEAD
    if tied and not any(_is(plain, EMBEDDING) for plain in shown.values()):
        heads = [name for name, plain in shown.items() if _is(plain, HEAD)]
        layers = (match for plain in shown.values() if (match := re.match(r"(.*?)layers\.\d+\.", plain)))
        if len(heads) == 1 and (layer := next(layers, None)):
            shown[heads[0]] = f"{layer[1]}{EMBEDDING}"
    return shown


def _unwrapped(name: str) -> str:
    if not any(word in name for word in WRAPPERS):
        return name
    return ".".join(word for word in name.split(".") if word not in WRAPPERS)


def _around(names: Iterable[str]) -> str | None:
    """Returns the prefix of all these names that is not the model's; None if there is none."""
    names = list(names)
    doubled = any(name.startswith(BASE + BASE) for name in names)
    for around in (*AROUND, *([BASE] if doubled else [])):
        if names and all(name.startswith(around) for name in names):
            return around
    return None


def _is(name: str, last: str) -> bool:
    return name == last or name.endswith(f".{last}")
