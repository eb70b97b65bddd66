"""The command line of a MaxText that computes logits on a processor: the model's settings, and no shortcut."""

from __future__ import annotations

from typing import Any

from conversion_lib.errors import BadInput
from conversion_lib.maxtext.model import arguments, maxtext_model
from conversion_lib.models.hf_config import ModelConfig

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


def model_settings(config: ModelConfig, scan: bool, ocdbt: bool = True, zarr3: bool = True) -> list[str]:
    """`key=value` for MaxText's command line: the model, its sizes, and how its checkpoint is stored.

    Raises:
        BadInput: Nothing is known of MaxText's model of that architecture.
    """
    model = maxtext_model(config)
    if model is None:
        raise BadInput(f"{config.path}: nothing is known of MaxText's model of model_type {config.model_type!r}")
    run: dict[str, Any] = {
        "model_name": model.name,
        "override_model_config": True,
        "scan_layers": scan,
        "checkpoint_storage_use_ocdbt": ocdbt,
        "checkpoint_storage_use_zarr3": zarr3,
        "hardware": "cpu",
        "skip_jax_distributed_system": True,
        "attention": "dot_product",
        "log_config": False,
    }
    return arguments(run | model.settings)
