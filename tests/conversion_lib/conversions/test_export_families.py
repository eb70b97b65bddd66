"""Hugging Face to MaxText and back, and from one MaxText layout to another: every family, in every layout."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.errors import BadInput
from conversion_lib.record import Target
from tests.support.there_and_back import (
    SCALED_QUERY,
    UNSCANNED_ONLY,
    RoundTrip,
    differing,
    layouts,
    round_trip,
    tensors,
)
from tests.support.tiny_models import prompt, reference_logits
from tests.support.tiny_sizes import SIZES

WITH_TOWERS = ("gemma3", "gemma4", "qwen3.5")


@pytest.fixture(scope="module", params=SIZES)
def trip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundTrip]:
    yield round_trip(request.param, tmp_path_factory.mktemp("trip"))


def test_every_tensor_comes_back(trip: RoundTrip):
    source, back = tensors(trip.hf), tensors(trip.back[False])
    changed = differing(source, back)
    if trip.family not in SCALED_QUERY:
        assert changed == []
        return
    assert all(name.endswith("q_proj.weight") for name in changed)
    for name in changed:
        before, after = (kind[name].astype(np.float32) for kind in (source, back))
        assert before.shape == after.shape
        # half a unit in the last place, of eight bits, twice
        assert np.all(np.abs(after - before) <= 2**-7 * np.abs(before))


def test_both_layouts_give_the_same_files(trip: RoundTrip):
    if trip.family in UNSCANNED_ONLY:
        assert set(trip.back) == {False}
        return
    assert compare(trip.back[True], trip.back[False]).same
    names = {path.name for path in trip.back[True].iterdir()}
    assert names == {path.name for path in trip.back[False].iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    for name in names - {"ferry.json"}:
        assert (trip.back[True] / name).read_bytes() == (trip.back[False] / name).read_bytes()


def test_transformers_loads_it(trip: RoundTrip):
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(trip.back[False], output_loading_info=True)
    assert {kind: names for kind, names in info.items() if names} == {}
    assert type(model).__name__ in model.config.architectures
    assert str(model.dtype) == "torch.bfloat16"


def test_the_text_model_of_one_with_towers_computes_the_same(trip: RoundTrip):
    if trip.family not in WITH_TOWERS:
        assert "text_config" not in json.loads((trip.hf / "config.json").read_text()) or trip.family == "gemma4_small"
        return
    tokens = prompt(16, 500)
    np.testing.assert_array_equal(reference_logits(trip.back[False], tokens), reference_logits(trip.hf, tokens))


def test_one_layout_becomes_the_other(trip: RoundTrip, tmp_path: Path):
    if trip.family in UNSCANNED_ONLY:
        with pytest.raises(BadInput, match="unscanned only"):
            convert(trip.maxtext[False], tmp_path / "out", Target(scan_layers=True))
        return
    for scan in layouts(trip.family):
        out = tmp_path / str(scan)
        convert(trip.maxtext[not scan], out, Target(scan_layers=scan))
        assert compare(out, trip.maxtext[scan]).same
        for name in ("config.json", "generation_config.json"):
            assert (out / "hf" / name).read_bytes() == (trip.maxtext[scan] / "hf" / name).read_bytes()
