"""From a family's table to a plan: everything that headers and a config can tell is checked here.

Errors name the tensor, its file, what was expected and what to do; nothing has been written by then.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from conversion_lib.core.boxes import Shape
from conversion_lib.core.dtypes import FLOATS, itemsize
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.mapping.rules import Block, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.chunking import chunk_shape
from conversion_lib.plan.ops import Expand, Ops, chain_shape
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.plan.value_ops import Resize
from conversion_lib.record import Target
from conversion_lib.sources.joined import Dims

ROOT = "params/params"

TABLE_PREFIX = "model."
"""What the names of a table begin with; a checkpoint may have another of the family's prefixes there."""

# significant bits and exponent bits: a dtype holds another's values where it has no fewer of both
_PRECISION = {"bfloat16": (8, 8), "float16": (11, 5), "float32": (24, 8), "float64": (53, 11)}


Slot = tuple[str, int, tuple[int, ...]]
"""A tensor's name, its expert, its layer's place in the stack."""


@dataclass(frozen=True)
class Leaf:
    """One MaxText leaf: a rule applied to one or many layers and experts.

    prefix: what the checkpoint's names have where the tables say `model.`.
    layers: the numbers of its layers in the checkpoint, in the order of the stack; None outside the blocks.
    stack: how the layers are stacked: along one axis, along two (cycles, layers of each), or not at all.
    """

    path: str
    rule: Rule
    prefix: str
    block: Block | None = None
    layers: tuple[int, ...] | None = None
    stack: Shape = ()
    experts: int | None = None

    def slots(self) -> Iterator[Slot]:
        """Each tensor of the leaf: its name, its expert, its layer's place in the stack."""
        places = itertools.product(*(range(extent) for extent in self.stack))
        for place, layer in zip(places, self.layers if self.layers is not None else (None,), strict=True):
            before = "" if layer is None else f"{TABLE_PREFIX}layers.{layer}."
            for expert in range(self.experts or 1):
                yield in_checkpoint(before + self.rule.hf.replace("{expert}", str(expert)), self.prefix), expert, place


@dataclass(frozen=True)
class Placing:
    """How a leaf is made of its tensors: `ops` make a tile of each, and tiles fill the leaf, which has `shape`.

    tile: the shape of one; it has size 1 on every axis that layers or experts are stacked on.
    layer_axes: the axes that layers are stacked on, from the first.
    """

    ops: Ops
    tile: Shape
    shape: Shape
    layer_axes: tuple[int, ...]
    of_experts: bool

    @property
    def layer_axis(self) -> int | None:
        return self.layer_axes[0] if self.layer_axes else None

    def corner(self, expert: int, place: tuple[int, ...]) -> tuple[int, ...]:
        """Where the tile of an expert and of a layer, by its place in the stack, begins in the leaf."""
        at = [0] * len(self.shape)
        for axis, layer in zip(self.layer_axes, place, strict=True):
            at[axis] = layer
        if self.of_experts:
            at[0] = expert
        return tuple(at)


def placing(leaf: Leaf, dims: Dims, maxtext: str) -> Placing:
    """How `leaf` is made for that MaxText. Raises BadInput where an op does not fit the tensors' shape."""
    stacked = dict(enumerate(leaf.stack, start=leaf.rule.scan_axis[maxtext]))
    layer_axes = tuple(stacked)
    if leaf.experts is not None:
        stacked[0] = leaf.experts
    ops: Ops = (*leaf.rule.ops(dims), *(Expand(axis) for axis in sorted(stacked)))
    try:
        tile = chain_shape(ops, tuple(dims[name] for name in leaf.rule.shape))
    except BadInput as error:
        raise BadInput(f"tensor {next(leaf.slots())[0]} cannot become {leaf.path}: {error}") from None
    shape = tuple(stacked.get(axis, extent) for axis, extent in enumerate(tile))
    return Placing(ops, tile, shape, layer_axes, leaf.experts is not None)


def in_checkpoint(name: str, prefix: str) -> str:
    """A table's name as a checkpoint with `prefix` has it."""
    return prefix + name.removeprefix(TABLE_PREFIX) if name.startswith(TABLE_PREFIX) else name


def in_table(name: str, prefix: str) -> str:
    """A checkpoint's name as the tables have it."""
    return TABLE_PREFIX + name.removeprefix(prefix) if name.startswith(prefix) else name


