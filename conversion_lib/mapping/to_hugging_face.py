"""From a MaxText checkpoint to a plan that writes Hugging Face tensors: a family's table, read backwards.

A rule's ops make a tile of a leaf from a tensor; their inverses make the tensor from the tile. Two things go further:
a tensor that several leaves took a part of (gate and up in one) is filled by all of them, and tensors that rules took
as one (`Join`) are cut out of it again, run by run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

from conversion_lib.core.boxes import Shape, box_shape, shift
from conversion_lib.core.dtypes import itemsize
from conversion_lib.mapping.rules import Rule
from conversion_lib.mapping.stored_checkpoint import MaxTextInput
from conversion_lib.mapping.stored_leaves import StoredLeaf
from conversion_lib.mapping.to_maxtext import is_exact
from conversion_lib.plan.chunking import run_length, run_shape
from conversion_lib.plan.ops import Ops, Pick, Split, chain_shape, inverse_chain, pull_chain
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.plan.value_ops import Resize
from conversion_lib.sources.joined import Dims, Join

KEPT_CHUNKS = 2
"""So many times the largest chunk that is written, half of what is kept of decoded chunks, a leaf may be to be kept."""

SHORTEST_RUN = 256
"""Bytes in one run of a file that are worth a write of their own."""


@dataclass(frozen=True)
class _Part:
    """What one leaf gives to one tensor: the tile of `leaf` that begins at `begin`."""

    stored: StoredLeaf
    begin: tuple[int, ...]

    @property
    def rule(self) -> Rule:
        return self.stored.leaf.rule

    def source(self, at: tuple[int, ...]) -> SourceSlice:
        return SourceSlice(self.stored.info.name, self.stored.placed.tile, at, self.begin)


@dataclass(frozen=True)
class _Target:
    """What the tensors of one export share. chunk_of: the shape of the chunks that a leaf is stored in."""

    dims: Dims
    dtype: str
    limit: int
    chunk_of: Callable[[str], Shape]

    def dtype_of(self, part: _Part) -> str:
        kept = part.rule.keep_float32 and part.stored.info.dtype == "float32"
        return "float32" if kept else self.dtype


def plan_to_hugging_face(given: MaxTextInput, dtype: str, identity: dict[str, str], chunk_limit: int) -> Plan:
    """The plan that writes the leaves of `given` as Hugging Face tensors of `dtype`, in the order of the layers.

    chunk_limit: bytes of a piece at most.
    A leaf that was kept in float32 for its precision, such as a router's bias, is written in float32.
    Raises BadInput where the leaves are not as `given.leaves` must find them.
    """
    stored = given.leaves()
    arrays, target = [], _Target(given.dims, dtype, chunk_limit, given.source.chunk_shape)
    for name, parts in _parts_by_tensor(stored).items():
        join = next((join for join in given.family.joins if name.endswith("." + join.name)), None)
        if join is None:
            arrays.append(_tensor(name, parts, target))
        else:
            arrays += _cut_apart(name, join, parts[0], target)
    arrays.sort(key=lambda array: _in_order(array.path))
    lines = dict.fromkeys(line for part in stored for line in _resize_lines(part, given.dims))
    infos = {part.info.name: part.info for part in stored}
    return Plan(
        kind="safetensors",
        arrays=tuple(arrays),
        identity=identity,
        exact=all(is_exact(array, [infos[source.tensor] for source in array.sources]) for array in arrays),
        family=given.family.name,
        model_name=given.model_name,
        dropped=tuple(lines),
    )


def _parts_by_tensor(stored: Iterable[StoredLeaf]) -> dict[str, list[_Part]]:
    tensors: dict[str, list[_Part]] = {}
    for part in stored:
        for name, expert, place in part.leaf.slots():
            tensors.setdefault(name, []).append(_Part(part, part.placed.corner(expert, place)))
    return tensors


def _tensor(name: str, parts: list[_Part], target: _Target) -> ArrayPlan:
    """A tensor that one leaf makes, or that several do by a `Pick` each."""
    part, ops = parts[0], parts[0].stored.placed.ops
    shape = tuple(target.dims[dim] for dim in part.rule.shape)
    if len(parts) == 1:
        chunk = _chunk(shape, ops, part, target)
        return _array(name, shape, inverse_chain(ops), (part.source((0,) * len(shape)),), part, chunk, target)
    # the parts of one tensor differ in what they pick alone
    picks = [next((place, op) for place, op in enumerate(p.stored.placed.ops) if isinstance(op, Pick)) for p in parts]
    place, axis = picks[0][0], picks[0][1].axis
    if not all(isinstance(op, Split) for op in ops[:place]):
        raise AssertionError(f"{part.rule.hf}: only splits can stand before a pick")
    # splitting an axis moves no element: the tensor is written as one of the shape with axes apart
    view = chain_shape(ops[:place], shape)
    sources = tuple(
        other.source(tuple(pick.index if number == axis else 0 for number in range(len(view))))
        for other, (_, pick) in zip(parts, picks, strict=True)
    )
    chunk = _chunk(view, ops[place:], part, target)
    return replace(_array(name, view, inverse_chain(ops[place:]), sources, part, chunk, target), stored_shape=shape)


def _cut_apart(name: str, join: Join, part: _Part, target: _Target) -> Iterator[ArrayPlan]:
    """The tensors that rules take as one: each is made of runs of the joined tensor's rows."""
    placed, columns = part.stored.placed, target.dims[part.rule.shape[1]]
    ops = inverse_chain(placed.ops)
    sources: dict[int, list[SourceSlice]] = {number: [] for number in range(len(join.parts))}
    top = 0
    for number, start, stop in join.rows(target.dims):
        run = ((top, top + stop - start), (0, columns))
        top += stop - start
        box = pull_chain(ops, run, placed.tile)
        begin = tuple(first for first, _ in shift(box, part.begin))
        sources[number].append(SourceSlice(part.stored.info.name, box_shape(box), (start, 0), begin))
    for number, runs in sources.items():
        rows = sum(chain_shape(ops, run.shape)[0] for run in runs)
        path = name.removesuffix(join.name) + join.parts[number]
        chunk = run_shape((rows, columns), itemsize(target.dtype_of(part)), target.limit)
        yield _array(path, (rows, columns), ops, tuple(runs), part, chunk, target)


