"""Describes how two runs differ, by their recorded identities."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from conversion_lib.errors import BadInput

NAMED_DIFFERENCES = 4
_OBJECT = TypeAdapter(dict[str, Any])


def refuse_difference(held: dict[str, str], ours: dict[str, str], what: str) -> None:
    """Compares the identity of an earlier run with this run's.

    Args:
        held: The earlier run's identity.
        ours: This run's identity.
        what: The start of the error message.

    Raises:
        BadInput: The two differ. The message names the first differences.
    """
    there, here = _flat(held), _flat(ours)
    parts = [
        f"{key}: {there.get(key)} there, {here.get(key)} here"
        for key in {**there, **here}  # the source before the config before the target
        if there.get(key) != here.get(key)
    ]
    if parts:
        named = "; ".join(parts[:NAMED_DIFFERENCES])
        more = len(parts) - NAMED_DIFFERENCES
        rest = f"; and {more} more" if more > 0 else ""
        raise BadInput(f"{what}; it differs in {named}{rest}. --overwrite starts over")


def identity_in(note: bytes | None) -> dict[str, str] | None:
    """Returns the identity in a run's record or note, or None if the content is neither."""
    try:
        return _Noted.model_validate_json(note or b"").identity
    except ValidationError:
        return None


class _Noted(BaseModel):
    """What every record of a run has."""

    identity: dict[str, str]


def _flat(identity: dict[str, str]) -> dict[str, str]:
    """Returns an identity in which the fields of JSON objects are separate entries, for messages."""
    flat: dict[str, str] = {}
    for key, value in identity.items():
        fields = _fields(value)
        flat |= {f"{key} {name}": str(field) for name, field in fields.items()} if fields else {key: value}
    return flat


def _fields(value: str) -> dict[str, Any]:
    """Of a value that is a JSON object; none of any other, or of one that is damaged."""
    try:
        return _OBJECT.validate_json(value)
    except ValidationError:
        return {}
