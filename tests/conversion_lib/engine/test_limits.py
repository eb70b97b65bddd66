"""How a memory budget is shared out."""

from __future__ import annotations

import pytest

from conversion_lib.engine.limits import IN_FLIGHT, Limits, makers
from conversion_lib.errors import BadInput
from conversion_lib.plan.ops import Transpose
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice

MIB, GIB = 1 << 20, 1 << 30


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_a_budget_is_shared_out_within_itself(threads):
    limits = Limits.of(2 * GIB, threads)
    assert limits.buffers <= 1 * GIB
    assert makers(threads) * limits.piece <= limits.buffers
    assert limits.group <= limits.buffers


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize("budget", [64 * MIB, 512 * MIB, 2 * GIB, 64 * GIB])
def test_what_a_run_takes_is_within_the_budget(budget, threads):
    """But for bands, of which there are a few for each thread whatever the budget."""
    assert Limits.of(budget, threads).resident <= budget + Limits.of(budget, threads).bands


def test_a_budget_that_is_too_small_says_the_least():
    with pytest.raises(BadInput, match="64MiB"):
        Limits.of(1 << 20, 2)


def plan_of(rows: int, columns: int) -> Plan:
    """One matrix in bfloat16, transposed, in chunks of 256 of its columns."""
    source = SourceSlice("t", (rows, columns), (0, 0))
    array = ArrayPlan("a", (columns, rows), "bfloat16", (min(columns, 256), rows), (Transpose(),), (source,))
    return Plan(kind="maxtext", arrays=(array,), identity={})


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_a_large_budget_is_not_filled_for_its_own_sake(threads):
    small, large = (Limits.for_plan(plan_of(4096, 4096), budget, threads) for budget in (64 * GIB, 1024 * GIB))
    assert small.buffers == large.buffers == threads * IN_FLIGHT


def test_a_small_budget_is_kept_to():
    limits = Limits.for_plan(plan_of(4096, 4096), 64 * MIB, 16)
    assert limits == Limits.of(64 * MIB, 16)


def test_large_pieces_have_room_for_two_with_each_maker():
    """A piece is read in long runs, so that it is the whole matrix here: 2 GiB."""
    limits = Limits.for_plan(plan_of(32768, 32768), 64 * GIB, 2)
    assert limits.buffers == 2 * 2 * 2 * GIB
