"""Plans `ferry convert` of a MaxText checkpoint: other layouts of the layers, dtypes, chunks and storage.

The ops of a table are neither applied nor undone: both layouts have the same tiles in different positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from conversion_lib.core.boxes import Shape
from conversion_lib.core.dtypes import itemsize
from conversion_lib.mapping.stored_checkpoint import MaxTextInput
from conversion_lib.mapping.stored_leaves import StoredLeaf
from conversion_lib.mapping.to_maxtext import (
    Leaf,
    is_exact,
    leaf_dtype,
    leaves,
    placing,
    require_a_place_for_every_layer,
)
from conversion_lib.plan.chunking import chunk_shape
from conversion_lib.plan.job import Job
from conversion_lib.plan.ops import Expand, Ops, Squeeze
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.record import Target
from conversion_lib.sources.joined import Dims

CACHE_SHARE = 4
"""Decoded chunks get one part in CACHE_SHARE of the memory budget, which the engine leaves free for them."""

LayerOf = tuple[str, int | None]
"""A rule's weights in one layer: the rule's path in the layer, and the layer's number in the model."""


def prepare_other_layout(given: MaxTextInput, target: Target, chunk_limit: int) -> Job:
    """Plans to write a MaxText checkpoint in another layout.

    Args:
        given: The checkpoint.
        target: The layout to write.
        chunk_limit: The most bytes of a chunk.

    Raises:
        BadInput: As `plan_to_other_layout` raises it.
    """
    identity = given.identity(target=target.model_dump_json())
    return given.job(plan_to_other_layout(given, target, identity, chunk_limit), given.config, chunk_limit)


def plan_to_other_layout(given: MaxTextInput, target: Target, identity: dict[str, str], chunk_limit: int) -> Plan:
    """Makes the plan that writes the leaves of a MaxText checkpoint in another layout.

    Args:
        given: The checkpoint.
        target: The layout to write.
        identity: The plan's identity.
        chunk_limit: The most bytes of a chunk.

    Raises:
        BadInput: As for `MaxTextInput.leaves`, or MaxText's model in the target's layout leaves out a layer.
    """
    require_a_place_for_every_layer(given.family, given.dims, target.scan_layers, given.config)
    tiles = {key: (part, begin) for part in given.leaves() for key, begin in _layers(part)}
    arrays, exact, widened = [], True, 0
    for leaf in leaves(given.family, given.dims, target.scan_layers):
        found = [tiles[key] for key in _keys(leaf)]
        source_chunk = given.source.chunk_shape(found[0][0].info.name)
        array = _array(leaf, found, given.dims, target, chunk_limit, source_chunk)
        infos = [part.info for part, _ in found]
        exact = exact and is_exact(array, infos)
        widened += itemsize(array.dtype) > max(itemsize(info.dtype) for info in infos)
        arrays.append(array)
    return Plan(
        kind="maxtext",
        arrays=tuple(arrays),
        identity=identity,
        exact=exact and (given.record is None or given.record.exact),
        family=given.family.name,
        model_name=given.model_name,
        dropped=_widened_line(widened, target),
    )


def _keys(leaf: Leaf) -> list[LayerOf]:
    return [(leaf.rule.maxtext, layer) for layer in leaf.layers or (None,)]


def _layers(part: StoredLeaf) -> Iterator[tuple[LayerOf, tuple[int, ...]]]:
    """Yields each layer of a leaf and the corner of its tile; all experts of a layer are one tile."""
    corners = [part.placed.corner(expert, index) for _, expert, index in part.leaf.slots() if expert == 0]
    return zip(_keys(part.leaf), corners, strict=True)


def _array(
    leaf: Leaf,
    parts: Sequence[tuple[StoredLeaf, tuple[int, ...]]],
    dims: Dims,
    target: Target,
    limit: int,
    source_chunk: Shape,
) -> ArrayPlan:
    placed = placing(leaf, dims, target.maxtext)
    dtype = leaf_dtype(leaf.rule, [part.info for part, _ in parts], target)
    corners = [placed.corner(expert, index) for _, expert, index in leaf.slots() if expert == 0]
    apart = parts[0][0].placed.layer_axes
    ops: Ops = (*(Squeeze(axis) for axis in reversed(apart)), *(Expand(axis) for axis in placed.layer_axes))
    return ArrayPlan(
        path=leaf.path,
        shape=placed.shape,
        dtype=dtype,
        chunk_shape=chunk_shape(placed.shape, itemsize(dtype), limit, placed.layer_axis, target.shards),
        ops=ops,
        sources=tuple(
            SourceSlice(part.info.name, _layer_shape(part), at, begin)
            for (part, begin), at in zip(parts, corners, strict=True)
        ),
        source_chunk=source_chunk,
    )


def _layer_shape(part: StoredLeaf) -> tuple[int, ...]:
    return tuple(1 if axis in part.placed.layer_axes else extent for axis, extent in enumerate(part.placed.shape))


def _widened_line(count: int, target: Target) -> tuple[str, ...]:
    if not count:
        return ()
    return (f"{count} arrays become {target.save_dtype}, but keep the precision of the checkpoint's own dtype",)
