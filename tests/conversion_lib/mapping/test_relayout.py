"""`ferry convert` of a MaxText checkpoint: what goes along, other dtypes and storage, parts, and what is refused.

That one layout becomes the other is tested with each family.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert, prepare
from conversion_lib.conversions.finalize import finalize
from conversion_lib.errors import BadInput
from conversion_lib.plan.parts import Part
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.sources.orbax import record_of
from tests.support.checkpoints import DEEPSEEK_V3, LLAMA, ferry_here, random_tensors, write_checkpoint
from tests.support.orbax_trees import linen, model_leaves, write_tree
from tests.support.sparse_checkpoints import deepseek_tensors, llama_tensors

CONFIG = LLAMA | {"num_attention_heads": 6}
"""Its query is divided by the root of 8, which loses bits."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("source"), CONFIG, random_tensors(llama_tensors(CONFIG)))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


@pytest.fixture(scope="module")
def scanned(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scanned") / "out"
    convert(source, out, Target())
    return out


def test_the_query_is_not_scaled_again(scanned: Path, source: Path, tmp_path: Path):
    """Undoing and doing it again would round twice."""
    convert(scanned, tmp_path / "there", Target(scan_layers=False))
    convert(tmp_path / "there", tmp_path / "back", Target())
    assert compare(tmp_path / "back", scanned).same


@pytest.mark.parametrize("target", [Target(ocdbt=False), Target(zarr3=False), Target(chunk_bytes=2048)])
def test_other_storage(scanned: Path, source: Path, tmp_path: Path, target: Target):
    convert(scanned, tmp_path / "ours", target)
    convert(source, tmp_path / "straight", target)
    assert compare(tmp_path / "ours", tmp_path / "straight").same
    assert record_of(tmp_path / "ours").target == target


def test_shards_of_the_target_cut_the_chunks(scanned: Path, source: Path):
    """They are in the fingerprint; a chunk of another layout must follow them as a first conversion's does."""

    def chunks(directory: Path, shards: int) -> dict[str, tuple[int, ...]]:
        job = prepare(directory, Target(chunk_bytes=2048, shards=shards), memory_budget=1 << 30)
        return {array.path: array.chunk_shape for array in job.plan.arrays}

    assert chunks(scanned, 3) == chunks(source, 3) != chunks(scanned, 16)


def test_float32_becomes_bfloat16(scanned: Path, source: Path, tmp_path: Path):
    convert(source, tmp_path / "wide", Target(save_dtype="float32"))
    convert(tmp_path / "wide", tmp_path / "narrow", Target())
    assert compare(tmp_path / "narrow", scanned).same


def test_bfloat16_becomes_float32_and_that_is_said(scanned: Path, tmp_path: Path):
    result = ferry_here("convert", scanned, tmp_path / "wide", "--save-dtype", "float32")
    assert "11 arrays become float32" in " ".join(result.stderr.split())
    before, after = model_leaves(scanned), model_leaves(tmp_path / "wide")
    assert before.keys() == after.keys()
    for keys in before:
        np.testing.assert_array_equal(before[keys].astype(np.float32), after[keys])


def test_what_lies_beside_it_goes_along(scanned: Path, source: Path, tmp_path: Path):
    convert(scanned, tmp_path / "out", Target(scan_layers=False))
    ours, theirs = record_of(tmp_path / "out"), record_of(scanned)
    assert (ours.family, ours.model_name, ours.origin) == (theirs.family, theirs.model_name, theirs.origin)
    assert not ours.exact
    assert (tmp_path / "out" / "hf" / "tokenizer.json").read_text() == '{"version": "1.0"}'
    assert json.loads((tmp_path / "out" / "hf" / "config.json").read_text()) == CONFIG


def test_a_training_checkpoint_takes_a_config(scanned: Path, source: Path, tmp_path: Path):
    train = write_tree(tmp_path / "train", linen(model_leaves(scanned)))
    with pytest.raises(BadInput, match="--hf-config"):
        convert(train, tmp_path / "out", Target(scan_layers=False))
    result = ferry_here("convert", train, tmp_path / "out", "--no-scan-layers", "--hf-config", source, "--json")
    assert result.returncode == 0, result.stderr
    convert(scanned, tmp_path / "straight", Target(scan_layers=False))
    assert compare(tmp_path / "out", tmp_path / "straight").same
    plan = json.loads(ferry_here("plan", train, "--hf-config", source, "--json").stdout)
    assert any(line.startswith("opt_state") for line in plan["warnings"])


def test_in_parts(scanned: Path, tmp_path: Path):
    target = Target(scan_layers=False, chunk_bytes=1024)
    for index in (1, 0):
        convert(scanned, tmp_path / "parts", target, options=Options(part=Part(index, 2)))
    finalize(tmp_path / "parts")
    convert(scanned, tmp_path / "whole", target)
    assert compare(tmp_path / "parts", tmp_path / "whole").same


def test_the_bias_of_a_router_for_the_other_release(tmp_path: Path):
    source = write_checkpoint(tmp_path / "hf", DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)))
    for release in ("0.2.5", "main"):
        convert(source, tmp_path / release, Target(maxtext=release))
    convert(tmp_path / "0.2.5", tmp_path / "out", Target(maxtext="main"))
    assert compare(tmp_path / "out", tmp_path / "main").same
    assert not compare(tmp_path / "out", tmp_path / "0.2.5").same


def test_options_of_maxtext_checkpoints_are_refused_for_others(source: Path):
    with pytest.raises(BadInput, match="--hf-config and --written-by are for MaxText checkpoints"):
        prepare(source, Target(), memory_budget=1 << 30, hf_config=source)


def test_a_directory_of_steps_is_asked_for_one(scanned: Path, source: Path, tmp_path: Path):
    train = write_tree(tmp_path / "train", linen(model_leaves(scanned)))
    (train / "0").rename(train / "5")
    write_tree(train, linen(model_leaves(scanned)))
    with pytest.raises(BadInput, match=r"steps 0, 5: name one, such as .*/5"):
        convert(train, tmp_path / "out", Target(), hf_config=source)
    convert(train / "5", tmp_path / "out", Target(), hf_config=source)
    assert compare(tmp_path / "out", scanned).same
