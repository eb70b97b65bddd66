"""`ferry export`: its options, its files, what it says and refuses, and that it goes on after a kill."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from conversion_lib.conversions import export as exporting
from conversion_lib.conversions.compare import compare
from conversion_lib.conversions.convert import convert
from conversion_lib.conversions.export import export
from conversion_lib.errors import BadInput
from conversion_lib.families import gemma2, gemma3
from conversion_lib.mapping import to_hugging_face as mapping_back
from conversion_lib.mapping import to_maxtext as mapping
from conversion_lib.record import Target
from conversion_lib.runs.options import Options
from conversion_lib.sources.orbax import open_orbax
from conversion_lib.sources.safetensors import SafetensorsSource
from tests.support.checkpoints import (
    BF16,
    LLAMA,
    QWEN3,
    command,
    ferry_here,
    incompressible_tensors,
    random_tensors,
    write_checkpoint,
    write_shard,
)
from tests.support.faults import Fault, Run, build_shim
from tests.support.orbax_trees import model_leaves
from tests.support.sparse_checkpoints import llama_tensors
from tests.support.there_and_back import differing, tensors
from tests.support.tiny_models import make_tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = write_checkpoint(tmp_path_factory.mktemp("source"), QWEN3, random_tensors(llama_tensors(QWEN3)))
    (directory / "tokenizer.json").write_text("{}")
    (directory / "generation_config.json").write_text('{"temperature": 0.6}')
    return directory


@pytest.fixture(scope="module")
def checkpoint(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("maxtext") / "out"
    convert(source, out, Target())
    return out


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_the_command_writes_what_it_says(checkpoint: Path, source: Path, tmp_path: Path):
    result = ferry_here("export", checkpoint, tmp_path / "back", "--json", "--quiet")
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["path"] == str(tmp_path / "back") and not answer["already"]
    assert differing(tensors(source), tensors(tmp_path / "back")) == []
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        ".ferry_record.json",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert config_of(tmp_path / "back") == QWEN3
    again = json.loads(ferry_here("export", checkpoint, tmp_path / "back", "--json", "--quiet").stdout)
    assert again["already"] and again["fingerprint"] == answer["fingerprint"]


def test_every_name_of_the_checkpoint_will_do(checkpoint: Path, tmp_path: Path):
    for number, path in enumerate((checkpoint, checkpoint / "0", checkpoint / "0" / "items")):
        export(path, tmp_path / str(number))
    assert compare(tmp_path / "0", tmp_path / "1").same and compare(tmp_path / "0", tmp_path / "2").same


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype(checkpoint: Path, source: Path, tmp_path: Path, dtype: str):
    export(checkpoint, tmp_path / "back", dtype=dtype)
    expected = {name: array.astype(dtype) for name, array in tensors(source).items()}
    assert differing(expected, tensors(tmp_path / "back")) == []
    assert config_of(tmp_path / "back")["torch_dtype"] == dtype


def test_what_float16_cannot_hold_is_refused(tmp_path: Path):
    tensors = random_tensors(llama_tensors(QWEN3))
    tensors["model.norm.weight"][3] = 70000
    convert(write_checkpoint(tmp_path / "hf", QWEN3, tensors), tmp_path / "maxtext", Target())
    result = ferry_here("export", tmp_path / "maxtext", tmp_path / "back", "--dtype", "float16")
    assert result.returncode == 2
    assert "tensor model.norm.weight has values beyond 65504" in " ".join(result.stderr.split())
    assert not (tmp_path / "back").exists()


def test_the_config_says_the_dtype(tmp_path: Path):
    listing = llama_tensors(QWEN3)
    wide = {name: array.astype(np.float32) for name, array in random_tensors(listing).items()}
    source = write_checkpoint(tmp_path / "hf", QWEN3 | {"torch_dtype": "float32"}, wide)
    convert(source, tmp_path / "maxtext", Target(save_dtype="float32"))
    export(tmp_path / "maxtext", tmp_path / "back")
    assert differing(wide, tensors(tmp_path / "back")) == []


def mixed(directory: Path) -> Path:
    """Norms in float32, one layer's in bfloat16 as all the rest, and one matrix in float16."""
    found = random_tensors(llama_tensors(QWEN3))
    for name, array in found.items():
        if name.endswith("norm.weight") and ".layers.1." not in name:
            found[name] = array.astype(np.float32) + np.float32(2**-20)
    name = "model.layers.2.mlp.up_proj.weight"
    return write_checkpoint(directory, QWEN3, found | {name: found[name].astype(np.float16)})


