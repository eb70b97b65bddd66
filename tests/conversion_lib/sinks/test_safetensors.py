"""Boxes of tensors in safetensors files: what is written in any cut, in any order, is the tensor."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from conversion_lib.core.boxes import slices
from conversion_lib.plan.chunking import run_length, run_shape
from conversion_lib.plan.pieces import cut, whole_arrays
from conversion_lib.plan.plan import ArrayPlan, Plan
from conversion_lib.sinks.safetensors import SafetensorsSink
from conversion_lib.sources.safetensors import SafetensorsSource
from conversion_lib.sources.weight_files import SINGLE_NAME

SHAPES = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


def plan_of(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Plan:
    array = ArrayPlan("tensor", shape, "float32", chunk, (), (), source_chunk=shape)
    return Plan("safetensors", (array,), {})


@settings(deadline=None)
@given(SHAPES, st.data())
def test_boxes_make_up_the_tensor(shape: tuple[int, ...], data: st.DataObject):
    chunk = tuple(data.draw(st.integers(1, extent)) for extent in shape)
    plan = plan_of(shape, chunk)
    values = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    with tempfile.TemporaryDirectory() as directory:
        sink = SafetensorsSink(Path(directory), plan, {"tensor": SINGLE_NAME})
        sink.open()
        for piece in data.draw(st.permutations(cut(plan, whole_arrays(plan), 1 << 20))):
            sink.write(piece.array, piece.box, np.ascontiguousarray(values[slices(piece.box)])).wait()
        sink.finish()
        np.testing.assert_array_equal(SafetensorsSource(Path(directory)).read("tensor"), values)


@given(SHAPES, st.integers(1, 400))
def test_a_run_is_as_long_as_allowed(shape: tuple[int, ...], limit: int):
    box = run_shape(shape, 4, limit)
    assert run_length(shape, box) == math.prod(box)
    nbytes = 4 * math.prod(box)
    assert nbytes <= max(limit, 4)
    wider = [math.prod(box) // step * min(step + 1, extent) for step, extent in zip(box, shape, strict=True)]
    grown = [4 * size for size in wider if 4 * size > nbytes]
    assert nbytes == 4 * math.prod(shape) or limit < 4 or min(grown, default=limit + 1) > limit
