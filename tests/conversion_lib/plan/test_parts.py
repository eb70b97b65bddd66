"""Parts of a conversion: their names, and who gets what."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.conversions.convert import prepare
from conversion_lib.core.boxes import size
from conversion_lib.plan import parts as module
from conversion_lib.plan.parts import Part, chunk_count, shares
from conversion_lib.plan.pieces import Piece, source_order
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.record import Target
from tests.conversion_lib.conversions.test_parts_together import deepseek
from tests.support.checkpoints import ferry_here

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
