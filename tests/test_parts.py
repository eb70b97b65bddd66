"""Splitting a conversion: who gets what, N workers at once, and finalize at the end of it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib import mapping
from conversion_lib import parts as module
from conversion_lib.boxes import size
from conversion_lib.convert import Options, convert, maxtext_layout, prepare
from conversion_lib.errors import BadInput
from conversion_lib.finalize import finalize
from conversion_lib.parts import Part, chunk_count, shares
from conversion_lib.pieces import Piece, source_order
from conversion_lib.places import LocalPlace
from conversion_lib.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.record import Target
from conversion_lib.sinks import ocdbt
from conversion_lib.sinks.orbax import OrbaxSink
from conversion_lib.workspace import Run, Workspace, read_run
from tests.checkpoints import (
    DEEPSEEK_V3,
    QWEN3,
    Result,
    command,
    ferry_here,
    random_tensors,
    write_checkpoint,
)
from tests.orbax_reader import restore
from tests.sparse_checkpoints import deepseek_tensors, llama_tensors

STORAGES = [(True, True), (True, False), (False, True), (False, False)]


def answer(result: Result, code: int = 0) -> dict:
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


# Parts by name.


@pytest.mark.parametrize(
    ("text", "part"),
    [("0/1", Part(0, 1)), ("1/1", Part(0, 1)), ("0/4", Part(0, 4)), ("3/4", Part(3, 4)), ("4/4", Part(0, 4))],
)
def test_a_part_by_name(text, part):
    assert Part.parse(text) == part


@pytest.mark.parametrize(
    "text", ["", "3", "/", "1/", "/4", "5/4", "-1/4", "0/0", "1/-4", "1/4/2", "a/b", "1.0/4", "²/4"]
)
def test_what_is_no_part(text, tmp_path):
    result = ferry_here("convert", tmp_path, tmp_path / "out", f"--part={text}")
    assert result.returncode == 2
    assert result.stderr.startswith(f"ferry: --part {text}")
    assert result.stderr.count("\n") == 1


# Shares.


def stack(path: str, layers: int, rows: int, chunk_rows: int) -> ArrayPlan:
    """`layers` tensors of (rows, 8) float32, stacked on axis 0; a chunk is some rows of one."""
    sources = tuple(SourceSlice(f"{path}.{layer}", (1, rows, 8), (layer, 0, 0)) for layer in range(layers))
    return ArrayPlan(path, (layers, rows, 8), "float32", (1, chunk_rows, 8), (), sources)


def plan_of(arrays: list[tuple[int, int, int]]) -> tuple[Plan, list[str]]:
    """A plan, and its source's tensors: layer by layer, as files have them."""
    plans = tuple(stack(f"a{number}", *sizes) for number, sizes in enumerate(arrays))
    names = [source.tensor for array in plans for source in array.sources]
    return Plan(kind="maxtext", arrays=plans, identity={}), sorted(names, key=lambda name: int(name.split(".")[1]))


def nbytes(plan: Plan, share: list[Piece]) -> int:
    return sum(size(unit.box) * 4 for unit in share)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4),
    st.integers(1, 9),
)
def test_shares_are_the_whole_and_balanced(arrays, count):
    plan, names = plan_of([(layers, rows, min(chunk, rows)) for layers, rows, chunk in arrays])
    given_out = shares(plan, names, count)
    assert len(given_out) == count
    chunks = [
        (unit.array, chunk)
        for share in given_out
        for unit in share
        for chunk in plan.arrays[unit.array].chunks_in(unit.box)
    ]
    assert len(set(chunks)) == len(chunks)  # none twice
    assert sum(chunk_count(plan, share) for share in given_out) == len(chunks)
    assert sum(nbytes(plan, share) for share in given_out) == plan.bytes_out
    largest_unit = max(nbytes(plan, [unit]) for share in given_out for unit in share)
    assert max(nbytes(plan, share) for share in given_out) <= plan.bytes_out / count + largest_unit
    key = source_order(plan, names)
    order = [key(unit) for share in given_out for unit in share]
    assert order == sorted(order)  # each reads its own stretch of the source


def test_more_parts_than_work():
    plan, names = plan_of([(1, 4, 4)])
    given_out = shares(plan, names, 5)
    assert sorted(chunk_count(plan, share) for share in given_out) == [0, 0, 0, 0, 1]


