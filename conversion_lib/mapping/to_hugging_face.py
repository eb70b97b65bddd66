"""Makes a plan that writes a MaxText checkpoint as Hugging Face tensors: a family's table, backwards.

A rule's ops make a tile of a leaf from a tensor, and their inverses make the tensor from the tile. There are two
special cases. If several leaves contain parts of one tensor, such as fused gate and up, all of them fill it. Tensors
that rules use as one (`Join`) are cut apart again, run by run.
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
"""A leaf of at most this many times the chunk limit stays in the cache of decoded chunks, which is twice as large."""

SHORTEST_RUN = 256
"""The fewest contiguous bytes of a file that are worth a separate write."""


@dataclass(frozen=True)
class _Part:
    """The part of a leaf that belongs to one tensor: the tile of `stored` that starts at `begin`."""

    stored: StoredLeaf
    begin: tuple[int, ...]

    @property
    def rule(self) -> Rule:
        return self.stored.leaf.rule

    def source(self, at: tuple[int, ...]) -> SourceSlice:
        return SourceSlice(self.stored.info.name, self.stored.placed.tile, at, self.begin)


@dataclass(frozen=True)
class _Target:
    """Settings for all tensors of an export. `chunk_of` returns the shape of a leaf's stored chunks."""

    dims: Dims
    dtype: Callable[[str], str]
    limit: int
    chunk_of: Callable[[str], Shape]

    def dtype_of(self, name: str, part: _Part) -> str:
        kept = part.rule.keep_float32 and part.stored.info.dtype == "float32"
        return "float32" if kept else self.dtype(name)


def plan_to_hugging_face(
    given: MaxTextInput, dtype: Callable[[str], str], identity: dict[str, str], chunk_limit: int
) -> Plan:
    """Makes the plan that writes the leaves of a MaxText checkpoint as Hugging Face tensors, in layer order.

    Args:
        given: The checkpoint.
        dtype: Returns the dtype to write for a tensor's name. A leaf that was kept in float32, such as a router's bias,
            is written in float32.
        identity: The plan's identity.
        chunk_limit: The most bytes that are written at a time.

    Raises:
        BadInput: As for `MaxTextInput.leaves`.
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
        for name, expert, index in part.leaf.slots():
            tensors.setdefault(name, []).append(_Part(part, part.placed.corner(expert, index)))
    return tensors


def _tensor(name: str, parts: list[_Part], target: _Target) -> ArrayPlan:
    """Plans a tensor that comes from one leaf, or from several with a `Pick` each."""
    part, ops = parts[0], parts[0].stored.placed.ops
    shape = tuple(target.dims[dim] for dim in part.rule.shape)
    if len(parts) == 1:
        chunk = _chunk(name, shape, ops, part, target)
        return _array(name, shape, inverse_chain(ops), (part.source((0,) * len(shape)),), part, chunk, target)
    # the parts of one tensor differ only in their picks
    picks = [next((number, op) for number, op in enumerate(p.stored.placed.ops) if isinstance(op, Pick)) for p in parts]
    before, axis = picks[0][0], picks[0][1].axis
    if not all(isinstance(op, Split) for op in ops[:before]):
        raise AssertionError(f"{part.rule.hf}: only splits may come before a pick")
    # splitting an axis moves no element: the tensor is planned with the split shape
    view = chain_shape(ops[:before], shape)
    sources = tuple(
        other.source(tuple(pick.index if number == axis else 0 for number in range(len(view))))
        for other, (_, pick) in zip(parts, picks, strict=True)
    )
    chunk = _chunk(name, view, ops[before:], part, target)
    return replace(_array(name, view, inverse_chain(ops[before:]), sources, part, chunk, target), stored_shape=shape)


def _cut_apart(name: str, join: Join, part: _Part, target: _Target) -> Iterator[ArrayPlan]:
    """Plans the parts of a joined tensor: each is made from runs of its rows."""
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
        chunk = run_shape((rows, columns), itemsize(target.dtype_of(path, part)), target.limit)
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
    """Plans one tensor. Values of another dtype than the result's are computed in float32 and rounded once."""
    dtype = target.dtype_of(path, part)
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


def _chunk(name: str, shape: Shape, ops: Ops, part: _Part, target: _Target) -> Shape:
    """Returns how the tensor `name`, planned with `shape`, is cut; `ops` lead from it to its tile of the leaf.

    Usually it is cut into long runs of its file. But if a chunk of the leaf has parts of many tensors, and the leaf is
    too large for the cache, each tensor is cut into the parts that come from one chunk. Then a chunk is decoded once,
    and not once for each tensor.
    """
    info, tile, width = part.stored.info, part.stored.placed.tile, itemsize(target.dtype_of(name, part))
    source = target.chunk_of(info.name)
    shared = any(step > extent for step, extent in zip(source, tile, strict=True))
    if not shared or info.nbytes <= KEPT_CHUNKS * target.limit:
        return run_shape(shape, width, target.limit)
    box = tuple((0, min(step, extent)) for step, extent in zip(source, tile, strict=True))
    # the parts of a tensor from several leaves may be interleaved, and are written together
    picked = {op.axis for op in ops[:1] if isinstance(op, Pick)}
    chunk = tuple(
        extent if axis in picked else stop - start
        for axis, (extent, (start, stop)) in enumerate(zip(shape, pull_chain(ops, box, shape), strict=True))
    )
    if run_length(shape, chunk) * width < SHORTEST_RUN:
        return run_shape(shape, width, target.limit)
    return run_shape(chunk, width, target.limit)


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """Returns a sort key that compares numbers in names as numbers, and puts names outside the layers first."""
    return [(len(word), int(word), "") if word.isdigit() else (0, 0, word) for word in re.split(r"(\d+)", name)]


def _resize_lines(part: StoredLeaf, dims: Dims) -> Iterator[str]:
    for op in part.leaf.rule.ops(dims):
        if isinstance(op, Resize):
            yield _resize_line(next(part.leaf.slots())[0], op)


def _resize_line(name: str, op: Resize) -> str:
    if op.after > op.before:
        return (
            f"vocabulary: {name} has {op.before} rows; the {op.after - op.before} rows that MaxText adds are left out"
        )
    return (
        f"vocabulary: {name} has {op.before} rows, but MaxText's model has only {op.after}: "
        f"{op.before - op.after} rows cannot be restored, and are zeros"
    )
