"""Whether a head is the embedding that the config ties it to: by its values, read in slices."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources import heads
from conversion_lib.sources.heads import own_head, untied
from tests.support.memory_source import MemorySource

BF16, F8 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn


class Counting(MemorySource):
    """Counts the elements that are read."""

    count = 0

    def read(self, name, box=None):
        array = super().read(name, box)
        self.count += array.size
        return array


@pytest.fixture
def table():
    return np.random.default_rng(0).standard_normal((100, 8)).astype(BF16)


def checkpoint(table, head, prefix="model.") -> Counting:
    arrays = {f"{prefix}embed_tokens.weight": table, "lm_head.weight": head}
    # neither is the language model's
    tower = "model.audio_tower.text_encoder.model."
    towers = {f"{tower}embed_tokens.weight": table[:3], f"{tower}lm_head.weight": table[:2]}
    return Counting({**towers, **arrays})


@pytest.mark.parametrize("slice_bytes", [16 << 20, 64])
@pytest.mark.parametrize("prefix", ["model.", "", "language_model.model."])
def test_a_head_is_the_embedding_where_every_bit_is(table, monkeypatch, slice_bytes, prefix):
    monkeypatch.setattr(heads, "READ_BYTES", slice_bytes)
    assert own_head(checkpoint(table, table.copy(), prefix)) is None
    for row in (0, 50, 99):
        other = table.copy()
        other[row, 7] *= 2
        found = own_head(checkpoint(table, other, prefix))
        assert found is not None and found.name == "lm_head.weight"


def test_reading_stops_at_the_first_rows_that_differ(table, monkeypatch):
    monkeypatch.setattr(heads, "READ_BYTES", 16 * 10)
    source = checkpoint(table, -table)
    assert own_head(source) is not None
    assert source.count == 2 * 10 * 8


def test_a_head_of_another_dtype_is_compared_in_the_embeddings(table):
    """As transformers does, which has both in one dtype by then."""
    assert own_head(checkpoint(table, table.astype(np.float32))) is None
    assert own_head(checkpoint(table, (table.astype(np.float32) * np.float32(1.0001)))) is None  # rounds to it
    precise = table.astype(np.float32) * np.float32(1.0001)
    assert own_head(checkpoint(precise, table)) is not None


def test_bits_decide_not_values(table):
    table[3, 3] = np.nan
    assert own_head(checkpoint(table, table.copy())) is None


@pytest.mark.parametrize("shape", [(101, 8), (100, 9), (100,)])
def test_a_head_of_another_shape_is_one_of_its_own(table, shape):
    assert own_head(checkpoint(table, np.zeros(shape, BF16))) is not None


def test_without_a_head_there_is_nothing_to_compare(table):
    assert own_head(MemorySource({"model.embed_tokens.weight": table})) is None
    assert own_head(MemorySource({"lm_head.weight": table})) is None


def test_the_config_of_a_model_that_is_not_tied():
    raw = {"tie_word_embeddings": True, "a": 1, "text_config": {"tie_word_embeddings": True, "b": 2}}
    found = untied(ModelConfig(raw, "config.json"))
    assert found.raw == {"tie_word_embeddings": False, "a": 1, "text_config": {"tie_word_embeddings": False, "b": 2}}
    assert not found.flag("tie_word_embeddings", True) and found.path == "config.json"
    assert raw["tie_word_embeddings"]
