"""Names of tensors in a family's table and in a checkpoint."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping

from conversion_lib.core.tensors import TensorInfo
from conversion_lib.mapping.rules import Family

TABLE_PREFIX = "model."
"""The prefix of names in a table. A checkpoint may have another of the family's prefixes instead."""

NEAREST = 3
"""The most names in a message that says what is there."""


def in_checkpoint(name: str, prefix: str) -> str:
    """Converts a name from the table to a checkpoint with `prefix`."""
    return prefix + name.removeprefix(TABLE_PREFIX) if name.startswith(TABLE_PREFIX) else name


def in_table(name: str, prefix: str) -> str:
    """Converts a name from a checkpoint with `prefix` to the table."""
    return TABLE_PREFIX + name.removeprefix(prefix) if name.startswith(prefix) else name


def prefix_of(tensors: Iterable[str], family: Family) -> str:
    """Returns the family's prefix that a checkpoint with these names has; the first one if it has none.

    A checkpoint of the base class has them without `model.`.
    """
    names = set(tensors)
    candidates = dict.fromkeys((*family.prefixes, *(p.removeprefix(TABLE_PREFIX) for p in family.prefixes)))
    return next((p for p in candidates if f"{p}embed_tokens.weight" in names), family.prefixes[0])


def dtypes_by_name(tensors: Mapping[str, TensorInfo], family: Family) -> dict[str, str]:
    """Returns each tensor's dtype by its name in the table, which is the name that an export writes."""
    prefix = prefix_of(tensors, family)
    return {in_table(name, prefix): info.dtype for name, info in tensors.items()}


def nearest(name: str, there: Collection[str]) -> str:
    """Returns a phrase with the names that end like `name`; if none does, with some of those that are there."""
    words = name.split(".")

    def alike(other: str) -> int:
        pairs = zip(reversed(words), reversed(other.split(".")), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    # the last word is nearly always `weight`
    best = max((alike(other) for other in there), default=0)
    near = [other for other in there if alike(other) == best] if best > 1 else list(there)
    count, shown = f"{len(there)} tensors", ", ".join(near[:NEAREST]) or "none"
    return f"are {count}, such as {shown}" if best > 1 or len(near) > NEAREST else f"are {count}: {shown}"
