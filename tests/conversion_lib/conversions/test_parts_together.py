"""N parts of a conversion one after the other, and finalize at the end of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tensorstore as ts

from conversion_lib.conversions.convert import convert, prepare
from conversion_lib.conversions.finalize import finalize
from conversion_lib.errors import BadInput
from conversion_lib.mapping import to_maxtext as mapping
from conversion_lib.plan import parts as module
from conversion_lib.plan.parts import Part, chunk_count, shares
from conversion_lib.record import Target
from conversion_lib.runs.note import Run
from conversion_lib.runs.options import Options
from conversion_lib.runs.trees import maxtext_staging
from conversion_lib.runs.workspace import Workspace, unfinished
from conversion_lib.sinks import ocdbt
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.storage.local import LocalLocation
from tests.support.checkpoints import DEEPSEEK_V3, WRITTEN, Result, answer, ferry_here, random_tensors, write_checkpoint
from tests.support.checkpoints import refused as refused_whatever_else_is_said
from tests.support.orbax_reader import restore
from tests.support.sparse_checkpoints import deepseek_tensors

STORAGES = [(True, True), (True, False), (False, True), (False, False)]


def deepseek(directory: Path) -> Path:
    return write_checkpoint(directory, DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)), shards=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return deepseek(tmp_path_factory.mktemp("source") / "fp8")


def convert_part(source: Path, out: Path, part: str, target: Target = Target(), **options):
    return convert(source, out, target, options=Options(part=Part.parse(part), **options))


def same(a: Path, b: Path) -> bool:
    return answer(ferry_here("compare", a, b, "--json"))["same"]


def refused(result: Result, *words: str, code: int = 2) -> str:
    """As in other tests, and nothing else is said."""
    line = refused_whatever_else_is_said(result, *words, code=code)
    assert result.stderr == f"{line}\n"
    return line


@pytest.mark.parametrize("scan_layers", [True, False])
@pytest.mark.parametrize(("ocdbt", "zarr3"), STORAGES)
def test_parts_give_the_bits_of_one(tmp_path, source, monkeypatch, ocdbt, zarr3, scan_layers):
    """Arrays are split among parts here, which have other threads and other memory."""
    monkeypatch.setattr(module, "UNIT_BYTES", 1 << 12)
    target = Target(ocdbt=ocdbt, zarr3=zarr3, scan_layers=scan_layers, chunk_bytes=1 << 13)
    whole = convert(source, tmp_path / "whole", target)
    done = [
        convert_part(source, tmp_path / "out", "1/3", target, threads=1, memory_budget=64 << 20),
        convert_part(source, tmp_path / "out", "3/3", target, threads=3, memory_budget=1 << 30),
        convert_part(source, tmp_path / "out", "2/3", target, threads=2, memory_budget=128 << 20),
    ]
    assert [result.part for result in done] == ["1/3", "0/3", "2/3"]
    assert sum(result.bytes_out for result in done) == whole.bytes_out
    assert sum(result.pieces for result in done) >= whole.pieces
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".ferry"]
    result = finalize(tmp_path / "out")
    assert result.fingerprint == whole.fingerprint
    assert not (tmp_path / "out/.ferry").exists()
    assert same(tmp_path / "out", tmp_path / "whole")
    expected = restore(tmp_path / "whole/0/items")
    assert all(leaf.tobytes() == expected[path].tobytes() for path, leaf in restore(tmp_path / "out/0/items").items())
    records = [json.loads((tmp_path / name / "ferry.json").read_text()) for name in ("out", "whole")]
    assert records[0] == records[1]
    beside = [sorted(path.name for path in (tmp_path / name / "hf").iterdir()) for name in ("out", "whole")]
    assert beside[0] == beside[1]


def test_finalize_needs_no_source(tmp_path, source):
    moved = shutil.copytree(source, tmp_path / "source")
    for part in ("0/2", "1/2"):
        convert_part(moved, tmp_path / "out", part)
    shutil.rmtree(moved)
    finalize(tmp_path / "out")
    assert json.loads((tmp_path / "out/hf/config.json").read_text())["model_type"] == "deepseek_v3"


def test_what_was_split_is_a_checkpoint_like_any_other(tmp_path, source):
    for part in ("0/2", "1/2"):
        convert_part(source, tmp_path / "out", part)
    finalize(tmp_path / "out")
    assert answer(ferry_here("inspect", tmp_path / "out", "--json"))["kind"] == "maxtext"
    published = answer(ferry_here("publish", tmp_path / "out", tmp_path / "shelf", "--unchecked", "--json"))
    assert answer(ferry_here("verify", published["url"], "--json"))["problems"] == []


def test_a_finished_part_and_a_finished_checkpoint_are_left_alone(tmp_path, source, monkeypatch):
    first = convert_part(source, tmp_path / "out", "0/2")
    convert_part(source, tmp_path / "out", "1/2")
    journal = (tmp_path / "out/.ferry/journal-0.jsonl").read_bytes()
    again = answer(ferry_here("convert", source, tmp_path / "out", "--part", "0/2", "--json"))
    assert (first.already, again["already"], again["part"]) == (False, True, "0/2")
    assert (again["pieces"], again["bytes_out"]) == (0, 0)
    assert (tmp_path / "out/.ferry/journal-0.jsonl").read_bytes() == journal
    done = answer(ferry_here("finalize", tmp_path / "out", "--json"))
    assert set(done) == {"path", "fingerprint", "already", "chunks", "seconds", "peak_bytes"}
    assert (done["already"], done["chunks"]) == (False, 32)
    again = answer(ferry_here("finalize", tmp_path / "out", "--json"))
    assert (again["already"], again["fingerprint"]) == (True, first.fingerprint)
    assert convert_part(source, tmp_path / "out", "1/2").already
    assert convert(source, tmp_path / "out", Target()).already
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == WRITTEN


def test_one_part_is_the_whole_without_its_commit(tmp_path, source):
    """So a run of the whole goes on with it, and commits."""
    convert_part(source, tmp_path / "out", "1/1")
    assert not (tmp_path / "out/0").exists()
    assert convert(source, tmp_path / "out", Target()).pieces == 0
    assert (tmp_path / "out/0/items").is_dir()


# What does not go together.


@pytest.mark.parametrize(
    ("there", "then", "words"),
    [
        (["--part", "0/2"], ["--part", "0/3"], ["in 2 parts", "in 3 parts"]),
        (["--part", "0/2"], [], ["in 2 parts", "of the whole"]),
        ([], ["--part", "0/2"], ["of the whole", "in 2 parts"]),
    ],
    ids=["another-count", "whole-on-split", "split-on-whole"],
)
def test_another_split_of_an_unfinished_run(tmp_path, source, monkeypatch, there, then, words):
    with monkeypatch.context() as patch:
        patch.setattr(OrbaxSink, "finish", lambda sink: (_ for _ in ()).throw(BadInput("ended here")))
        ferry_here("convert", source, tmp_path / "out", *there)
    refused(ferry_here("convert", source, tmp_path / "out", *then), *words, "--overwrite")
    # nothing was thrown away
    assert ferry_here("convert", source, tmp_path / "out", *there).returncode == 0


def test_a_part_of_another_target(tmp_path, source):
    convert_part(source, tmp_path / "out", "0/2")
    line = refused(ferry_here("convert", source, tmp_path / "out", "--part", "1/2", "--no-zarr3"), "zarr3")
    assert "--overwrite" in line


def test_a_part_of_another_version(tmp_path, source, monkeypatch):
    """One that would cut chunks otherwise, though nothing in the identity says so."""
    convert_part(source, tmp_path / "out", "0/2")
    chunk_shape = mapping.chunk_shape
    monkeypatch.setattr(mapping, "chunk_shape", lambda shape, *rest: (1, *chunk_shape(shape, *rest)[1:]))
    refused(ferry_here("convert", source, tmp_path / "out", "--part", "1/2"), "plan.json", "version", "ferry clean")


def test_missing_parts_are_named(tmp_path, source, monkeypatch):
    refused(ferry_here("finalize", tmp_path / "out"), str(tmp_path / "out"), "--part I/N")
    out = tmp_path / "out"
    convert_part(source, out, "0/3")
    refused(ferry_here("finalize", out), f"part 1/3 has not been started: run `ferry convert SRC {out} --part 1/3`")
    convert_part(source, out, "1/3")
    convert_part(source, out, "2/3")
    journal = out / ".ferry/journal-2.jsonl"
    total = unfinished(maxtext_staging(out)).chunks[2]
    line = json.loads(journal.read_text())
    journal.write_text(json.dumps({"pieces": line["pieces"][:2]}) + "\n")
    refused(ferry_here("finalize", out), f"part 2/3 has {total - 2} of {total} chunks left to write")
    assert not (out / "0").exists()
    result = convert_part(source, out, "2/3")
    assert (result.pieces, result.pieces_skipped) == (total - 2, 2)
    finalize(out)


def test_an_empty_part_need_not_be_started(tmp_path, source):
    counts = None
    for index in range(40):
        result = convert_part(source, tmp_path / "out", f"{index}/40")
        counts = unfinished(maxtext_staging(tmp_path / "out")).chunks
        if counts[index] == 0:
            assert result.already
            assert not (tmp_path / f"out/.ferry/journal-{index}.jsonl").exists()
    assert counts is not None
    assert 0 in counts
    finalize(tmp_path / "out")


@pytest.mark.parametrize(("ocdbt_on", "zarr3"), STORAGES)
@pytest.mark.parametrize("split", [True, False])
def test_a_chunk_that_is_not_there_is_named(tmp_path, source, monkeypatch, ocdbt_on, zarr3, split):
    """What a journal says is not taken for what the store has."""
    out, target = tmp_path / "out", Target(ocdbt=ocdbt_on, zarr3=zarr3)
    with monkeypatch.context() as patch:
        patch.setattr(OrbaxSink, "finish", lambda sink: (_ for _ in ()).throw(OSError("ended here")))
        if split:
            convert_part(source, out, "0/2", target)
            convert_part(source, out, "1/2", target)
        else:
            with pytest.raises(OSError, match="ended here"):
                convert(source, out, target)
    items, key = out / ".ferry/0/items", "params.params.decoder.decoder_norm.scale/" + ("c/0" if zarr3 else "0")
    if ocdbt_on:
        stores = [ocdbt.store(LocalLocation(path), ts.Context()) for path in items.glob("ocdbt.process_*")]
        holders = [store for store in stores if store.read(key).result().state == "value"]
        assert len(holders) == 1
        holders[0].write(key, None).result()
    else:
        (items / key).unlink()
    with pytest.raises(BadInput, match=r"params/params/decoder/decoder_norm/scale has no chunk \(0,\)"):
        finalize(out) if split else convert(source, out, target)
    assert not (out / "0").exists()


# Beginning anew.


def test_overwrite_begins_anew_once_and_is_joined_from_then_on(tmp_path, source):
    out = tmp_path / "out"
    convert(source, out, Target())
    first = convert_part(source, out, "0/2", Target(zarr3=False), overwrite=True)
    assert not first.already
    assert convert_part(source, out, "1/2", Target(zarr3=False), overwrite=True).pieces > 0
    # a retry throws nothing away
    assert convert_part(source, out, "0/2", Target(zarr3=False), overwrite=True).already
    assert json.loads((out / "ferry.json").read_text())["target"]["zarr3"]  # until the end
    finalize(out)
    assert not json.loads((out / "ferry.json").read_text())["target"]["zarr3"]
    convert(source, tmp_path / "whole", Target(zarr3=False))
    assert same(out, tmp_path / "whole")


def test_overwrite_of_another_unfinished_run(tmp_path, source):
    out = tmp_path / "out"
    convert_part(source, out, "0/2")
    result = convert_part(source, out, "0/3", overwrite=True)
    assert not result.already
    assert len(unfinished(maxtext_staging(out)).chunks) == 3


def held_part(source: Path, out: Path, part: str) -> Workspace:
    """A part that is at work, as others see it."""
    job = prepare(source, Target(), memory_budget=1 << 30)
    counts = tuple(
        chunk_count(job.plan, share) for share in shares(job.plan, job.source.tensors, Part.parse(part).count)
    )
    run = Run(identity=job.plan.full_identity, chunk_limit=job.chunk_limit, chunks=counts)
    return Workspace(maxtext_staging(out), run, part=Part.parse(part))


def test_while_a_part_is_at_work(tmp_path, source):
    """Others of its kind may be too, but nobody who needs the place alone."""
    out = tmp_path / "out"
    with held_part(source, out, "0/2"):
        refused(ferry_here("convert", source, out, "--part", "0/2"), "another run of part 0/2 is at work", code=3)
        assert ferry_here("convert", source, out, "--part", "1/2").returncode == 0
        for alone in (
            ("finalize", out),
            ("clean", out),
            ("convert", source, out, "--overwrite"),
            ("convert", source, out, "--part", "1/2", "--no-zarr3", "--overwrite"),
        ):
            refused(ferry_here(*alone), "another run is at work", code=3)
        # what waiting would not help is said at once
        refused(ferry_here("convert", source, out), "in 2 parts")
    assert ferry_here("convert", source, out, "--part", "0/2").returncode == 0
    assert ferry_here("finalize", out).returncode == 0


def test_clean_of_a_split_run(tmp_path, source):
    convert_part(source, tmp_path / "out", "0/2")
    removed = answer(ferry_here("clean", tmp_path / "out", "--json"))["removed"]
    assert removed == [str(tmp_path / "out/.ferry")]
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_data_in_one_part(tmp_path):
    """What it wrote does not count, whatever the others did; they keep theirs."""
    tensors = random_tensors(deepseek_tensors(DEEPSEEK_V3))
    last = max(name for name in tensors if name.startswith("model.layers.2.") and name.endswith("_scale_inv"))
    tensors[last][0, 0] = float("nan")
    source = write_checkpoint(tmp_path / "source", DEEPSEEK_V3, tensors)
    results = [ferry_here("convert", source, tmp_path / "out", "--part", f"{index}/4") for index in range(4)]
    (bad,) = [index for index, result in enumerate(results) if result.returncode]
    refused_line = results[bad].stderr.splitlines()[-1]
    assert results[bad].returncode == 2
    assert last in refused_line
    refused(ferry_here("finalize", tmp_path / "out"), f"part {bad}/4 has not been started")
    good = (bad + 1) % 4
    assert answer(ferry_here("convert", source, tmp_path / "out", "--part", f"{good}/4", "--json"))["already"]
