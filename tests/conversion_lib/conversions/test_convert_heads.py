"""A head that config.json ties to the embedding: left out where it is the embedding, kept where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.record import Target
from conversion_lib.sources.orbax import OrbaxSource, open_orbax, record_of
from tests.support.checkpoints import BF16, FP8, QWEN3, answer, ferry_here, random_tensors, refused, write_checkpoint
from tests.support.sparse_checkpoints import llama_tensors
from tests.support.there_and_back import differing, tensors
from tests.support.tiny_models import make_tiny

TIED = QWEN3 | {"tie_word_embeddings": True}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LEAF = "params/params/decoder/logits_dense/kernel"


def source(directory: Path, head: np.ndarray | None, config: dict[str, Any] = TIED, **more: np.ndarray) -> Path:
    found = random_tensors(llama_tensors(TIED)) | more
    return write_checkpoint(directory, config, found if head is None else found | {HEAD: head})


def table() -> np.ndarray:
    return random_tensors(llama_tensors(TIED))[EMBEDDING]


def converted(hf: Path, out: Path, **target: Any) -> OrbaxSource:
    convert(hf, out, Target(**target))
    return open_orbax(out)


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("scan_layers", [True, False])
def test_a_head_of_its_own_is_kept_and_the_config_mended(tmp_path: Path, scan_layers: bool) -> None:
    head = table()[::-1].copy()
    hf = source(tmp_path / "hf", head)
    found = converted(hf, tmp_path / "out", scan_layers=scan_layers)
    np.testing.assert_array_equal(found.read(LEAF).view(np.uint16), head.T.view(np.uint16))
    assert config_of(tmp_path / "out/hf")["tie_word_embeddings"] is False
    record = record_of(tmp_path / "out")
    assert record is not None and record.exact
    assert [line for line in record.dropped if "head" in line] == [
        f"untied head: {HEAD} is not the embedding, to which {hf / 'config.json'} ties it, and is kept; the config "
        "that goes along is mended, and MaxText needs logits_via_embedding=false"
    ]
    # what is made of it has the head as well
    export(tmp_path / "out", tmp_path / "back")
    assert differing(tensors(hf), tensors(tmp_path / "back")) == []
    assert config_of(tmp_path / "back")["tie_word_embeddings"] is False
    convert(tmp_path / "out/0", tmp_path / "other", Target(scan_layers=not scan_layers))
    convert(hf, tmp_path / "direct", Target(scan_layers=not scan_layers))
    assert compare(tmp_path / "other", tmp_path / "direct").same


def test_a_head_that_is_the_embedding_is_left_out(tmp_path: Path) -> None:
    for number, head in enumerate((None, table(), table().astype(np.float32))):
        found = converted(source(tmp_path / f"hf{number}", head), tmp_path / f"out{number}")
        assert LEAF not in found.tensors
        assert config_of(tmp_path / f"out{number}/hf") == TIED
    assert compare(tmp_path / "out0", tmp_path / "out1").same and compare(tmp_path / "out0", tmp_path / "out2").same


def test_a_run_is_the_same_run_whatever_the_head_is_found_to_be(tmp_path: Path) -> None:
    """The fingerprint goes by the files and their config.json, and a run that is finished is not done again."""
    hf = source(tmp_path / "hf", -table())
    first = convert(hf, tmp_path / "out", Target())
    again = convert(hf, tmp_path / "out", Target())
    assert again.already and again.fingerprint == first.fingerprint
    assert answer(ferry_here("plan", hf, "--json", "--quiet"))["fingerprint"] == first.fingerprint


@pytest.mark.parametrize("own", [True, False])
def test_quantized_tables_are_compared_by_their_values(tmp_path: Path, own: bool) -> None:
    """The same values in other codes: half the scale, twice the code. Fused and staged say the same."""
    rng = np.random.default_rng(0)
    codes = (rng.integers(1, 8, table().shape) * 2.0**-3).astype(FP8)
    twice = (codes.astype(np.float32) * 2).astype(FP8)
    scale = np.full((1, 1), 0.5, np.float32)
    more = {EMBEDDING: codes, f"{EMBEDDING}_scale_inv": scale, f"{HEAD}_scale_inv": scale / (1 if own else 2)}
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    hf = source(tmp_path / "hf", twice, TIED | {"quantization_config": quantization}, **more)
    found = converted(hf, tmp_path / "fused")
    assert (LEAF in found.tensors) == own
    assert ferry_here("dequantize", hf, tmp_path / "bf16").returncode == 0
    convert(tmp_path / "bf16", tmp_path / "staged", Target())
    assert compare(tmp_path / "fused", tmp_path / "staged").same
    fused, staged = record_of(tmp_path / "fused"), record_of(tmp_path / "staged")
    assert fused is not None and staged is not None and staged.origin_fingerprint == fused.fingerprint


def test_a_head_alone_is_the_embedding(tmp_path: Path) -> None:
    """As a tied model is saved by the safetensors package, which keeps the first name of a tensor."""
    found = random_tensors(llama_tensors(TIED))
    plain = write_checkpoint(tmp_path / "plain", TIED, found)
    found[HEAD] = found.pop(EMBEDDING)
    hf = write_checkpoint(tmp_path / "hf", TIED, found)
    converted(hf, tmp_path / "out")
    converted(plain, tmp_path / "expected")
    assert compare(tmp_path / "out", tmp_path / "expected").same
    record = record_of(tmp_path / "out")
    assert record is not None
    assert record.dropped == [f"names: {HEAD} is read as {EMBEDDING}, and others likewise"]
    untied = write_checkpoint(tmp_path / "untied", QWEN3, found)
    refused(ferry_here("convert", untied, tmp_path / "none"), f"tensor {EMBEDDING} is missing")


def test_a_head_of_another_shape_is_refused(tmp_path: Path) -> None:
    hf = source(tmp_path / "hf", np.zeros((103, 24), BF16))
    refused(ferry_here("convert", hf, tmp_path / "out"), "lm_head.weight has shape [103, 24]", "[101, 24]")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma2", "gemma3"])
def test_a_family_whose_model_has_no_head_refuses_one(tmp_path: Path, family: str) -> None:
    from conversion_lib.sources.safetensors import SafetensorsSource
    from tests.support.checkpoints import write_shard

    hf = make_tiny(family, tmp_path / "hf", single_shard=True)
    stored = SafetensorsSource(hf)
    arrays = {name: stored.read(name) for name in stored.tensors}
    embedding = next(array for name, array in arrays.items() if name.endswith("embed_tokens.weight"))
    write_shard(hf / "model.safetensors", arrays | {HEAD: embedding})
    assert ferry_here("convert", hf, tmp_path / "same").returncode == 0
    write_shard(
        hf / "model.safetensors", arrays | {HEAD: (embedding.astype(np.float32) * 2).astype(ml_dtypes.bfloat16)}
    )
    refused(
        ferry_here("convert", hf, tmp_path / "out"),
        "lm_head.weight is not the embedding",
        f"MaxText's {family} has no head of its own",
    )
    assert not (tmp_path / "out").exists()


def test_the_check_knows_the_head_too(tmp_path: Path) -> None:
    """transformers does not tie what differs: the reference's logits are those of the head."""
    hf = make_tiny("qwen3", tmp_path / "hf", single_shard=True, layers=2, tie_word_embeddings=True)
    from conversion_lib.sources.safetensors import SafetensorsSource
    from tests.support.checkpoints import write_shard

    stored = SafetensorsSource(hf)
    arrays = {name: stored.read(name) for name in stored.tensors}
    head = np.random.default_rng(0).standard_normal(arrays[EMBEDDING].shape).astype(np.float32) / 8
    write_shard(hf / "model.safetensors", arrays | {HEAD: head.astype(BF16)})
    convert(hf, tmp_path / "out", Target())
    found = answer(ferry_here("check", tmp_path / "out", "--reference", hf, "--tokens", 40, "--json", "--quiet"))
    assert found["verdict"] == "pass" and found["max_kl"] < 1e-9
    # a checkpoint without the head is of another model than that
    write_shard(hf / "model.safetensors", arrays)
    convert(hf, tmp_path / "tied", Target())
    write_shard(hf / "model.safetensors", arrays | {HEAD: head.astype(BF16)})
    refused(ferry_here("check", tmp_path / "tied", "--reference", hf), "tied True against False")