def test_a_share_follows_from_plan_and_count_alone(tmp_path, monkeypatch):
    """Whatever the memory and threads of a worker: only the limit of a chunk, which all of a run share, matters."""
    source = deepseek(tmp_path / "source")
    monkeypatch.setattr(module, "UNIT_BYTES", 1 << 12)
    jobs = [prepare(source, Target(), memory_budget=budget, chunk_limit=1 << 11) for budget in (64 << 20, 8 << 30)]
    small, large = (shares(job.plan, job.source.tensors, 3) for job in jobs)
    assert small == large
    assert all(small)


# Workers one after the other, in this process.


def deepseek(directory: Path) -> Path:
    return write_checkpoint(directory, DEEPSEEK_V3, random_tensors(deepseek_tensors(DEEPSEEK_V3)), shards=3)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return deepseek(tmp_path_factory.mktemp("source") / "fp8")


def convert_part(source: Path, out: Path, part: str, target: Target = Target(), **options):
    return convert(source, out, target, options=Options(part=Part.parse(part), **options))


def same(a: Path, b: Path) -> bool:
    return answer(ferry_here("compare", a, b, "--json"))["same"]


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
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "ferry.json", "hf"]


def test_one_part_is_the_whole_without_its_commit(tmp_path, source):
    """So a run of the whole goes on with it, and commits."""
    convert_part(source, tmp_path / "out", "1/1")
    assert not (tmp_path / "out/0").exists()
    assert convert(source, tmp_path / "out", Target()).pieces == 0
    assert (tmp_path / "out/0/items").is_dir()


# What does not go together.


