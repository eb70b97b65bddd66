"""Computes logits with the real MaxText, in the interpreter that has it: `python worker.py JOB.json`.

It imports nothing from Ferry. JOB.json has `settings` (`key=value` for MaxText's command line), `items` (the
checkpoint), `tokens` (an .npz of int32 prompts) and `logits` (the .npz to write).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


def arguments(job: dict[str, Any], longest: int, scratch: str) -> list[str]:
    """Returns MaxText's command line; `longest`: tokens of the longest prompt."""
    package = importlib.util.find_spec("maxtext")
    assert package is not None and package.origin is not None
    return [
        "maxtext",
        str(Path(package.origin).parent / "configs" / "base.yml"),
        *job["settings"],
        "run_name=check",
        f"jax_cache_dir={scratch}",
        f"load_parameters_path={job['items']}",
        f"base_output_directory={scratch}",
        "convert_checkpoint_if_possible=false",
        "per_device_batch_size=1",
        f"max_target_length={longest}",
        f"max_prefill_predict_length={longest}",
    ]


def logits(job: dict[str, Any], scratch: str) -> list[np.ndarray[Any, Any]]:
    """Computes float32 (tokens, vocabulary) for each prompt.

    All prompts are padded to one length, so that MaxText compiles once.
    """
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from maxtext.common.common_types import DECODING_ACTIVE_SEQUENCE_INDICATOR
    from maxtext.configs import pyconfig
    from maxtext.utils import maxtext_utils, model_creation_utils

    with np.load(job["tokens"]) as arrays:
        prompts = [arrays[f"arr_{index}"] for index in range(len(arrays.files))]
    longest = max(map(len, prompts))
    config = pyconfig.initialize(arguments(job, longest, scratch))
    mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
    model = model_creation_utils.from_pretrained(config, mesh=mesh)
    run = nnx.jit(lambda model, *inputs: model(*inputs, enable_dropout=False))
    found = []
    for prompt in prompts:
        here = np.arange(longest)[None] < len(prompt)
        tokens = np.pad(prompt, (0, longest - len(prompt)))[None].astype(np.int32)
        segments = np.where(here, DECODING_ACTIVE_SEQUENCE_INDICATOR, 0).astype(np.int32)
        positions = np.arange(longest, dtype=np.int32)[None]
        out = run(model, jnp.asarray(tokens), jnp.asarray(positions), jnp.asarray(segments))
        found.append(np.asarray(out[0][: len(prompt)], np.float32))
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory() as scratch:
        found = logits(job, scratch)
    np.savez(job["logits"], *found)


if __name__ == "__main__":
    main()
