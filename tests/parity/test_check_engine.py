"""`ferry check --engine maxtext`: the real MaxText sees what Ferry's own forward pass sees."""

from __future__ import annotations

from pathlib import Path

import pytest

from conversion_lib.conversions.convert import convert
from conversion_lib.logits.check import Options, run_check
from conversion_lib.logits.forward.architectures import READERS
from conversion_lib.maxtext.table import MODELS
from conversion_lib.record import Target
from tests.conversion_lib.logits.conftest import write_orbax
from tests.parity.harness import MAXTEXT_PYTHON
from tests.support.family import Description, descriptions
from tests.support.maxtext_by_hand import maxtext_leaves
from tests.support.tiny_models import make_tiny

OPTIONS = Options(engine="maxtext", maxtext_python=MAXTEXT_PYTHON)


@pytest.fixture(autouse=True)
def _there() -> None:
    if not MAXTEXT_PYTHON.exists():
        pytest.fail("the MaxText environment is missing: run tests/parity/run.sh")


@pytest.mark.parametrize(
    "described", [of for of in descriptions().values() if of.parity.engine], ids=lambda of: of.name
)
def test_a_right_checkpoint(described: Description, tmp_path: Path) -> None:
    """Of all families, the parity tests run MaxText by the same table of settings."""
    hf = make_tiny(described.name, tmp_path / "hf", layers=described.parity.engine.layers)
    convert(hf, tmp_path / "ckpt", Target(save_dtype="float32", scan_layers=described.layouts[0]))
    result = run_check(tmp_path / "ckpt", hf, options=OPTIONS)
    assert (result.verdict, result.engine, result.layers) == ("pass", "maxtext", [])
    assert result.max_kl < described.parity.engine.largest


@pytest.mark.core
def test_every_family_that_maxtext_runs_has_settings() -> None:
    """The parity tests, which use the same table, run all of them."""
    kinds = {kind.removesuffix("_text") for kind in READERS}
    assert kinds - {"kimi_k2"} | {"gemma4_dense", "gemma4_e2b", "gemma4_e4b"} == set(MODELS)


@pytest.mark.core
def test_a_planted_mistake(tmp_path: Path) -> None:
    hf = make_tiny("qwen3", tmp_path / "hf")
    leaves = maxtext_leaves(hf, scanned=True)
    gate, up = "decoder/layers/mlp/wi_0/kernel", "decoder/layers/mlp/wi_1/kernel"
    leaves[gate], leaves[up] = leaves[up], leaves[gate]
    result = run_check(write_orbax(tmp_path / "ckpt", leaves, scanned=True), hf, options=OPTIONS)
    assert result.verdict == "fail"
    assert "--engine ferry shows which layer departs" in result.reason
