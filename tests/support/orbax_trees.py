"""Trees as training leaves them, written by the real Orbax: optimizer state, Linen and NNX, lists of layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.sources.orbax import open_orbax

Keys = tuple[str | int, ...]
Leaves = dict[Keys, np.ndarray]
Shape = Callable[[Leaves], Leaves]
"""How a tree differs from Linen's: from leaves by their path in the model to leaves by their path in the tree."""

STATE = {
    ("step",): np.int32(7),
    ("opt_state", "count"): np.int32(7),
    ("nnx_aux", "model", "decoder", "dropout", "rngs", "params", "key"): np.arange(4, dtype=np.uint32),
}


def model_leaves(checkpoint: Path) -> Leaves:
    """The weights of a checkpoint that Ferry wrote, by their path in the model."""
    source = open_orbax(checkpoint)
    return {tuple(path.split("/")[2:]): source.read(path) for path in source.tensors if path.startswith("params/")}


def linen(leaves: Leaves) -> Leaves:
    """params/params/..., with the optimizer's two moments and more that is no weight."""
    moments = {
        ("opt_state", name, "params", *keys): np.zeros_like(array)
        for name in ("mu", "nu")
        for keys, array in leaves.items()
    }
    return {("params", "params", *keys): array for keys, array in leaves.items()} | moments | STATE


def nnx(leaves: Leaves) -> Leaves:
    """The model's tree itself, each leaf a variable with a `value`."""
    return {(*keys, "value"): array for keys, array in leaves.items()}


def nnx_below(*before: str) -> Shape:
    """An NNX model below other keys, such as `base`; layers in a list."""

    def shape(leaves: Leaves) -> Leaves:
        return {(*before, *_numbered(keys)): array for keys, array in leaves.items()}

    return shape


def _numbered(keys: Keys) -> Keys:
    """`layers_3` as the list `layers` and the number 3."""
    parts: list[str | int] = []
    for key in keys:
        name, _, number = str(key).rpartition("_")
        parts += [name, int(number)] if name.endswith("layers") and number.isdigit() else [key]
    return tuple(parts)


def write_tree(destination: Path, leaves: Leaves, *, ocdbt: bool = True, zarr3: bool = True) -> Path:
    """Writes the leaves as Orbax does to DST/0/items. Numbers among the keys make lists."""
    import orbax.checkpoint as ocp

    tree: dict[Any, Any] = {}
    for keys, array in leaves.items():
        place = tree
        for key in keys[:-1]:
            place = place.setdefault(key, {})
        place[keys[-1]] = array
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)) as checkpointer:
        checkpointer.save(destination / "0" / "items", _with_lists(tree))
    return destination


def _with_lists(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    made = {key: _with_lists(value) for key, value in tree.items()}
    if all(isinstance(key, int) for key in made):
        return [made[number] for number in sorted(made)]
    return made
