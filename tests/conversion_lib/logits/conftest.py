"""Checkpoints for the logit check's tests, on disk as Orbax itself writes them, and references for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conversion_lib.logits import run
from conversion_lib.logits.forward.architectures import parse_config
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.forward.weights import Checkpoint
from conversion_lib.logits.reference.prompts import fixed_prompts
from conversion_lib.logits.reference.reference import Reference, transformers_reference
from conversion_lib.logits.verdict.blocks import States
from conversion_lib.models.hf_config import load_config
from tests.support.logit_models import build_model


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


@dataclass(frozen=True)
class Seen:
    """A reference, and what the blocks of each of its layers put out."""

    reference: Reference
    states: dict[int, States]


def findings(checkpoint: Checkpoint, seen: Seen) -> run.Findings:
    """What a run of `checkpoint` in step with the original finds, whose layers' states are known."""
    subject = run.Subject(checkpoint, parse_config(seen.reference.config), None, Memory())
    candidate = run.Candidate(subject, seen.reference.prompts, seen.reference.dtype)
    for wanted in seen.states.values():
        candidate.step(wanted)
    return candidate.finish(seen.reference.logits)


@pytest.fixture(scope="session")
def reference_of(model_dir: Callable[[str], Path]) -> Callable[[str], Seen]:
    """transformers' logits of a tiny model, computed once; the long prompt has 512 tokens."""
    known: dict[str, Seen] = {}

    def get(name: str) -> Seen:
        if name not in known:
            config = parse_config(load_config(model_dir(name)).raw)
            prompts = fixed_prompts(config.vocab, 512, config.max_positions)
            states: dict[int, States] = {}
            reference = transformers_reference(model_dir(name), prompts, observe=states.__setitem__)
            known[name] = Seen(reference, states)
        return known[name]

    return get