@pytest.mark.parametrize("scan_layers", [True, False])
def test_each_tensor_has_its_own_dtype_again(tmp_path: Path, scan_layers: bool):
    source = mixed(tmp_path / "hf")
    convert(source, tmp_path / "wide", Target(save_dtype="float32", scan_layers=scan_layers))
    export(tmp_path / "wide", tmp_path / "back")
    assert differing(tensors(source), tensors(tmp_path / "back")) == []
    assert config_of(tmp_path / "back") == QWEN3  # as the source had it
    # what bfloat16 has rounded stays so, but is of the dtype that it was
    convert(source, tmp_path / "narrow", Target(scan_layers=scan_layers))
    export(tmp_path / "narrow", tmp_path / "rounded")
    rounded = {name: array.astype(BF16).astype(array.dtype) for name, array in tensors(source).items()}
    assert differing(rounded, tensors(tmp_path / "rounded")) == []
    # from one layout to another nothing of it is forgotten
    convert(tmp_path / "wide/0", tmp_path / "other", Target(save_dtype="float32", scan_layers=not scan_layers))
    export(tmp_path / "other", tmp_path / "again")
    assert differing(tensors(source), tensors(tmp_path / "again")) == []


def test_a_dtype_that_is_asked_for_is_that_of_all(tmp_path: Path):
    convert(mixed(tmp_path / "hf"), tmp_path / "maxtext", Target(save_dtype="float32"))
    for dtype in ("float32", "bfloat16"):
        export(tmp_path / "maxtext", tmp_path / dtype, dtype=dtype)
        assert {array.dtype.name for array in tensors(tmp_path / dtype).values()} == {dtype}
        assert config_of(tmp_path / dtype)["torch_dtype"] == dtype


@pytest.mark.parametrize("prefix", ["module.", "", "model.model."])
def test_names_that_were_others_have_their_dtypes_too(tmp_path: Path, prefix: str):
    plain = mixed(tmp_path / "plain")
    found = tensors(plain)
    names = {name: name if name == "lm_head.weight" else prefix + name.removeprefix("model.") for name in found}
    if prefix == "module.":
        names = {name: prefix + name for name in found}
    source = write_checkpoint(tmp_path / "hf", QWEN3, {names[name]: array for name, array in found.items()})
    if prefix == "model.model.":
        source = write_checkpoint(tmp_path / "hf", QWEN3, {f"model.{name}": array for name, array in found.items()})
    convert(source, tmp_path / "maxtext", Target(save_dtype="float32"))
    export(tmp_path / "maxtext", tmp_path / "back")
    assert differing(found, tensors(tmp_path / "back")) == []


def test_an_older_record_knows_no_dtypes(checkpoint: Path, tmp_path: Path):
    copy = shutil.copytree(checkpoint, tmp_path / "maxtext")
    record = json.loads((copy / "ferry.json").read_text())
    assert record.pop("source_dtypes") == {"rest": "bfloat16", "named": {}}
    (copy / "ferry.json").write_text(json.dumps(record))
    (copy / "hf/config.json").write_text(json.dumps(QWEN3 | {"torch_dtype": "float32"}))
    export(copy, tmp_path / "back")
    assert {array.dtype.name for array in tensors(tmp_path / "back").values()} == {"float32"}


