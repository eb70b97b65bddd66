"""Metadata of arrays that would end TensorStore's parser, and with it the process."""

from __future__ import annotations

import numpy as np
import pytest
import tensorstore as ts

from conversion_lib.errors import BadInput
from conversion_lib.sources.zarr_metadata import NAMES, open_arrays


@pytest.fixture
def spec(tmp_path):
    def of(driver):
        spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{tmp_path}/a/"}}
        ts.open({**spec, "create": True, "dtype": "int32", "schema": {"domain": {"shape": [3]}}}).result().write(
            np.arange(3, dtype=np.int32)
        ).result()
        return spec

    return of


@pytest.mark.parametrize("driver", sorted(NAMES))
def test_opens_what_is_right(driver, spec):
    arrays = open_arrays({"leaf": spec(driver)}, ts.Context(), "DST")
    assert arrays["leaf"].result().read().result().tolist() == [0, 1, 2]


@pytest.mark.parametrize("driver", sorted(NAMES))
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"[" * 100_000 + b"]" * 100_000, "is nested too deeply"),
        (b'{"attributes": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, "is nested too deeply"),
        (b"[]", "should be a JSON object"),
        (b"\xff", "is not JSON: it is not UTF-8"),
    ],
)
def test_refuses_in_one_line(driver, content, problem, spec, tmp_path):
    where = spec(driver)
    (tmp_path / "a" / NAMES[driver]).write_bytes(content)
    with pytest.raises(BadInput, match=f"^DST: {NAMES[driver]} of leaf {problem}"):
        open_arrays({"leaf": where}, ts.Context(), "DST")


def test_what_is_not_there_is_for_tensorstore_to_explain(tmp_path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{tmp_path}/none/"}}
    with pytest.raises(ValueError, match=r"zarr\.json"):
        open_arrays({"leaf": spec}, ts.Context(), "DST")["leaf"].result()
