"""Finds out from names and shapes how a MaxText checkpoint stores a family's weights."""

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
    """A leaf of a checkpoint.

    Attributes:
        info: The stored array.
        leaf: The leaf in the family's table.
        placed: How the Hugging Face tensors fill the leaf.
    """

    info: TensorInfo
    leaf: Leaf
    placed: Placing


def export_dims(family: Family, config: ModelConfig) -> Dims:
    """Returns the sizes and flags for names as in the published checkpoint, since there are no names to look at."""
    return {**family.sizes(config), **{dim: flag.published for dim, flag in family.detected.items()}}


def scanned(tensors: Collection[str], family: Family, dims: Dims, noted: bool | None) -> bool:
    """Returns whether layers are stacked.

    Args:
        tensors: The names of the checkpoint's leaves.
        family: The family.
        dims: Its sizes.
        noted: What the checkpoint's metadata say; used only if both layouts fit equally many names. None means False.
    """
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
    """Finds every leaf of the family's table in a checkpoint, and checks it.

    Args:
        tensors: The checkpoint's arrays by path.
        config: The model's config.json, for messages.
        family: The family.
        dims: Its sizes.
        scan_layers: Whether the layers are stacked.
        maxtext: The MaxText release that wrote the checkpoint; None if it is not known.

    Raises:
        BadInput: A leaf is missing, no rule matches a leaf, or a shape or dtype is not as expected. Or the release is
            needed and not known.
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
        f"{where}: leaf {leaf.path} is missing; a {layout} {family.name} with the sizes in {config.path} has it. "
        "Is that the config of this checkpoint?"
    )


def _fitting(info: TensorInfo, leaf: Leaf, dims: Dims, maxtext: str | None, config: ModelConfig) -> Placing:
    """Returns how the tensors fill the leaf. MaxText's releases stack a router's bias on different axes."""
    ways = {release: placing(leaf, dims, release) for release in ([maxtext] if maxtext else MAXTEXTS)}
    fits = {way: release for release, way in ways.items() if way.shape == info.shape}
    if not fits:
        expected = " or ".join(dict.fromkeys(str(list(way.shape)) for way in ways.values()))
        raise BadInput(
            f"{info.file} has shape {list(info.shape)}, but {config.path} gives {expected}. "
            "Is that the config of this checkpoint?"
        )
    if len(fits) > 1:
        raise BadInput(
            f"{info.file} has shape {list(info.shape)}, as many layers as experts, so the order of its axes is not "
            "known: give --written-by, the release that wrote it: 0.2.5 (layers first) or main (experts first)"
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
            f"{info.file} {list(info.shape)}{more} matches no rule of family {family.name} with the sizes in "
            f"{config.path}. Is that the config of this checkpoint?"
        )