def prefix_of(tensors: Iterable[str], family: Family) -> str:
    """The one of the family's prefixes that a checkpoint of these names has; the first where it has none of them."""
    names = set(tensors)
    return next((p for p in family.prefixes if f"{p}embed_tokens.weight" in names), family.prefixes[0])


def leaves(family: Family, dims: Dims, scan_layers: bool, prefix: str = TABLE_PREFIX) -> Iterator[Leaf]:
    """Every leaf of the MaxText tree, in the table's order."""
    for rule in family.rules:
        if rule.holds(dims):
            yield Leaf(f"{ROOT}/{rule.maxtext}", rule, prefix)
    for block in family.scanned if scan_layers else family.unscanned:
        layers = block.layers(dims)
        for rule in block.rules:
            if not layers or not rule.holds(dims):
                continue
            experts = dims["experts"] if "{expert}" in rule.hf else None
            if block.stacked:
                path = f"{ROOT}/decoder/{block.name}/{rule.maxtext}"
                yield Leaf(path, rule, prefix, block, layers, block.stack(dims), experts)
                continue
            for place, layer in enumerate(layers):
                path = f"{ROOT}/decoder/{block.name.format(place=place, layer=layer)}/{rule.maxtext}"
                yield Leaf(path, rule, prefix, block, (layer,), (), experts)


def dims_of(family: Family, config: ModelConfig, tensors: Iterable[str]) -> Dims:
    """The sizes and switches of one checkpoint: what its config says and what its names show."""
    names = list(tensors)
    flags = {dim: int(any(name.endswith(flag.suffix) for name in names)) for dim, flag in family.detected.items()}
    return {**family.dims(config), **flags}


def plan_to_maxtext(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    family: Family,
    target: Target,
    *,
    identity: dict[str, str],
    model_name: str,
    chunk_limit: int,
) -> Plan:
    """The plan that writes `tensors` as a MaxText checkpoint, `chunk_limit` bytes a chunk at most.

    Raises BadInput for a missing tensor, one that no rule takes, a wrong shape, a dtype that is no float.
    """
    dims = dims_of(family, config, tensors)
    require_a_place_for_every_layer(family, dims, target.scan_layers, config)
    prefix = prefix_of(tensors, family)
    arrays, taken, exact, resized = [], set[str](), True, []
    for leaf in leaves(family, dims, target.scan_layers, prefix):
        slots = list(leaf.slots())
        expected = tuple(dims[dim] for dim in leaf.rule.shape)
        found = [_checked(tensors, name, leaf, expected, config) for name, _, _ in slots]
        taken.update(info.name for info in found)
        array = _array(leaf, slots, found, dims, target, chunk_limit)
        exact = exact and is_exact(array, found)
        resized += [_resize_line(found[0].name, op) for op in array.ops if isinstance(op, Resize)]
        arrays.append(array)
    dropped = _drop_or_refuse(tensors, taken, family, dims, config, prefix)
    return Plan(
        kind="maxtext",
        arrays=tuple(arrays),
        identity=identity,
        exact=exact,
        family=family.name,
        model_name=model_name,
        dropped=(*dropped, *resized),
    )


def require_a_place_for_every_layer(family: Family, dims: Dims, scan_layers: bool, config: ModelConfig) -> None:
    """Raises BadInput where MaxText's model would leave layers out: some are scanned in whole cycles only."""

    def without_place(blocks: tuple[Block, ...]) -> list[int]:
        return sorted(set(range(dims["layers"])) - {layer for block in blocks for layer in block.layers(dims)})

    if scan_layers and not family.scanned:
        raise BadInput(f"{config.path}: MaxText has {family.name} unscanned only: --no-scan-layers")
    left = without_place(family.scanned if scan_layers else family.unscanned)
    if not left:
        return
    cure = "; --no-scan-layers takes them" if scan_layers and not without_place(family.unscanned) else ""
    raise BadInput(
        f"{config.path}: num_hidden_layers = {dims['layers']}, but MaxText's {family.name} "
        f"{'scanned' if scan_layers else 'unscanned'} has no place for layers from {left[0]} on{cure}"
    )


def _resize_line(name: str, op: Resize) -> str:
    if op.after > op.before:
        change = f"{op.after - op.before} rows of zeros are added"
    else:
        change = f"its last {op.before - op.after} rows are left out"
    return f"vocabulary: {name} has {op.before} rows, MaxText's model {op.after}; {change}"