def refused(result: Result, *words: str, code: int = 2) -> str:
    assert result.returncode == code, result.stderr
    assert result.stderr.startswith("ferry: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
    return result.stderr


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
    total = read_run(maxtext_layout(out)).chunks[2]
    line = json.loads(journal.read_text())
    journal.write_text(json.dumps({"pieces": line["pieces"][:2]}) + "\n")
    refused(ferry_here("finalize", out), f"part 2/3 has {total - 2} of {total} chunks to go")
    assert not (out / "0").exists()
    result = convert_part(source, out, "2/3")
    assert (result.pieces, result.pieces_skipped) == (total - 2, 2)
    finalize(out)


def test_an_empty_part_need_not_be_started(tmp_path, source):
    counts = None
    for index in range(40):
        result = convert_part(source, tmp_path / "out", f"{index}/40")
        counts = read_run(maxtext_layout(tmp_path / "out")).chunks
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
        stores = [ocdbt.store(LocalPlace(path), ts.Context()) for path in items.glob("ocdbt.process_*")]
        holders = [store for store in stores if store.read(key).result().state == "value"]
        assert len(holders) == 1
        holders[0].write(key, None).result()
    else:
        (items / key).unlink()
    with pytest.raises(BadInput, match=r"params/params/decoder/decoder_norm/scale lacks its chunk \(0,\)"):
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
    assert len(read_run(maxtext_layout(out)).chunks) == 3


def held_part(source: Path, out: Path, part: str) -> Workspace:
    """A part that is at work, as others see it."""
    job = prepare(source, Target(), memory_budget=1 << 30)
    counts = tuple(
        chunk_count(job.plan, share) for share in shares(job.plan, job.source.tensors, Part.parse(part).count)
    )
    run = Run(identity=job.plan.full_identity, chunk_limit=job.chunk_limit, chunks=counts)
    return Workspace(maxtext_layout(out), run, part=Part.parse(part))


def test_while_a_part_is_at_work(tmp_path, source):
    """Others of its kind may be too, but nobody who needs the place alone."""
    out = tmp_path / "out"
    with held_part(source, out, "0/2"):
        refused(ferry_here("convert", source, out, "--part", "0/2"), "part 0/2 is at work", code=3)
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


# Real processes, at once; and kills.


def qwen(directory: Path) -> Path:
    """24 MB and more in one array, so that budgets would cut its chunks differently, and there is time for a kill."""
    config = QWEN3 | {"vocab_size": 12_011, "hidden_size": 1024}
    return write_checkpoint(directory, config, random_tensors(llama_tensors(config)), shards=4)


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    return qwen(tmp_path_factory.mktemp("large") / "qwen3")


@pytest.mark.parametrize(
    "options", [(), ("--pathways", "--no-scan-layers")], ids=["ocdbt-scanned", "pathways-unscanned"]
)
def test_four_processes_at_once(tmp_path, large, options):
    """They begin at the same moment, with other memory and threads each, and agree on chunks and shares."""
    out = tmp_path / "out"
    budgets = ["64MiB", "96MiB", "512MiB", "2GiB"]
    workers = [
        subprocess.Popen(
            [*command("convert", large, out, *options, *part), "--memory-budget", budget, "--threads", str(index + 1)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index, budget in enumerate(budgets)
        for part in [("--part", f"{index}/4", "--json")]
    ]
    results = [worker.communicate(timeout=120) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 4, results
    assert {json.loads(stdout)["already"] for stdout, _ in results} == {False}
    noted = read_run(maxtext_layout(out))
    assert noted is not None
    done = answer(ferry_here("finalize", out, "--json"))
    assert done["chunks"] == sum(noted.chunks)
    assert ferry_here("convert", large, tmp_path / "whole", *options).returncode == 0
    assert same(out, tmp_path / "whole")
    assert not list(out.rglob("*.__lock"))
    (embedding,) = [leaf for leaf in leaves(out) if leaf["path"].endswith("token_embedder/embedding")]
    chunk = embedding["chunk_shape"]
    assert chunk[0] * chunk[1] * 2 <= noted.chunk_limit


def leaves(checkpoint: Path) -> list[dict]:
    return answer(ferry_here("inspect", checkpoint, "--json"))["leaves"]


def test_a_killed_part_goes_on(tmp_path, large):
    out = tmp_path / "out"
    arguments = command("convert", large, out, "--json", "--save-dtype", "float32", "--memory-budget", "64MiB")
    arguments += ["--threads", "1", "--part"]
    process = subprocess.Popen([*arguments, "1/2"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = out / ".ferry/journal-1.jsonl"
    while process.poll() is None and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL

    others = json.loads(subprocess.run([*arguments, "0/2"], capture_output=True, check=True, timeout=60).stdout)
    assert others["pieces_skipped"] == 0
    refused(ferry_here("finalize", out), "part 1/2 has", "chunks to go")
    again = json.loads(subprocess.run([*arguments, "1/2"], capture_output=True, check=True, timeout=60).stdout)
    assert again["pieces_skipped"] > 0
    assert again["pieces"] > 0
    assert ferry_here("finalize", out).returncode == 0
    whole = ferry_here("convert", large, tmp_path / "whole", "--save-dtype", "float32")
    assert whole.returncode == 0
    assert same(out, tmp_path / "whole")
    assert not list(out.rglob("*.__lock"))
    sizes = [
        sum(path.stat().st_size for path in root.rglob("*") if path.is_file()) for root in (out, tmp_path / "whole")
    ]
    assert sizes[0] < 1.1 * sizes[1], "what the kill left is swept"


KILLED = """
import os, shutil, signal, sys
left = int(sys.argv.pop(1))
def deadly(function):
    def called(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return called
from conversion_lib.sinks import ocdbt
for owner, names in ((os, ("rename", "replace")), (shutil, ("rmtree",)), (ocdbt, ("merge", "sweep"))):
    for name in names:
        setattr(owner, name, deadly(getattr(owner, name)))
from conversion_lib.cli import main
main()
"""
"""`ferry`, killed before the nth of the calls that change what others see."""


@pytest.mark.parametrize(("replacing", "first"), [(True, 0), (False, 5)], ids=["replacing", "fresh"])
def test_a_kill_at_any_moment_of_finalize(tmp_path, source, replacing, first):
    """Run again, it makes the new checkpoint, whether there was an old one or not."""
    prepared, target = tmp_path / "prepared", ("--no-zarr3",)
    if replacing:
        assert ferry_here("convert", source, prepared).returncode == 0
    for part in ("0/2", "1/2"):
        assert ferry_here("convert", source, prepared, "--part", part, *target, "--overwrite").returncode == 0
    assert ferry_here("convert", source, tmp_path / "whole", *target).returncode == 0
    for calls in range(first, 100):  # up to the fifth the two are the same
        out = tmp_path / f"killed-{calls}"
        shutil.copytree(prepared, out)
        ended = subprocess.run(
            [sys.executable, "-c", KILLED, str(calls), "finalize", str(out)],
            capture_output=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(Path.cwd())},
        )
        if ended.returncode == 0:
            break
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert ferry_here("finalize", out).returncode == 0
        assert same(out, tmp_path / "whole")
        assert sorted(path.name for path in out.iterdir()) == ["0", "ferry.json", "hf"]
        assert not json.loads((out / "ferry.json").read_text())["target"]["zarr3"]
        assert (out / "hf/config.json").exists()
    assert calls >= (12 if replacing else 9)
