"""What Ferry writes is what MaxText writes, bit for bit, where MaxText can; and MaxText loads all of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conversion_lib.models.verified import load
from tests.parity.cases import CANNOT_CONVERT, CASES, CONTROL, FAMILIES, IMPOSSIBLE, TRAINED, Case, not_restored
from tests.parity.conftest import row, verified
from tests.parity.harness import Harness
from tests.support.family import MAX_KL


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def answer(harness: Harness, name: str, kind: str) -> Any:
    """What the worker's job returned."""
    result = harness.results[name, kind]
    assert "error" not in result, result["error"]
    return result["value"]


@each([*CASES])
def test_maxtext_expects_the_tree_that_we_write(harness: Harness, case: Case) -> None:
    assert harness.wrong.get(case.name) is None
    expected = {"step": [[], "int64"]}
    for path, shape in harness.trees[case.model.name, case.layers].items():
        # rounded, the bias would send tokens to other experts; MaxText's sums of one and a weight are float32
        keeps = path.endswith("MoeBlock_0/gate/bias")
        keeps |= FAMILIES[case.model.family].norms_from_zero and path.endswith("/scale")
        expected[f"params/params/{path}"] = [shape, "float32" if keeps else case.save_dtype]
    found = answer(harness, case.name, "compare")["leaves"] if case.maxtext_converts else None
    assert (found or answer(harness, case.name, "leaves")) == expected


@each([case for case in CASES if case.maxtext_converts])
def test_same_leaves_and_bits_as_maxtext(harness: Harness, case: Case) -> None:
    answer(harness, case.name, "convert")
    compared = answer(harness, case.name, "compare")
    assert compared["differences"] == []
    assert len(compared["leaves"]) > 1


@each([*CASES])
def test_an_export_gives_every_tensor_back(harness: Harness, case: Case) -> None:
    assert harness.wrong.get(case.name) is None
    assert [name for name in harness.changed[case.name] if not name.endswith(tuple(not_restored(case)))] == []


@each([*TRAINED])
def test_an_export_of_what_training_left_gives_every_tensor_back(harness: Harness, case: Case) -> None:
    """MaxText trained at a learning rate of zero: what it writes is what it began with, and much besides."""
    answer(harness, case.name, "train")
    checkpoint = harness.trained(case) / "parity" / "checkpoints" / "0"
    stored = json.loads((checkpoint / "items" / "_METADATA").read_text())["tree_metadata"]
    assert sum("opt_state" in leaf for leaf in stored) > len(stored) / 2
    assert harness.changed_by_export(checkpoint, case.model) == []


@each([case for case in CASES if case.maxtext_converts])
def test_same_metadata_as_maxtext(harness: Harness, case: Case) -> None:
    ours, theirs = (metadata(where(case)) for where in (harness.ours, harness.theirs))
    assert ours == theirs


@each([*CASES])
def test_metadata_says_what_was_asked_for(harness: Harness, case: Case) -> None:
    said = metadata(harness.ours(case))
    assert said["custom_metadata"]["scan_layers"] is case.scan
    assert (said["use_ocdbt"], said["use_zarr3"]) == (case.ocdbt, case.zarr3)
    items = harness.ours(case) / "0" / "items"
    assert (items / "manifest.ocdbt").exists() is case.ocdbt


@each([case for case in CASES if case.logits])
def test_maxtext_computes_what_transformers_does(harness: Harness, case: Case) -> None:
    answer(harness, case.name, "logits")
    assert harness.max_kl(case) < case.model.max_kl


@each([case for case in CASES if case.logits])
def test_both_loaders_of_maxtext_give_the_same_weights(harness: Harness, case: Case) -> None:
    assert answer(harness, case.name, "logits")["training_loader"] == "same"


@each([*IMPOSSIBLE])
def test_maxtext_still_cannot_convert(harness: Harness, case: Case) -> None:
    """Where it learns to, its conversion is to be compared with ours: take the family out of `CANNOT_CONVERT`."""
    _, words = CANNOT_CONVERT[case.model.family, case.scan]
    assert words in harness.results[case.name, "convert"]["error"]


def test_ferry_models_says_what_was_seen(harness: Harness) -> None:
    """Where it differs for a good reason: `python -m tests.support.verified_table` takes what this run saw."""
    needs_everything(harness)
    assert load().same_as(verified([row(harness, case) for case in CASES]))


def test_the_comparison_of_bits_can_fail(harness: Harness) -> None:
    """bfloat16 against float32."""
    needs_everything(harness)
    compared = answer(harness, "control", "compare")
    assert len(compared["differences"]) == len(compared["leaves"]) - 1  # all but the step


def test_the_comparison_of_logits_can_fail(harness: Harness) -> None:
    """A checkpoint for MaxText main, whose router bias lies the other way round, and no shape that tells."""
    needs_everything(harness)
    assert answer(harness, CONTROL.name, "logits")["training_loader"] == "same"
    assert harness.max_kl(CONTROL) > 1000 * MAX_KL


def needs_everything(harness: Harness) -> None:
    if not harness.whole:
        pytest.skip("looks at a run of every case")


def metadata(checkpoint: Path) -> dict[str, Any]:
    """What a loader reads beside the arrays. Chunk shapes are left out: they are ours to choose."""
    step = checkpoint / "0"
    assert (step / "commit_success.txt").exists()
    assert (step / "items" / "commit_success.txt").exists()
    about = json.loads((step / "_CHECKPOINT_METADATA").read_text())
    items = json.loads((step / "items" / "_METADATA").read_text())
    for leaf in items["tree_metadata"].values():
        leaf["value_metadata"].pop("write_shape", None)
    return {**items, "custom_metadata": about["custom_metadata"], "item_names": sorted(about["item_handlers"])}