def _array(
    leaf: Leaf, slots: Sequence[Slot], found: list[TensorInfo], dims: Dims, target: Target, chunk_limit: int
) -> ArrayPlan:
    try:
        placed = placing(leaf, dims, target.maxtext)
    except BadInput as error:
        raise BadInput(f"{found[0].file}: {error}") from None
    dtype = leaf_dtype(leaf.rule, found, target)
    return ArrayPlan(
        path=leaf.path,
        shape=placed.shape,
        dtype=dtype,
        chunk_shape=chunk_shape(placed.shape, itemsize(dtype), chunk_limit, placed.layer_axis, target.shards),
        ops=placed.ops,
        sources=tuple(
            SourceSlice(info.name, info.shape, placed.corner(expert, place))
            for info, (_, expert, place) in zip(found, slots, strict=True)
        ),
    )


def leaf_dtype(rule: Rule, found: Iterable[TensorInfo], target: Target) -> str:
    """What a leaf that is made of `found` is stored as."""
    keep = rule.keep_float32 and all(info.dtype == "float32" for info in found)
    return "float32" if keep or rule.always_float32 else target.save_dtype


def is_exact(array: ArrayPlan, found: Iterable[TensorInfo]) -> bool:
    """Whether the array keeps the bits of what it is made of, up to ops that can be undone."""
    mantissa, exponent = _PRECISION[array.dtype]
    fits = all(_PRECISION[kind][0] <= mantissa and _PRECISION[kind][1] <= exponent for kind in {i.dtype for i in found})
    return fits and all(op.exact(array.dtype) for op in array.ops)


def _checked(
    tensors: Mapping[str, TensorInfo], name: str, leaf: Leaf, expected: Shape, config: ModelConfig
) -> TensorInfo:
    info = tensors.get(name)
    if info is None:
        raise BadInput(f"tensor {name} is missing: {leaf.path} is made of it{_because(leaf.block, config)}")
    if info.shape != expected:
        meaning = ", ".join(leaf.rule.shape)
        raise BadInput(
            f"{info.file}: tensor {name} has shape {list(info.shape)}, "
            f"but {config.path} makes it {list(expected)} ({meaning})"
        )
    if info.dtype not in FLOATS:
        raise BadInput(
            f"{info.file}: tensor {name} has dtype {info.dtype}, expected one of {', '.join(sorted(FLOATS))}"
        )
    return info


def _because(block: Block | None, config: ModelConfig) -> str:
    if block is None or block.because is None:
        return ""
    return f"; {config.path} says {block.because} = {config.get(block.because)}, which may not fit the names found"


def _drop_or_refuse(
    tensors: Mapping[str, TensorInfo], taken: set[str], family: Family, dims: Dims, config: ModelConfig, prefix: str
) -> list[str]:
    """One line for each drop that found something. Raises BadInput for a tensor that neither rule nor drop takes."""
    counts: dict[str, int] = {}
    unknown = []
    for name in tensors:
        if name in taken:
            continue
        drop = _drop_for(name, tensors, family, dims, prefix)
        if drop is None:
            unknown.append(name)
        else:
            counts[drop] = counts.get(drop, 0) + 1
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise BadInput(
            f"{tensors[unknown[0]].file}: tensor {unknown[0]}{more} is taken by no rule of family "
            f"{family.name}{_why_left_over(in_table(unknown[0], prefix), family, dims, config)}"
        )
    reasons = {drop.name: drop.reason for drop in family.drops}
    return [f"{name}: {count} tensors left out; {reasons[name]}" for name, count in counts.items()]


def _why_left_over(name: str, family: Family, dims: Dims, config: ModelConfig) -> str:
    """The config key that may not fit the names, for a layer's tensor."""
    match = re.match(r"model\.layers\.(\d+)\.", name)
    if match is None:
        return ""
    if int(match[1]) >= dims["layers"]:
        return f"; {config.path} says num_hidden_layers = {dims['layers']}, which may not fit the names found"
    return _because(next((block for block in family.scanned if block.because), None), config)


def _drop_for(name: str, tensors: Mapping[str, TensorInfo], family: Family, dims: Dims, prefix: str) -> str | None:
    for drop in family.drops:
        match = re.fullmatch(drop.pattern, in_table(name, prefix)) if drop.holds(dims) else None
        if match is None:
            continue
        if drop.layers is not None and not dims[drop.layers[0]] <= int(match["layer"]) < dims[drop.layers[1]]:
            continue
        if drop.marker is None or in_checkpoint(drop.marker.format(**match.groupdict()), prefix) in tensors:
            return drop.name
    return None