def test_qwen_3_5_keeps_the_float32_of_its_delta_nets(tmp_path: Path):
    """As published: `A_log` and the norm of a delta net in float32 beside bfloat16."""
    source = make_tiny("qwen3.5", tmp_path / "hf", single_shard=True)
    stored = SafetensorsSource(source)
    found = {name: stored.read(name) for name in stored.tensors}
    wide = [name for name in found if name.endswith(("linear_attn.A_log", "linear_attn.norm.weight"))]
    assert wide
    write_shard(source / "model.safetensors", found | {name: found[name].astype(np.float32) / 3 for name in wide})
    convert(source, tmp_path / "maxtext", Target(save_dtype="float32"))
    export(tmp_path / "maxtext", tmp_path / "back")
    assert differing(tensors(source), tensors(tmp_path / "back")) == []


def test_a_query_scaled_in_float32_comes_back(tmp_path: Path):
    """In bfloat16 it loses a bit; float32 has room for it, and the tied head is not written."""
    config = LLAMA | {"num_attention_heads": 6}  # a root of 8
    source = write_checkpoint(tmp_path / "hf", config, random_tensors(llama_tensors(config)))
    convert(source, tmp_path / "maxtext", Target(save_dtype="float32"))
    export(tmp_path / "maxtext", tmp_path / "back")
    assert differing(tensors(source), tensors(tmp_path / "back")) == []
    assert "lm_head.weight" not in tensors(tmp_path / "back")


def test_shards_are_filled_in_the_order_of_the_layers(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(exporting, "SHARD_BYTES", 6000)
    export(checkpoint, tmp_path / "back")
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    found = SafetensorsSource(tmp_path / "back").tensors
    assert index["metadata"]["total_size"] == sum(info.nbytes for info in found.values())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert {path.name for path in (tmp_path / "back").glob("*.safetensors")} == set(files)
    sizes = [sum(found[name].nbytes for name in index["weight_map"] if index["weight_map"][name] == f) for f in files]
    assert len(files) > 3 and max(sizes) <= 6000
    assert all(size + following > 6000 for size, following in itertools.pairwise(sizes))
    shard_of = [index["weight_map"][f"model.layers.{layer}.mlp.up_proj.weight"] for layer in range(3)]
    assert shard_of == sorted(shard_of)


def test_rows_that_were_cut_are_zeros_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gemma3.MAXTEXT_VOCABULARY, 500, 480)
    source = make_tiny("gemma3", tmp_path / "hf")
    convert(source, tmp_path / "maxtext", Target())
    result = ferry_here("export", tmp_path / "maxtext", tmp_path / "back")
    assert "20 rows cannot be restored" in " ".join(result.stderr.split())
    before, after = (tensors(at)["model.embed_tokens.weight"] for at in (source, tmp_path / "back"))
    assert after.shape == before.shape
    np.testing.assert_array_equal(after[:480].view(np.uint16), before[:480].view(np.uint16))
    assert not after[480:].any() and before[480:].any()


