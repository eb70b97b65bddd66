"""From a family's table to a plan: everything that headers and a config can tell is checked here.

Errors name the tensor, its file, what was expected and what to do; nothing has been written by then.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from conversion_lib.chunking import chunk_shape
from conversion_lib.config import ModelConfig
from conversion_lib.dtypes import FLOATS, itemsize
from conversion_lib.errors import BadInput
from conversion_lib.ops import Expand, Ops, chain_shape
from conversion_lib.plan import ArrayPlan, Plan, SourceSlice
from conversion_lib.record import Target
from conversion_lib.rules import Block, Dims, Family, Rule
from conversion_lib.sources.base import TensorInfo

ROOT = "params/params"

# significant bits and exponent bits: a dtype holds another's values where it has no fewer of both
_PRECISION = {"bfloat16": (8, 8), "float16": (11, 5), "float32": (24, 8), "float64": (53, 11)}


@dataclass(frozen=True)
class Leaf:
    """One MaxText leaf: a rule applied to one or many layers and experts."""

    path: str
    rule: Rule
    block: Block | None
    layers: range | None
    """The layers of a leaf, stacked where `stacked`; None outside the blocks."""
    stacked: bool
    experts: int | None

    def slots(self) -> Iterator[tuple[str, int, int]]:
        """Each tensor of the leaf: its name, its expert, its layer's place in the stack."""
        for place, layer in enumerate(self.layers if self.layers is not None else (None,)):
            prefix = "" if layer is None else f"model.layers.{layer}."
            for expert in range(self.experts or 1):
                yield prefix + self.rule.hf.replace("{expert}", str(expert)), expert, place


def leaves(family: Family, dims: Dims, scan_layers: bool) -> Iterator[Leaf]:
    """Every leaf of the MaxText tree, in the table's order."""
    for rule in family.rules:
        if rule.holds(dims):
            yield Leaf(f"{ROOT}/{rule.maxtext}", rule, None, None, False, None)
    for block in family.blocks:
        layers = range(dims[block.start], dims[block.stop])
        for rule in block.rules:
            if not layers or not rule.holds(dims):
                continue
            experts = dims["experts"] if "{expert}" in rule.hf else None
            if scan_layers:
                yield Leaf(f"{ROOT}/decoder/{block.name}/{rule.maxtext}", rule, block, layers, True, experts)
                continue
            for place, layer in enumerate(layers):
                path = f"{ROOT}/decoder/{block.name}_{place}/{rule.maxtext}"
                yield Leaf(path, rule, block, range(layer, layer + 1), False, experts)


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
    dims = family.dims(config)
    arrays, taken, exact = [], set[str](), True
    for leaf in leaves(family, dims, target.scan_layers):
        found = [_checked(tensors, name, leaf, dims, config) for name, _, _ in leaf.slots()]
        taken.update(info.name for info in found)
        array = _array(leaf, found, dims, target, chunk_limit)
        exact = exact and _is_exact(array, found)
        arrays.append(array)
    dropped = _drop_or_refuse(tensors, taken, family, dims, config)
    return Plan(
        kind="maxtext",
        arrays=tuple(arrays),
        identity=identity,
        exact=exact,
        family=family.name,
        model_name=model_name,
        dropped=tuple(dropped),
    )


def _array(leaf: Leaf, found: list[TensorInfo], dims: Dims, target: Target, chunk_limit: int) -> ArrayPlan:
    layer_axis = leaf.rule.scan_axis[target.maxtext] if leaf.stacked else None
    ops: Ops = leaf.rule.ops(dims)
    if leaf.experts is not None:
        ops = (*ops, Expand(0))
    if layer_axis is not None:
        ops = (*ops, Expand(layer_axis))
    try:
        shape = list(chain_shape(ops, tuple(dims[name] for name in leaf.rule.shape)))
    except BadInput as error:
        raise BadInput(f"{found[0].file}: tensor {found[0].name} cannot become {leaf.path}: {error}") from None
    if leaf.experts is not None:
        shape[0] = leaf.experts
    if layer_axis is not None and leaf.layers is not None:
        shape[layer_axis] = len(leaf.layers)

    def corner(expert: int, place: int) -> tuple[int, ...]:
        at = [0] * len(shape)
        if leaf.experts is not None:
            at[0] = expert
        if layer_axis is not None:
            at[layer_axis] = place
        return tuple(at)

    keep = leaf.rule.keep_float32 and all(info.dtype == "float32" for info in found)
    dtype = "float32" if keep else target.save_dtype
    return ArrayPlan(
        path=leaf.path,
        shape=tuple(shape),
        dtype=dtype,
        chunk_shape=chunk_shape(tuple(shape), itemsize(dtype), chunk_limit, layer_axis),
        ops=ops,
        sources=tuple(
            SourceSlice(info.name, info.shape, corner(expert, place))
            for info, (_, expert, place) in zip(found, leaf.slots(), strict=True)
        ),
    )


def _is_exact(array: ArrayPlan, found: list[TensorInfo]) -> bool:
    mantissa, exponent = _PRECISION[array.dtype]
    fits = all(_PRECISION[kind][0] <= mantissa and _PRECISION[kind][1] <= exponent for kind in {i.dtype for i in found})
    return fits and all(op.exact(array.dtype) for op in array.ops)


def _checked(tensors: Mapping[str, TensorInfo], name: str, leaf: Leaf, dims: Dims, config: ModelConfig) -> TensorInfo:
    info = tensors.get(name)
    if info is None:
        raise BadInput(f"tensor {name} is missing: {leaf.path} is made of it{_because(leaf.block, config)}")
    expected = tuple(dims[dim] for dim in leaf.rule.shape)
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
    tensors: Mapping[str, TensorInfo], taken: set[str], family: Family, dims: Dims, config: ModelConfig
) -> list[str]:
    """One line for each drop that found something. Raises BadInput for a tensor that neither rule nor drop takes."""
    counts: dict[str, int] = {}
    unknown = []
    for name in tensors:
        if name in taken:
            continue
        drop = _drop_for(name, tensors, family, dims)
        if drop is None:
            unknown.append(name)
        else:
            counts[drop] = counts.get(drop, 0) + 1
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise BadInput(
            f"{tensors[unknown[0]].file}: tensor {unknown[0]}{more} is taken by no rule of family "
            f"{family.name}{_why_left_over(unknown[0], family, dims, config)}"
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
    return _because(next((block for block in family.blocks if block.because), None), config)


def _drop_for(name: str, tensors: Mapping[str, TensorInfo], family: Family, dims: Dims) -> str | None:
    for drop in family.drops:
        match = re.fullmatch(drop.pattern, name) if drop.holds(dims) else None
        if match is None:
            continue
        if drop.layers is not None and not dims[drop.layers[0]] <= int(match["layer"]) < dims[drop.layers[1]]:
            continue
        if drop.marker is None or drop.marker.format(**match.groupdict()) in tensors:
            return drop.name
    return None
