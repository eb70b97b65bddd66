"""Runs jobs with the real MaxText, many in one process: starting it takes longer than most of them.

    python maxtext_worker.py JOBS.json RESULTS.json --devices N

JOBS.json is a list of objects, each with a `kind` (a key of `JOBS` below) and that function's keyword arguments;
RESULTS.json becomes a list of the same length: `{"seconds", "value"}`, or `{"seconds", "error"}` for a job that raised.

This file is run by MaxText's environment and imports nothing of Ferry. MaxText itself is as its package is; only the
Hugging Face config of the named model is replaced, since the test models are small.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np

CACHE = Path(__file__).resolve().parents[2] / ".parity" / "jax_cache"


def model_arguments(settings: list[str]) -> list[str]:
    """MaxText's command line with these `key=value`, which say the model."""
    base = Path(importlib.util.find_spec("maxtext").origin).parent / "configs" / "base.yml"
    return [
        "maxtext",
        str(base),
        *settings,
        "run_name=parity",
        f"jax_cache_dir={CACHE}",  # instead of the home directory
    ]


def convert(source: str, out: str, settings: list[str], save_dtype: str) -> None:
    """MaxText's own conversion, as its command line runs it: lazy, sharded over all simulated devices."""
    import jax
    from maxtext.checkpoint_conversion import to_maxtext
    from transformers import AutoConfig

    arguments = model_arguments(settings)
    name = next(value.partition("=")[2] for value in arguments if value.startswith("model_name="))
    to_maxtext.HF_MODEL_CONFIGS[name] = AutoConfig.from_pretrained(source)
    to_maxtext.main(
        [*arguments, f"base_output_directory={out}"],
        hf_model_path=source,
        save_dtype=save_dtype,
        simulated_cpu_devices_count=jax.device_count(),
    )


def tree(settings: list[str]) -> dict:
    """The shape of every parameter that MaxText's model expects."""
    from maxtext.configs import pyconfig

    return {"tree": _shapes(_abstract_params(pyconfig.initialize(model_arguments(settings))))}


def leaves(checkpoint: str) -> dict[str, list]:
    """Shape and dtype of every array in `checkpoint`, restored by Orbax."""
    return _described(_restore(checkpoint))


def compare(ours: str, theirs: str) -> dict:
    """What `leaves` says of ours, and how theirs differs, leaf by leaf and bit by bit; no line where it does not."""
    a, b = _restore(ours), _restore(theirs)
    differences = [f"{path}: only in {'ours' if path in a else 'theirs'}" for path in sorted(set(a) ^ set(b))]
    for path in sorted(set(a) & set(b)):
        if (a[path].shape, a[path].dtype) != (b[path].shape, b[path].dtype):
            differences.append(f"{path}: {a[path].shape} {a[path].dtype}, theirs {b[path].shape} {b[path].dtype}")
        elif a[path].tobytes() != b[path].tobytes():
            values = np.asarray(a[path], np.float64), np.asarray(b[path], np.float64)
            count, most = np.count_nonzero(values[0] != values[1]), np.abs(values[0] - values[1]).max()
            differences.append(f"{path}: {count} of {a[path].size} values differ, by up to {most:.3g}")
    return {"leaves": _described(a), "differences": differences}


def logits(checkpoint: str, settings: list[str], tokens: str, out: str) -> dict:
    """What MaxText computes for one prompt from `checkpoint`, and whether both its loaders give the same weights.

    Also what `tree` says, since it is at hand.
    """
    import jax.numpy as jnp
    from flax import nnx
    from maxtext.common.common_types import DECODING_ACTIVE_SEQUENCE_INDICATOR
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    prompt = np.load(tokens)[None]
    with tempfile.TemporaryDirectory() as scratch:
        config = pyconfig.initialize(
            [
                *model_arguments(settings),
                f"load_parameters_path={checkpoint}/0/items",
                f"base_output_directory={scratch}",
                "convert_checkpoint_if_possible=false",
                "per_device_batch_size=1",
                f"max_target_length={prompt.size}",
                f"max_prefill_predict_length={prompt.size}",
            ]
        )
        model = model_creation_utils.from_pretrained(config, mesh=_mesh(config))
    run_model = nnx.jit(lambda model, *inputs: model(*inputs, enable_dropout=False))
    positions = jnp.arange(prompt.size, dtype=jnp.int32)[None]
    segments = jnp.full(prompt.shape, DECODING_ACTIVE_SEQUENCE_INDICATOR, jnp.int32)
    np.save(out, np.asarray(run_model(model, jnp.asarray(prompt), positions, segments)[0], np.float32))
    params = _abstract_params(config)
    return {"tree": _shapes(params), "training_loader": _training_loader(config, model, params)}


