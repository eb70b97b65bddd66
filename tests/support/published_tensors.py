"""The tensors of published models at their true sizes, by name and shape alone.

They come from transformers' classes on the meta device, which takes no memory, and from their own way back to a
checkpoint's names; or from a list that was written down by hand. Nothing here knows the families' tables.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conversion_lib.core.boxes import Box
from conversion_lib.core.dtypes import SAFETENSORS_DTYPES
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.families import family_of
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import joined
from tests.support.family import Published


def config_of(raw: dict[str, Any]) -> ModelConfig:
    return ModelConfig(raw, Path("config.json"))


def tensors_of(model: Published, *, own_names: bool = False) -> dict[str, TensorInfo]:
    """Every tensor of the model, as a source shows them: fp8 as bfloat16, without scales."""
    if model.tensors is None:
        return class_tensors(model.config, own_names=own_names)
    return {
        name: TensorInfo(name, shape, "bfloat16" if code == "F8_E4M3" else SAFETENSORS_DTYPES[code], "shard")
        for name, shape, code in model.tensors(model.config)
        if not name.endswith("_scale_inv")
    }


def class_tensors(config: dict[str, Any], *, own_names: bool) -> dict[str, TensorInfo]:
    """Every tensor that transformers' class writes for that config, in bfloat16; `own_names`: under its own names."""
    import torch
    import transformers
    from transformers.core_model_loading import revert_weight_conversion

    known = transformers.AutoConfig.for_model(**{key: value for key, value in config.items() if key != "architectures"})
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(known, dtype=torch.bfloat16)
    stored = model.state_dict()
    if not own_names:
        stored = revert_weight_conversion(model, stored)
    tied = known.tie_word_embeddings  # save_pretrained leaves the head out then
    return {
        name: TensorInfo(name, tuple(tensor.shape), "bfloat16", "shard")
        for name, tensor in stored.items()
        if not (tied and name.endswith("lm_head.weight"))
    }


class Listed:
    """A source of names and shapes alone."""

    def __init__(self, tensors: dict[str, TensorInfo]) -> None:
        self.tensors = tensors

    def read(self, name: str, box: Box | None = None) -> Array:
        raise AssertionError("a plan reads nothing")

    def requires(self, name: str, box: Box | None = None) -> list[StoredSlice]:
        raise AssertionError("a plan reads nothing")


def as_the_tables_take_them(tensors: dict[str, TensorInfo], config: ModelConfig) -> dict[str, TensorInfo]:
    """With those joined that a table takes as one."""
    family = family_of(config)
    return dict(joined(Listed(tensors), family.joins, family.sizes(config)).tensors)
