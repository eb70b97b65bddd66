"""Checkpoints for the logit check's tests: in memory, and on disk as Orbax itself writes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion_lib.config import load_config
from conversion_lib.logits.config import parse_config
from conversion_lib.logits.prompts import fixed_prompts
from conversion_lib.logits.reference import Reference, transformers_reference
from conversion_lib.sources.base import TensorInfo
from tests.logits.models import build_model


class MemoryCheckpoint:
    """Leaves in memory, read as those of a checkpoint are."""

    def __init__(self, leaves: Mapping[str, np.ndarray], scan_layers: bool | None = None) -> None:
        self._arrays = {f"params/params/{path}": array for path, array in leaves.items()}
        self.scan_layers = scan_layers
        self.tensors = {n: TensorInfo(n, a.shape, a.dtype.name) for n, a in self._arrays.items()}
        self.reads: list[str] = []

    def read(self, name: str, box: Any = None) -> np.ndarray:
        self.reads.append(name)
        array = self._arrays[name]
        return array if box is None else array[tuple(slice(*span) for span in box)]

    def stored_bytes(self, name: str, box: Any) -> int:
        return int(np.prod([stop - start for start, stop in box])) * self._arrays[name].itemsize


def write_orbax(root: Path, leaves: Mapping[str, np.ndarray], *, scanned: bool) -> Path:
    """Saves the leaves at `root`/0/items with Orbax's own manager, in the tree that MaxText saves."""
    import orbax.checkpoint as ocp

    tree: dict[str, Any] = {}
    for path, array in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    state = {"step": np.asarray(0), "params": {"params": tree}}
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True)
    options = ocp.CheckpointManagerOptions(create=True, enable_async_checkpointing=False)
    with ocp.CheckpointManager(
        root.absolute(), item_names=("items",), item_handlers={"items": handler}, options=options
    ) as manager:
        saved = ocp.args.Composite(items=ocp.args.PyTreeSave(item=state))
        manager.save(0, args=saved, custom_metadata={"scan_layers": scanned})
        manager.wait_until_finished()
    return root


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model by its name in models.CONFIGS, built once."""
    built: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in built:
            built[name] = build_model(name, tmp_path_factory.mktemp(name))
        return built[name]

    return get


@pytest.fixture(scope="session")
def reference_of(model_dir: Callable[[str], Path]) -> Callable[[str], Reference]:
    """transformers' logits of a tiny model, computed once; the long prompt has 512 tokens."""
    known: dict[str, Reference] = {}

    def get(name: str) -> Reference:
        if name not in known:
            config = parse_config(load_config(model_dir(name)).raw)
            prompts = fixed_prompts(config.vocab, 512, config.max_positions)
            known[name] = transformers_reference(model_dir(name), prompts)
        return known[name]

    return get
