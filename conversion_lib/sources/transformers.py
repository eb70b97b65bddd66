"""A checkpoint as transformers' class sees it: loaded whole, as `from_pretrained(dtype="auto")` does.

It is offered under the names of its files, which come from undoing what transformers itself did in loading. Values are
cast to one dtype, config.json's; a few tensors stay float32 as the class demands. Nothing is loaded before the first
read.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import ml_dtypes
import numpy as np

from conversion_lib.core.boxes import Box, slices, whole
from conversion_lib.core.dtypes import FLOATS
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput, OutsideFailure
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.models.transformers_library import MODEL_TYPES, quiet, require_libraries
from conversion_lib.sources.safetensors import SafetensorsSource

LIBRARY_BYTES = 500 << 20
"""Resident memory of torch and transformers, before any weights."""


class TransformersSource:
    """The tensors of `stored` as transformers' class holds them.

    Raises BadInput on opening where torch or transformers is missing, the checkpoint is quantized, or transformers
    makes no model of its config.
    """

    def __init__(self, stored: SafetensorsSource, config: ModelConfig) -> None:
        self._stored, self._config = stored, config
        if config.quantization is not None:
            raise BadInput(
                f"{config.path}: the checkpoint is quantized, which --loader transformers does not take; run "
                "`ferry dequantize` first, or leave the loader out"
            )
        require_libraries("--loader transformers needs")
        self._settings, self._class = _class_of(config)
        self._dtype = _dtype_of(self._settings, stored)
        model = self._empty_model()
        self.tensors: Mapping[str, TensorInfo] = self._as_the_class_has_them(model)
        self.resident_bytes = LIBRARY_BYTES + self._loading_bytes(model)
        """Memory that the model takes at most, while it is loaded and after."""
        self._loaded: Mapping[str, Any] = {}
        self._lock = threading.Lock()

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return self._stored.requires(name, box)

    def read(self, name: str, box: Box | None = None) -> Array:
        with self._lock:
            if not self._loaded:
                self._loaded = self._load()
        tensor, info = self._loaded.get(name), self.tensors[name]
        found = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if tensor is None or found != (info.shape, info.dtype):
            raise BadInput(
                f"{info.file}: tensor {name}, {info.dtype} {list(info.shape)}, is "
                f"{'nothing' if found is None else f'{found[1]} {list(found[0])}'} to transformers' "
                f"{self._class.__name__}: leave --loader transformers out"
            )
        return _as_array(tensor[slices(box or whole(info.shape))])

    def _empty_model(self) -> Any:
        """The model without storage: its names, shapes and demands."""
        import torch

        with _said_by_transformers(self._config), torch.device("meta"):
            return self._class._from_config(deepcopy(self._settings), dtype=self._dtype)

    def _as_the_class_has_them(self, model: Any) -> dict[str, TensorInfo]:
        """Floats in the dtype that they are loaded in, but for those that the class keeps in float32.

        Those are known by words in their names: `_keep_in_fp32_modules` and its strict sister.
        """
        keep = model._get_dtype_plan(self._dtype)
        dtype = str(self._dtype).removeprefix("torch.")

        def seen(info: TensorInfo) -> TensorInfo:
            if info.dtype not in FLOATS:
                return info
            return info._replace(dtype="float32" if any(word in info.name for word in keep) else dtype)

        return {name: seen(info) for name, info in self._stored.tensors.items()}

    def _loading_bytes(self, model: Any) -> int:
        """The files as they are mapped, a copy of what is cast, and two of what the class makes of several tensors:
        a layer's experts are stacked, and gate and up of them joined."""
        stored = self._stored.tensors.values()
        shapes = {info.shape for info in stored}
        cast = [self.tensors[info.name].nbytes for info in stored if self.tensors[info.name].dtype != info.dtype]
        made = [int(tensor.nbytes) for tensor in model.state_dict().values() if tuple(tensor.shape) not in shapes]
        return sum(info.nbytes for info in stored) + sum(cast) + 2 * sum(made)

    def _load(self) -> Mapping[str, Any]:
        """transformers' tensors by the names that the files have.

        Raises BadInput where the files do not fill the class, OutsideFailure where one cannot be read.
        """
        from transformers.core_model_loading import revert_weight_conversion

        try:
            with _said_by_transformers(self._config):
                model, found = self._class.from_pretrained(
                    self._stored.files.directory,
                    config=self._settings,
                    dtype=self._dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    output_loading_info=True,
                )
        except OSError as error:
            raise OutsideFailure(f"{self._stored.files.name}: transformers cannot read it: {error}") from error
        wrong = [*found["missing_keys"], *found["mismatched_keys"]]
        if wrong:
            raise BadInput(
                f"{self._stored.files.name}: {self._class.__name__} has no weights for {wrong[0]} (and "
                f"{len(wrong) - 1} more), or of another shape"
            )
        reverted: Mapping[str, Any] = revert_weight_conversion(model, model.state_dict())
        return reverted


def _dtype_of(settings: Any, stored: SafetensorsSource) -> Any:
    """What `dtype="auto"` stands for: config.json's, else that of the first file's first tensor by name."""
    import torch

    if settings.dtype is not None:
        return settings.dtype
    floats = [info for info in stored.tensors.values() if info.dtype in FLOATS]
    first = min(floats, key=lambda info: (info.file, info.name), default=None)
    return getattr(torch, first.dtype) if first else torch.float32


def _class_of(config: ModelConfig) -> tuple[Any, Any]:
    """transformers' configuration and class for a config.json; its own code alone, never the checkpoint's."""
    import transformers

    kind = MODEL_TYPES.get(config.model_type, config.model_type)
    if kind not in transformers.CONFIG_MAPPING:
        raise BadInput(f"{config.path}: transformers has no model_type {config.model_type!r}")
    with _said_by_transformers(config):
        settings = transformers.CONFIG_MAPPING[kind].from_dict(config.raw | {"model_type": kind})
    named = [getattr(transformers, name, None) for name in config.architectures]
    for candidate in (*named, transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)):
        if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
            return settings, candidate
    raise BadInput(f"{config.path}: transformers has no class for {', '.join(config.architectures) or kind}")


@contextmanager
def _said_by_transformers(config: ModelConfig) -> Iterator[None]:
    """What transformers finds wrong with a config or with weights, as BadInput; without its warnings and bars."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            yield
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{config.path}: transformers makes no model of it: {line}") from error


def _as_array(tensor: Any) -> Array:
    """A torch tensor on the processor as an array of the same bits; numpy itself has no bfloat16."""
    import torch

    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.detach().view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    return np.asarray(tensor.detach().numpy())
