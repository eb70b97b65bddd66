"""Makes a plan for a MaxText checkpoint from a family's table, and checks everything that headers and config show.

Errors name the tensor, its file, what was expected and what to do. Nothing has been written before.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from conversion_lib.core.boxes import Shape
from conversion_lib.core.dtypes import FLOATS, itemsize
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.mapping.left_out import Checkpoint
from conversion_lib.mapping.names import TABLE_PREFIX, in_checkpoint, prefix_of
from conversion_lib.mapping.rules import Block, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.chunking import chunk_shape
from conversion_lib.plan.ops import Expand, Ops, chain_shape
from conversion_lib.plan.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.plan.value_ops import Resize
from conversion_lib.record import Target
from conversion_lib.sources.joined import Dims

ROOT = "params/params"

SIZES = ("_size", "_dim", "_rank", "_heads", "_experts")
"""Endings of the keys of config.json that shapes depend on."""

# significant bits and exponent bits: a dtype has all values of another if it has at least as many of both
_PRECISION = {"bfloat16": (8, 8), "float16": (11, 5), "float32": (24, 8), "float64": (53, 11)}


Slot = tuple[str, int, tuple[int, ...]]
"""A tensor's name, its expert's index, and its layer's index in the stack."""


@dataclass(frozen=True)
class Leaf:
    """One MaxText leaf: a rule applied to one or several layers and experts.

    Attributes:
        path: The leaf's path, from `params/params`.
        rule: The rule.
        prefix: The checkpoint's prefix of names, where the tables have `model.`.
        block: The block of the rule; None outside the layers.
        layers: The numbers of its layers in the checkpoint, in the order of the stack; None outside the layers.
        stack: The sizes of the axes of stacked layers: one, two (cycles, layers of a cycle), or none.
        experts: The number of stacked experts; None if there are none.
    """

    path: str
    rule: Rule
    prefix: str
    block: Block | None = None
    layers: tuple[int, ...] | None = None
    stack: Shape = ()
    experts: int | None = None

    def slots(self) -> Iterator[Slot]:
        """Yields each tensor of the leaf: its name, its expert's index, and its layer's index in the stack."""
        indices = itertools.product(*(range(extent) for extent in self.stack))
        for index, layer in zip(indices, self.layers if self.layers is not None else (None,), strict=True):
            before = "" if layer is None else f"{TABLE_PREFIX}layers.{layer}."
            for expert in range(self.experts or 1):
                yield in_checkpoint(before + self.rule.hf.replace("{expert}", str(expert)), self.prefix), expert, index


