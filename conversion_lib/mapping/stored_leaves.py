"""How a MaxText checkpoint stores a family's weights, found from the names and shapes that are in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from conversion_lib.core.dtypes import FLOATS
from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.mapping.rules import Family
from conversion_lib.mapping.to_maxtext import Leaf, Placing, leaves, placing
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims

MAXTEXTS = ("0.2.5", "main")


@dataclass(frozen=True)
class StoredLeaf:
    """A leaf of the checkpoint, what the family's table says of it, and how its tensors lie in it."""

    info: TensorInfo
    leaf: Leaf
    placed: Placing


def export_dims(family: Family, config: ModelConfig) -> Dims:
    """The sizes of a model whose Hugging Face names are not there to look at: they are to be as published."""
    return {**family.dims(config), **{dim: flag.published for dim, flag in family.detected.items()}}


def scanned(tensors: Collection[str], family: Family, dims: Dims, noted: bool | None) -> bool:
    """Whether layers are stacked: what more of the names fit, or where neither fits more, what the checkpoint notes."""
    fit = {scan: sum(leaf.path in tensors for leaf in leaves(family, dims, scan)) for scan in (True, False)}
    return bool(noted) if fit[True] == fit[False] else fit[True] > fit[False]


def stored_leaves(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    family: Family,
    dims: Dims,
    *,
    scan_layers: bool,
    maxtext: str | None,
) -> list[StoredLeaf]:
    """Every leaf that the family's table expects, found and checked.

    maxtext: the release whose layout the checkpoint has, None where that is not known.
    Raises BadInput for a leaf that is missing, that no rule takes, or whose shape or dtype is not as it must be.
    """
    found = []
    for leaf in leaves(family, dims, scan_layers):
        info = tensors.get(leaf.path)
        if info is None:
            raise BadInput(_missing(leaf, tensors, family, scan_layers, config))
        found.append(StoredLeaf(info, leaf, _fitting(info, leaf, dims, maxtext, config)))
    _refuse_unknown(tensors, {part.leaf.path for part in found}, family, config)
    return found


def _missing(
    leaf: Leaf, tensors: Mapping[str, TensorInfo], family: Family, scan_layers: bool, config: ModelConfig
) -> str:
    where = next(iter(tensors.values())).file.partition(", leaf ")[0] if tensors else "the checkpoint"
    layout = "scanned" if scan_layers else "unscanned"
    return (
        f"{where}: leaf {leaf.path} is missing; a {layout} {family.name} of the sizes that {config.path} gives has it. "
        "Is that the config of this checkpoint?"
    )


def _fitting(info: TensorInfo, leaf: Leaf, dims: Dims, maxtext: str | None, config: ModelConfig) -> Placing:
    """How the leaf is made. MaxText's releases differ in the axis that a router's bias is stacked on."""
    ways = {release: placing(leaf, dims, release) for release in ([maxtext] if maxtext else MAXTEXTS)}
    fits = {way: release for release, way in ways.items() if way.shape == info.shape}
    if not fits:
        expected = " or ".join(dict.fromkeys(str(list(way.shape)) for way in ways.values()))
        raise BadInput(
            f"{info.file} has shape {list(info.shape)}, but {config.path} makes it {expected}. "
            "Is that the config of this checkpoint?"
        )
    if len(fits) > 1:
        raise BadInput(
            f"{info.file} has shape {list(info.shape)}, as many layers as experts, so the order of its axes cannot be "
            "seen: --written-by says which release wrote it, 0.2.5 (layers first) or main (experts first)"
        )
    if info.dtype not in FLOATS:
        raise BadInput(f"{info.file} has dtype {info.dtype}, expected one of {', '.join(sorted(FLOATS))}")
    return next(iter(fits))


def _refuse_unknown(
    tensors: Mapping[str, TensorInfo], taken: Collection[str], family: Family, config: ModelConfig
) -> None:
    unknown = [name for name in tensors if name not in taken]
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        info = tensors[unknown[0]]
        raise BadInput(
            f"{info.file} {list(info.shape)}{more} is taken by no rule of family {family.name} with the sizes that "
            f"{config.path} gives. Is that the config of this checkpoint?"
        )