def train(checkpoint: str, settings: list[str], out: str) -> None:
    """A step of MaxText's own training from `checkpoint` at a learning rate of zero: the weights stay as they are.

    It leaves `out`/parity/checkpoints/0 with the optimizer's state.
    """
    from maxtext.trainers.pre_train import train as trainer

    trainer.main(
        [
            *model_arguments(settings),
            f"load_parameters_path={checkpoint}/0/items",
            f"base_output_directory={out}",
            "steps=1",
            "checkpoint_period=1",
            "async_checkpointing=false",
            "learning_rate=0.0",
            "weight_dtype=float32",
            "per_device_batch_size=1",
            "max_target_length=16",
            "sparse_matmul=false",
            "megablox=false",
        ]
    )


def _training_loader(config, model, params) -> str:
    """`same` where the loader of training and decoding gives what `model` has, else what it does."""
    from flax import nnx
    from maxtext.common import checkpointing

    try:
        params = checkpointing.load_params_from_path(
            config.load_parameters_path,
            params,
            config.checkpoint_storage_concurrent_gb,
            config.checkpoint_storage_use_ocdbt,
            config.checkpoint_storage_use_zarr3,
        )
    except Exception as error:
        return _line(error)
    have = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
    loaded = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    wrong = ["/".join(map(str, path)) for path in loaded if not np.array_equal(loaded[path], have[path])]
    return f"other values in {', '.join(wrong)}" if wrong else "same"


def _abstract_params(config):
    """The parameters of MaxText's model, as shapes."""
    from flax import nnx
    from maxtext.layers import moe
    from maxtext.utils import model_creation_utils

    _, model = model_creation_utils.create_nnx_abstract_model(config, _mesh(config))
    return nnx.state(model, (nnx.Param, moe.MoEBiasVar))


def _shapes(params) -> dict[str, list[int]]:
    from flax import nnx

    return {"/".join(map(str, path)): list(leaf.get_value().shape) for path, leaf in nnx.to_flat_state(params)}


def _described(arrays: dict[str, np.ndarray]) -> dict[str, list]:
    return {path: [list(array.shape), array.dtype.name] for path, array in arrays.items()}


def _mesh(config):
    import jax
    from maxtext.utils import maxtext_utils

    return jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)


def _restore(checkpoint: str) -> dict[str, np.ndarray]:
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    items = epath.Path(checkpoint) / "0" / "items"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        metadata = checkpointer.metadata(items).item_metadata.tree
        plain = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        restored = checkpointer.restore(items, args=ocp.args.PyTreeRestore(restore_args=plain))
    flat, _ = jax.tree_util.tree_flatten_with_path(restored)
    return {"/".join(str(key.key) for key in path): np.asarray(array) for path, array in flat}


def _line(error: Exception) -> str:
    """MaxText's messages may list every weight: the beginning and the end tell enough."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 800 else f"{text[:400]} ... {text[-400:]}"


JOBS = {"convert": convert, "tree": tree, "leaves": leaves, "compare": compare, "logits": logits, "train": train}


def run(job: dict) -> dict:
    """One job; whatever it raises becomes its result, so that the others still run.

    MaxText collects garbage for every array that it converts: what is frozen is not looked at again.
    """
    start = time.time()
    gc.collect()
    gc.freeze()
    arguments = {key: value for key, value in job.items() if key != "kind"}
    try:
        outcome = {"value": JOBS[job["kind"]](**arguments)}
    except Exception as error:
        traceback.print_exc()
        outcome = {"error": _line(error)}
    return {"seconds": round(time.time() - start, 2), **outcome}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("jobs", type=Path)
    parser.add_argument("results", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()
    # All this must be set before jax starts.
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={args.devices}"
    os.environ.update(JAX_PLATFORMS="cpu", HF_HUB_OFFLINE="1")
    # Most of the time goes into compiling, and into random weights that are then overwritten.
    os.environ.update(JAX_DISABLE_MOST_OPTIMIZATIONS="1", JAX_DEFAULT_PRNG_IMPL="unsafe_rbg")
    results = []
    for job in json.loads(args.jobs.read_text()):
        print(f"--- {job}", file=sys.stderr, flush=True)
        results.append(run(job))
    args.results.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
