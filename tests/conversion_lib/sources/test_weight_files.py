"""Which files are read where there are several, and what is said of the others."""

from __future__ import annotations

import json

import pytest

from conversion_lib.errors import BadInput
from conversion_lib.sources.weight_files import INDEX_NAME, SINGLE_NAME, read_index, weight_files

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def index_of(*files: object) -> bytes:
    return json.dumps({"weight_map": {f"tensor.{number}": file for number, file in enumerate(files)}}).encode()


SHARDED = index_of(*SHARDS)

TAKEN = {
    "one file": ((SINGLE_NAME,), None, (SINGLE_NAME,), ""),
    "shards": (SHARDS, SHARDED, SHARDS, ""),
    "an index of one file": ((SINGLE_NAME,), index_of(SINGLE_NAME), (SINGLE_NAME,), ""),
    "a stale index with its shards": (
        (SINGLE_NAME, *SHARDS),
        SHARDED,
        (SINGLE_NAME,),
        f"{SHARDS[0]}, {SHARDS[1]}, {INDEX_NAME}; {SINGLE_NAME} comes first",
    ),
    "a stale index without them": ((SINGLE_NAME,), SHARDED, (SINGLE_NAME,), f"{INDEX_NAME}; {SINGLE_NAME} comes first"),
    "an index that is none": ((SINGLE_NAME,), b"<html>", (SINGLE_NAME,), f"{INDEX_NAME}; {SINGLE_NAME} comes first"),
    "a second set of shards": (
        (*SHARDS, "model-00001-of-100002.safetensors", "model-00002-of-100002.safetensors"),
        SHARDED,
        SHARDS,
        f"model-00001-of-100002.safetensors, model-00002-of-100002.safetensors; {INDEX_NAME} names others",
    ),
    "a variant": (
        (SINGLE_NAME, "model.fp16.safetensors"),
        None,
        (SINGLE_NAME,),
        f"model.fp16.safetensors; {SINGLE_NAME} comes first",
    ),
    "Meta's own": (
        (*SHARDS, "consolidated.safetensors"),
        SHARDED,
        SHARDS,
        f"consolidated.safetensors; {INDEX_NAME} names others",
    ),
    "an adapter": (
        (SINGLE_NAME, "adapter_model.safetensors"),
        None,
        (SINGLE_NAME,),
        f"adapter_model.safetensors; {SINGLE_NAME} comes first, as in transformers; an adapter changes nothing until",
    ),
    "many others": (
        (SINGLE_NAME, *(f"{number}.safetensors" for number in range(9))),
        None,
        (SINGLE_NAME,),
        "0.safetensors, 1.safetensors, 2.safetensors and 6 more",
    ),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_transformers_takes_is_taken(name):
    there, index, taken, told = TAKEN[name]
    found = weight_files("src", set(there), index)
    assert found.names == taken
    assert bool(found.index) == (taken != (SINGLE_NAME,))
    assert [note.startswith(f"not read: {told}") for note in found.notes] == ([True] if told else [])


@pytest.mark.parametrize("name", [name for name in TAKEN if name != "an index that is none"])
def test_transformers_does_take_it(name, tmp_path):
    from transformers.modeling_utils import _get_resolved_checkpoint_files

    there, index, taken, _ = TAKEN[name]
    for file in there:
        (tmp_path / file).touch()
    if index is not None:
        content = json.loads(index) | {"metadata": {}}
        (tmp_path / INDEX_NAME).write_text(json.dumps(content))
    files, _ = _get_resolved_checkpoint_files(
        tmp_path, variant=None, gguf_file=None, use_safetensors=None, user_agent={}, is_remote_code=False
    )
    assert files == [str(tmp_path / name) for name in taken]


@pytest.mark.parametrize(
    ("there", "index", "words"),
    [
        (
            (),
            None,
            "neither model.safetensors.index.json nor model.safetensors: only safetensors weights are read",
        ),
        (("model.fp16.safetensors",), None, "under these names are read, and it has model.fp16.safetensors"),
        (SHARDS, None, f"it has {SHARDS[0]}, {SHARDS[1]}"),
        (("adapter_model.safetensors",), None, "adapter_model.safetensors is an adapter, which is no model; merge it"),
        (SHARDS[:1], SHARDED, f"shard {SHARDS[1]} is missing (1 of 2), which model.safetensors.index.json names"),
        ((), SHARDED, f"shard {SHARDS[0]} is missing (2 of 2)"),
    ],
)
def test_what_is_no_checkpoint_is_refused(there, index, words):
    with pytest.raises(BadInput) as raised:
        weight_files("src", set(there), index)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"weight_map": []}',
        b'{"weight_map": {}}',
        b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
        b'{"weight_map": {"a": "x.safetensors"}, "weight_map": {"a": "y.safetensors"}}',
        b'{"weight_map": ' * 100_000,
        b"\xff",
        rb'{"weight_map": {"\ud800": "x.safetensors"}}',
        *(index_of(file) for file in ("../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "x.bin")),
        *(index_of(file) for file in (1, None, ["x.safetensors"], {"x.safetensors": 1})),
    ],
)
def test_an_index_that_is_none_is_refused(content):
    with pytest.raises(BadInput, match=r"^src/model\.safetensors\.index\.json") as raised:
        read_index(f"src/{INDEX_NAME}", content)
    assert "\n" not in str(raised.value)
