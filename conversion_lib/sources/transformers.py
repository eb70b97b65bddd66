"""Reads a checkpoint through transformers: the model is loaded whole, as with `from_pretrained(dtype="auto")`.

The tensors have the names of the stored ones: the renaming that transformers does on loading is undone. Values are cast
to the dtype of config.json; a few tensors stay float32, as the model class requires. Nothing is loaded before the
first read.
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
"""Resident memory of torch and transformers without any weights."""


class TransformersSource:
    """The tensors of `stored` as the transformers class has them.

    A read raises BadInput if the files do not fit the class, and OutsideFailure if they cannot be read.

    Attributes:
        resident_bytes: The most memory that the model takes, during loading and afterwards.

    Raises:
        BadInput: torch or transformers is missing, the checkpoint is quantized, or transformers cannot create a model
            from the config.
    """

    def __init__(self, stored: SafetensorsSource, config: ModelConfig) -> None:
        self._stored, self._config = stored, config
        if config.quantization is not None:
            raise BadInput(
                f"{config.path}: the checkpoint is quantized, which --loader transformers does not support; run "
                "`ferry dequantize` first, or omit --loader"
            )
        require_libraries("--loader transformers needs")
        self._settings, self._class = _class_of(config)
        self._dtype = _dtype_of(self._settings, stored)
        model = self._empty_model()
        self.tensors: Mapping[str, TensorInfo] = self._as_the_class_has_them(model)
        self.resident_bytes = LIBRARY_BYTES + self._loading_bytes(model)
        self._loaded: Mapping[str, Any] = {}
        self._lock = threading.Lock()

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return self._stored.requires(name, box)

    def read(self, name: str, box: Box | None = None) -> Array:
        with self._lock:
            if not self._loaded:
                self._loaded = self._load()
        # a checkpoint of the base class has its names without the prefix
        own = self._loaded.get(f"{self._class.base_model_prefix}.{name}")
        tensor, info = self._loaded.get(name, own), self.tensors[name]
        found = None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        if tensor is None or found != (info.shape, info.dtype):
            raise BadInput(
                f"{info.file}: tensor {name} is {info.dtype} {list(info.shape)}, but in transformers' "
                f"{self._class.__name__} it is {'missing' if found is None else f'{found[1]} {list(found[0])}'}: "
                "omit --loader transformers"
            )
        return _as_array(tensor[slices(box or whole(info.shape))])

    def _empty_model(self) -> Any:
        """Returns the model without storage: names, shapes and the dtypes that it requires."""
        import torch

        with _said_by_transformers(self._config), torch.device("meta"):
            return self._class._from_config(deepcopy(self._settings), dtype=self._dtype)

    def _as_the_class_has_them(self, model: Any) -> dict[str, TensorInfo]:
        """Returns float tensors with their dtype after loading; the class keeps some in float32.

        `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` list words in the names of those.
        """
        keep = model._get_dtype_plan(self._dtype)
        dtype = str(self._dtype).removeprefix("torch.")

        def seen(info: TensorInfo) -> TensorInfo:
            if info.dtype not in FLOATS:
                return info
            return info._replace(dtype="float32" if any(word in info.name for word in keep) else dtype)

        return {name: seen(info) for name, info in self._stored.tensors.items()}

    def _loading_bytes(self, model: Any) -> int:
        """Returns the bytes of the mapped files, of one copy of cast tensors, and of two copies of merged ones.

        Merged are a layer's experts, which are stacked, and their gate and up, which are joined.
        """
        stored = self._stored.tensors.values()
        shapes = {info.shape for info in stored}
        cast = [self.tensors[info.name].nbytes for info in stored if self.tensors[info.name].dtype != info.dtype]
        made = [int(tensor.nbytes) for tensor in model.state_dict().values() if tuple(tensor.shape) not in shapes]
        return sum(info.nbytes for info in stored) + sum(cast) + 2 * sum(made)

    def _load(self) -> Mapping[str, Any]:
        """Loads the model, and returns its tensors by their names in the files.

        Raises BadInput if the files lack weights of the class, OutsideFailure if a file cannot be read.
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
                f"{self._stored.files.name}: weights of {self._class.__name__} are missing or have another shape: "
                f"{wrong[0]} and {len(wrong) - 1} more"
            )
        reverted: Mapping[str, Any] = revert_weight_conversion(model, model.state_dict())
        return reverted


def _dtype_of(settings: Any, stored: SafetensorsSource) -> Any:
    """Returns the dtype for `dtype="auto"`: config.json's, or the dtype of the first file's first tensor by name."""
    import torch

    if settings.dtype is not None:
        return settings.dtype
    floats = [info for info in stored.tensors.values() if info.dtype in FLOATS]
    first = min(floats, key=lambda info: (info.file, info.name), default=None)
    return getattr(torch, first.dtype) if first else torch.float32


def _class_of(config: ModelConfig) -> tuple[Any, Any]:
    """Returns the configuration and the class for a config.json: transformers' own code, never the checkpoint's."""
    import transformers

    kind = MODEL_TYPES.get(config.model_type, config.model_type)
    if kind not in transformers.CONFIG_MAPPING:
        raise BadInput(f"{config.path}: transformers has no model_type {config.model_type!r}")
    with _said_by_transformers(config):
        settings = transformers.CONFIG_MAPPING[kind].from_dict(config.for_transformers() | {"model_type": kind})
    named = [getattr(transformers, name, None) for name in config.architectures]
    for candidate in (*named, transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(settings), None)):
        if isinstance(candidate, type) and issubclass(candidate, transformers.PreTrainedModel):
            return settings, candidate
    raise BadInput(f"{config.path}: transformers has no class for {', '.join(config.architectures) or kind}")


@contextmanager
def _said_by_transformers(config: ModelConfig) -> Iterator[None]:
    """Turns transformers' errors about a config or weights into BadInput, and hides its warnings and progress bars."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        with quiet():
            yield
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        line = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"{config.path}: transformers cannot create a model from it: {line}") from error


def _as_array(tensor: Any) -> Array:
    """Converts a torch tensor on the CPU to an array with the same bits. numpy itself has no bfloat16."""
    import torch

    if tensor.dtype == torch.bfloat16:
        bits: Array = tensor.detach().view(torch.uint16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    return np.asarray(tensor.detach().numpy())