def _array(
    path: str,
    shape: Shape,
    ops: Ops,
    sources: tuple[SourceSlice, ...],
    part: _Part,
    chunk: Shape,
    target: _Target,
) -> ArrayPlan:
    """Values of another dtype than the result's are computed in float32 and rounded once."""
    dtype = target.dtype_of(part)
    return ArrayPlan(
        path=path,
        shape=shape,
        dtype=dtype,
        chunk_shape=chunk,
        ops=ops,
        sources=sources,
        ops_dtype=dtype if part.stored.info.dtype == dtype else "float32",
        source_chunk=target.chunk_of(part.stored.info.name),
    )


def _chunk(shape: Shape, ops: Ops, part: _Part, target: _Target) -> Shape:
    """How a tensor of `shape` is cut; `ops` are those from it to its tile of the leaf.

    In long runs, as its file has it. But where a chunk of the leaf holds parts of many tensors, and the leaf is too
    large to keep, in what one chunk makes of each: then a chunk is decoded once, not once for each of them.
    """
    info, tile, width = part.stored.info, part.stored.placed.tile, itemsize(target.dtype_of(part))
    source = target.chunk_of(info.name)
    shared = any(step > extent for step, extent in zip(source, tile, strict=True))
    if not shared or info.nbytes <= KEPT_CHUNKS * target.limit:
        return run_shape(shape, width, target.limit)
    box = tuple((0, min(step, extent)) for step, extent in zip(source, tile, strict=True))
    # the parts of a tensor that several leaves make, which may lie interleaved, are written together
    picked = {op.axis for op in ops[:1] if isinstance(op, Pick)}
    chunk = tuple(
        extent if axis in picked else stop - start
        for axis, (extent, (start, stop)) in enumerate(zip(shape, pull_chain(ops, box, shape), strict=True))
    )
    if run_length(shape, chunk) * width < SHORTEST_RUN:
        return run_shape(shape, width, target.limit)
    return run_shape(chunk, width, target.limit)


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts names with their numbers as numbers, what stands outside the layers first."""
    return [(len(word), int(word), "") if word.isdigit() else (0, 0, word) for word in re.split(r"(\d+)", name)]


def _resize_lines(part: StoredLeaf, dims: Dims) -> Iterator[str]:
    for op in part.leaf.rule.ops(dims):
        if isinstance(op, Resize):
            yield _resize_line(next(part.leaf.slots())[0], op)


def _resize_line(name: str, op: Resize) -> str:
    if op.after > op.before:
        return (
            f"vocabulary: {name} gets its {op.before} rows; the {op.after - op.before} that MaxText adds are left out"
        )
    return (
        f"vocabulary: {name} has {op.before} rows, of which MaxText's model has {op.after}: "
        f"{op.before - op.after} rows cannot be restored, and are zeros"
    )