def test_rows_that_were_added_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(gemma2.MAXTEXT_VOCABULARY, 500, 512)
    source = make_tiny("gemma2", tmp_path / "hf", layers=2, head_dim=16, query_pre_attn_scalar=16)
    convert(source, tmp_path / "maxtext", Target())
    assert open_orbax(tmp_path / "maxtext").tensors["params/params/token_embedder/embedding"].shape[0] == 512
    export(tmp_path / "maxtext", tmp_path / "back")
    assert differing(tensors(source), tensors(tmp_path / "back")) == []


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4"])
def test_chunks_that_span_layers_are_each_read_in_one_go(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """As a sharded training run leaves them. What one chunk makes is then written column by column."""
    source = make_tiny(family, tmp_path / "hf")
    monkeypatch.setattr(mapping, "chunk_shape", lambda shape, *rest: (math.ceil(shape[0] / 4), *shape[1:]))
    convert(source, tmp_path / "maxtext", Target())
    monkeypatch.setattr(mapping_back, "KEPT_CHUNKS", 0)
    monkeypatch.setattr(mapping_back, "SHORTEST_RUN", 8)
    result = export(tmp_path / "maxtext", tmp_path / "back")
    assert result.pieces > 2 * len(tensors(source))
    assert differing(tensors(source), tensors(tmp_path / "back")) == []


def test_a_chunk_that_no_memory_holds_is_refused(checkpoint: Path, tmp_path: Path):
    """64 MiB of budget leave 32 MiB for decoded chunks, of which two must fit."""
    wide = QWEN3 | {"hidden_size": 4096, "vocab_size": 2560, "num_hidden_layers": 1}
    listing = list(llama_tensors(wide))
    zeros = {name: np.zeros(shape, BF16) for name, shape, _ in listing}
    convert(write_checkpoint(tmp_path / "hf", wide, zeros), tmp_path / "maxtext", Target())
    chunk = math.prod(open_orbax(tmp_path / "maxtext").chunk_shape("params/params/token_embedder/embedding"))
    assert 2 * chunk * 2 > 16 << 20
    export(tmp_path / "maxtext", tmp_path / "back", options=Options(memory_budget=64 << 20))
    with pytest.raises(BadInput, match=r"stored in chunks of .*times the memory budget"):
        convert(tmp_path / "maxtext", tmp_path / "other", Target(), options=Options(memory_budget=64 << 20))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--dtype", "float8"), "--dtype is one of bfloat16, float32, float16"),
        (("--written-by", "0.1"), "--written-by 0.1: expected one of 0.2.5, main"),
        (("--model", "qwen3-0.7b"), "no model is named qwen3-0.7b"),
    ],
)
def test_a_bad_option_is_refused(checkpoint: Path, tmp_path: Path, options: tuple[str, ...], says: str):
    result = ferry_here("export", checkpoint, tmp_path / "back", *options)
    assert result.returncode == 2 and says in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_maxtext_checkpoint_is_refused(source: Path, tmp_path: Path):
    result = ferry_here("export", source, tmp_path / "back")
    assert result.returncode == 2 and "has no Orbax checkpoint" in result.stderr


def test_another_export_at_the_destination_is_refused(checkpoint: Path, tmp_path: Path):
    export(checkpoint, tmp_path / "back")
    with pytest.raises(BadInput, match="dtype: bfloat16 there, float32 here"):
        export(checkpoint, tmp_path / "back", dtype="float32")


def test_a_checkpoint_that_changes_while_it_is_read_is_refused(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "maxtext"
    convert(checkpoint, out, Target(ocdbt=False))
    real = exporting.plan_to_hugging_face

    def change_after_planning(*args, **kwargs):
        plan = real(*args, **kwargs)
        (out / "0" / "items" / "late").touch()
        return plan

    monkeypatch.setattr(exporting, "plan_to_hugging_face", change_after_planning)
    with pytest.raises(BadInput, match="changed while it was read"):
        export(out, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_it_goes_on_after_a_kill(tmp_path: Path):
    config = QWEN3 | {"hidden_size": 1024, "vocab_size": 18_000, "num_hidden_layers": 4, "intermediate_size": 4096}
    source = write_checkpoint(tmp_path / "hf", config, incompressible_tensors(llama_tensors(config)))
    convert(source, tmp_path / "maxtext", Target())
    words = command("export", tmp_path / "maxtext", tmp_path / "back", "--memory-budget", "64MiB", "--json", "--quiet")
    journal = tmp_path / ".back.ferry" / "journal-0.jsonl"
    run = Run(words, build_shim(tmp_path), Fault("write", str(journal), nth=6))
    run.wait_until_stopped()
    run.kill()
    assert not (tmp_path / "back").exists()
    answer = json.loads(ferry_here(*words[3:]).stdout)
    assert answer["pieces_skipped"] > 0 and answer["pieces"] > 0
    assert differing(tensors(source), tensors(tmp_path / "back")) == []
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_bfloat16_checkpoint_has_the_leaves_that_are_exported(checkpoint: Path, source: Path):
    """Against the tensors, by hand: one leaf scanned on its second axis."""
    wo = model_leaves(checkpoint)["decoder", "layers", "mlp", "wo", "kernel"]
    assert wo.dtype == ml_dtypes.bfloat16
    down = tensors(source)["model.layers.2.mlp.down_proj.weight"]
    np.testing.assert_array_equal(wo[:, 2].T.view(np.uint16), down.view(np.uint16))
