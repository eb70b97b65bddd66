"""Results are JSON that every parser reads, whatever numbers a check finds."""

import json
import math

import pytest
from pydantic import BaseModel

from conversion_lib.core.plain_json import to_json
from conversion_lib.program import Outcome, run_command


class Found(BaseModel):
    max_kl: float
    layers: list[dict[str, float]]


def strict(text):
    """Parses JSON without the numbers that Python's parser also takes."""

    def refuse(name):
        raise AssertionError(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, 1.5e300, -0.0])
def test_numbers_come_back_by_float(number):
    read = strict(to_json({"a": number, "b": [{"c": (number, None, True, "NaN")}]}))
    for value in (read["a"], read["b"][0]["c"][0]):
        assert str(float(value)) == str(number)
    assert read["b"][0]["c"][1:] == [None, True, "NaN"]


@pytest.mark.parametrize("as_model", [True, False])
def test_result_of_a_command(capfd, as_model):
    values = {"max_kl": math.inf, "layers": [{"largest": math.nan}]}
    result = Found(**values) if as_model else values
    code = run_command(lambda _: Outcome(result, failed=True, message="logits: fail"), json_output=True)
    printed = strict(capfd.readouterr().out)
    assert code == 1
    assert (printed["max_kl"], printed["layers"]) == ("Infinity", [{"largest": "NaN"}])
