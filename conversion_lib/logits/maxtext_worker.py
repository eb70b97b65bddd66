"""Computes logits with the real MaxText, in whose interpreter it runs: `python maxtext_worker.py JOB.json`.

It imports nothing of Ferry. JOB.json has `config` (the contents of a Hugging Face config.json), `items` (a checkpoint),
`scan_layers`, `ocdbt`, `zarr3`, `tokens` (an .npz of int32 prompts) and `logits` (the .npz to write).
"""

from __future__ import annotations

import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

# model_type of config.json -> a MaxText model of that architecture, whose sizes are then overridden
MODEL_NAMES = {
    "qwen3": "qwen3-0.6b",
    "llama": "llama3.1-8b",
    "deepseek_v2": "deepseek2-16b",
    "deepseek_v3": "deepseek3-671b",
    "deepseek_v32": "deepseek3.2-671b",
}

# MaxText's key -> the key of config.json or of its RoPE parameters
EVERY_MODEL = {
    "base_emb_dim": "hidden_size",
    "base_num_query_heads": "num_attention_heads",
    "base_num_kv_heads": "num_key_value_heads",
    "base_mlp_dim": "intermediate_size",
    "base_num_decoder_layers": "num_hidden_layers",
    "vocab_size": "vocab_size",
    "normalization_layer_epsilon": "rms_norm_eps",
    "logits_via_embedding": "tie_word_embeddings",
    "rope_max_timescale": "rope_theta",
}
GROUPED_QUERY = {"head_dim": "head_dim"}
LATENT = {
    "base_moe_mlp_dim": "moe_intermediate_size",
    "first_num_dense_layers": "first_k_dense_replace",
    "num_experts": "n_routed_experts",
    "num_experts_per_tok": "num_experts_per_tok",
    "shared_experts": "n_shared_experts",
    "routed_scaling_factor": "routed_scaling_factor",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
    "original_max_position_embeddings": "original_max_position_embeddings",
    "rope_factor": "factor",
    "beta_fast": "beta_fast",
    "beta_slow": "beta_slow",
    "mscale": "mscale",
}
# not in MaxText's own files for these models
GROUPED_ROUTER = {"n_routing_groups": "n_group", "topk_routing_group": "topk_group"}
INDEXER = {"indexer_n_heads": "index_n_heads", "indexer_head_dim": "index_head_dim", "indexer_topk": "index_topk"}
OVERRIDES = {
    "qwen3": EVERY_MODEL | GROUPED_QUERY,
    "llama": EVERY_MODEL | GROUPED_QUERY,
    "deepseek_v2": EVERY_MODEL | LATENT,
    "deepseek_v3": EVERY_MODEL | LATENT | GROUPED_ROUTER,
    "deepseek_v32": EVERY_MODEL | LATENT | GROUPED_ROUTER | INDEXER,
}

# float32 and no shortcut: what is left is the order of additions
EXACT = (
    "dtype=float32",
    "weight_dtype=float32",
    "matmul_precision=highest",
    "float32_qk_product=true",
    "float32_logits=true",
    "float32_gate_logits=true",
    "sparse_matmul=false",
    "megablox=false",
    "capacity_factor=-1.0",
)


def arguments(job: dict[str, Any], longest: int, scratch: str) -> list[str]:
    """MaxText's command line for a job; raises ValueError for an architecture that is not in the tables."""
    config = job["config"]
    kind = config.get("model_type")
    if kind not in OVERRIDES:
        raise ValueError(f"--engine maxtext has no settings for model_type {kind!r}; it has {', '.join(OVERRIDES)}")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    values = {**config, **rope}
    values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
    values.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    overrides = {key: _plain(values[name]) for key, name in OVERRIDES[kind].items() if name in values}
    if "factor" in rope and "original_max_position_embeddings" in overrides:
        # MaxText scales for YaRN only where the positions are more than the original ones
        overrides["max_position_embeddings"] = _plain(rope["factor"] * values["original_max_position_embeddings"])
    if config.get("first_k_dense_replace") == 0:  # MaxText insists, though no layer then has this size
        overrides["base_mlp_dim"] = overrides["base_moe_mlp_dim"]
    package = importlib.util.find_spec("maxtext")
    assert package is not None and package.origin is not None
    return [
        "maxtext",
        str(Path(package.origin).parent / "configs" / "base.yml"),
        f"model_name={MODEL_NAMES[kind]}",
        "override_model_config=true",
        f"scan_layers={job['scan_layers']}",
        f"checkpoint_storage_use_ocdbt={job['ocdbt']}",
        f"checkpoint_storage_use_zarr3={job['zarr3']}",
        "run_name=check",
        "hardware=cpu",
        "skip_jax_distributed_system=true",
        "attention=dot_product",
        "log_config=false",
        f"jax_cache_dir={scratch}",
        *EXACT,
        f"load_parameters_path={job['items']}",
        f"base_output_directory={scratch}",
        "convert_checkpoint_if_possible=false",
        "per_device_batch_size=1",
        f"max_target_length={longest}",
        f"max_prefill_predict_length={longest}",
        *(f"{key}={value}" for key, value in overrides.items()),
    ]


def _plain(value: Any) -> Any:
    """As MaxText's types want it: whole numbers without a point, and 0 where there is no q_lora_rank."""
    if value is None:
        return 0
    return int(value) if isinstance(value, float) and value.is_integer() else value


def logits(job: dict[str, Any], scratch: str) -> list[np.ndarray[Any, Any]]:
    """Float32 (tokens, vocabulary) of each prompt, filled up to one length so that MaxText compiles once."""
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