@dataclass(frozen=True)
class Placing:
    """How a leaf is made from its tensors: the ops turn each one into a tile, and the tiles fill the leaf.

    Attributes:
        ops: The ops from a tensor to its tile.
        tile: The shape of a tile; 1 on every axis that layers or experts are stacked on.
        shape: The shape of the leaf.
        layer_axes: The axes that layers are stacked on, in order.
        of_experts: Whether experts are stacked on axis 0.
    """

    ops: Ops
    tile: Shape
    shape: Shape
    layer_axes: tuple[int, ...]
    of_experts: bool

    @property
    def layer_axis(self) -> int | None:
        """The first axis that layers are stacked on; None if there is none."""
        return self.layer_axes[0] if self.layer_axes else None

    def corner(self, expert: int, index: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the lowest corner of a tile in the leaf.

        Args:
            expert: The expert's index; ignored without stacked experts.
            index: The layer's index in the stack.
        """
        at = [0] * len(self.shape)
        for axis, layer in zip(self.layer_axes, index, strict=True):
            at[axis] = layer
        if self.of_experts:
            at[0] = expert
        return tuple(at)


def placing(leaf: Leaf, dims: Dims, maxtext: str) -> Placing:
    """Returns how `leaf` is made from its tensors.

    Args:
        leaf: The leaf.
        dims: The sizes of the model.
        maxtext: The MaxText release that will load it, or that wrote it: `0.2.5` or `main`.

    Raises:
        BadInput: An op does not fit the shape of the tensors.
    """
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


def leaves(family: Family, dims: Dims, scan_layers: bool, prefix: str = TABLE_PREFIX) -> Iterator[Leaf]:
    """Yields every leaf of the MaxText tree, in the table's order.

    Args:
        family: The family.
        dims: The sizes of the model.
        scan_layers: Whether the layers are stacked.
        prefix: The prefix of names in the Hugging Face checkpoint.
    """
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
            for number, layer in enumerate(layers):
                path = f"{ROOT}/decoder/{block.name.format(place=number, layer=layer)}/{rule.maxtext}"
                yield Leaf(path, rule, prefix, block, (layer,), (), experts)


def dims_of(family: Family, config: ModelConfig, tensors: Iterable[str]) -> Dims:
    """Returns the sizes and flags of one checkpoint, from its config and from the names of its tensors.

    Raises:
        BadInput: As the family's `dims` raises it.
    """
    names = list(tensors)
    flags = {dim: int(any(name.endswith(flag.suffix) for name in names)) for dim, flag in family.detected.items()}
    return {**family.sizes(config), **flags}


def plan_to_maxtext(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    family: Family,
    target: Target,
    *,
    identity: dict[str, str],
    model_name: str,
    chunk_limit: int,
    absent: Mapping[str, str] | None = None,
) -> Plan:
    """Makes the plan that writes Hugging Face tensors as a MaxText checkpoint.

    Args:
        tensors: The source's tensors by name, in the order of its files.
        config: The source's config.json.
        family: The family.
        target: What to write.
        identity: The plan's identity.
        model_name: The model's name for the record.
        chunk_limit: The most bytes of a chunk before compression.
        absent: Tensors that only the index has, each with the shard that it names. They must be ones that are left out.

    Raises:
        BadInput: A tensor is missing, no rule matches a tensor, a shape is wrong, a dtype is not a float, or MaxText's
            model leaves out a layer.
    """
    dims = dims_of(family, config, tensors)
    require_a_place_for_every_layer(family, dims, target.scan_layers, config)
    prefix = prefix_of(tensors, family)
    checkpoint = Checkpoint(tensors, family, dims, config, prefix, absent or {})
    arrays, taken, exact, resized = [], set[str](), True, []
    for leaf in leaves(family, dims, target.scan_layers, prefix):
        expected = tuple(dims[dim] for dim in leaf.rule.shape)
        # one by one: a config may name more experts than there is memory for, and the first missing one ends it
        checked = [(slot, _checked(checkpoint, slot[0], leaf, expected)) for slot in leaf.slots()]
        slots, found = [slot for slot, _ in checked], [info for _, info in checked]
        taken.update(info.name for info in found)
        array = _array(leaf, slots, found, dims, target, chunk_limit)
        exact = exact and is_exact(array, found)
        resized += [_resize_line(found[0].name, op) for op in array.ops if isinstance(op, Resize)]
        arrays.append(array)
    dropped = checkpoint.leave_out(taken)
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
    """Refuses a model of which MaxText's would leave out layers: some models are only scanned in whole cycles.

    Raises:
        BadInput: A layer is in no block of the layout, or MaxText does not have the family scanned.
    """

    def without_place(blocks: tuple[Block, ...]) -> list[int]:
        return sorted(set(range(dims["layers"])) - {layer for block in blocks for layer in block.layers(dims)})

    if scan_layers and not family.scanned:
        raise BadInput(f"{config.path}: MaxText has {family.name} unscanned only: give --no-scan-layers")
    left = without_place(family.scanned if scan_layers else family.unscanned)
    if not left:
        return
    cure = "; --no-scan-layers converts them" if scan_layers and not without_place(family.unscanned) else ""
    raise BadInput(
        f"{config.path}: num_hidden_layers = {dims['layers']}, but MaxText's {family.name} "
        f"{'scanned' if scan_layers else 'unscanned'} has no place for layers from {left[0]} on{cure}"
    )


def _resize_line(name: str, op: Resize) -> str:
    if op.after > op.before:
        change = f"{op.after - op.before} rows of zeros are added"
    else:
        change = f"its last {op.before - op.after} rows are left out"
    return f"vocabulary: {name} has {op.before} rows, MaxText's model has {op.after}; {change}"


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
            SourceSlice(info.name, info.shape, placed.corner(expert, index))
            for info, (_, expert, index) in zip(found, slots, strict=True)
        ),
    )


def leaf_dtype(rule: Rule, found: Iterable[TensorInfo], target: Target) -> str:
    """Returns the dtype of a leaf that is made from `found`."""
    keep = rule.keep_float32 and all(info.dtype == "float32" for info in found)
    return "float32" if keep or rule.always_float32 else target.save_dtype


def is_exact(array: ArrayPlan, found: Iterable[TensorInfo]) -> bool:
    """Returns whether the inverse ops give back the bits of the tensors `found` that the array is made from."""
    mantissa, exponent = _PRECISION[array.dtype]
    fits = all(_PRECISION[kind][0] <= mantissa and _PRECISION[kind][1] <= exponent for kind in {i.dtype for i in found})
    return fits and all(op.exact(array.dtype) for op in array.ops)


def _checked(checkpoint: Checkpoint, name: str, leaf: Leaf, expected: Shape) -> TensorInfo:
    info = checkpoint.tensors.get(name)
    if info is None:
        raise checkpoint.missing(name, leaf.path, leaf.rule, leaf.block)
    if info.shape != expected:
        meaning = ", ".join(leaf.rule.shape)
        raise BadInput(
            f"{info.file}: tensor {name} has shape {list(info.shape)}, "
            f"but {checkpoint.config.path} gives {list(expected)} ({meaning}){checkpoint.omitted(SIZES)}"
        )
    if info.dtype not in FLOATS:
        raise BadInput(
            f"{info.file}: tensor {name} has dtype {info.dtype}, expected one of {', '.join(sorted(FLOATS))}"
        )
    return info
