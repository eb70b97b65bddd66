"""A short round of the fuzzers; `make fuzz` is the long one. A failure names the seed that shows it again."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import inputs, is_refused, variant

NAMES = [
    *("config", "quantization", "pattern", "yaml", "catalog", "maxtext_settings", "record", "verdict", "journal"),
    *("npz", "jsonl", "pickle", "pickle_2", "pickle_lists"),
    *("header", "index", "marker", "manifest", "download"),
]


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return inputs(tmp_path_factory.mktemp("fuzz"))


def test_every_input_has_its_test(fuzzed):
    assert sorted(fuzzed) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_valid_inputs_are_read(name, fuzzed):
    assert not is_refused(fuzzed[name], fuzzed[name].valid)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_variants_are_read_or_refused_with_one_line(name, fuzzed, seed):
    is_refused(fuzzed[name], variant(fuzzed[name], seed))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=50, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_with_one_line(name, fuzzed, content):
    is_refused(fuzzed[name], content)
