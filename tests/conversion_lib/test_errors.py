"""What a person reads of a validation error."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, ValidationError

from conversion_lib.errors import problem_of


class Inner(BaseModel):
    kind: Literal["a", "b"]


class Outer(BaseModel):
    inner: list[Inner]


def raised(value: object) -> ValidationError:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(value)
    return caught.value


def test_the_first_problem_is_named_with_its_field() -> None:
    error = raised({"inner": [{"kind": "a"}, {"kind": "c"}, {}]})
    assert problem_of(error) == "inner.1.kind: input should be 'a' or 'b'"
    assert problem_of(error, lambda field: f"--{field} ") == "--inner.1.kind c: input should be 'a' or 'b'"


def test_what_is_wrong_with_the_whole_has_no_field() -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate_json(b"")
    assert problem_of(caught.value).startswith("invalid JSON: EOF")
    assert "\n" not in problem_of(caught.value)
