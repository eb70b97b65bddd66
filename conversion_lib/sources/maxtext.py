"""Reads the weights of a MaxText checkpoint under one set of names, whatever tree they are stored in.

The known trees, where `X` is the leaf's path in the model, such as `decoder/layers/mlp/wi_0/kernel`::

    params/params/X                       a conversion, and a training run of MaxText, Linen or NNX
    params/X, X, base/X, model/X          trees of NNX models; each leaf may have a `value` below it
    nnx_aux/model/X, params/MoEBiasVar/X  a router's bias, which MaxText 0.2.5 does not store with the parameters
    opt_state/..., optimizer/..., step    other state of the training run: never read

In an NNX list of layers, the layer's number is a separate key: `layers/0` is `layers_0`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from conversion_lib.core.boxes import Box
from conversion_lib.core.tensors import Array, StoredSlice, TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.sources.orbax import Keys, OrbaxSource, Where

ROOT = "params/params"

OF_0_2_5 = ("nnx_aux/", "params/MoEBiasVar/")
"""Paths where only MaxText 0.2.5 stores weights."""

MODEL = ("token_embedder", "decoder")
"""First keys of the model's own tree. The keys before them name a collection."""

NOT_READ = {
    "opt_state": "the optimizer's state is not part of the model",
    "optimizer": "the optimizer's state is not part of the model",
    "nnx_aux": "the state of random generators is not part of the model",
    "vision_encoder": "only the text model is converted",
    "mtp_block": "Hugging Face's model has no multi-token prediction",
}
"""Keys whose part of the tree is left out, and why."""


class MaxTextSource:
    """The weights of a MaxText checkpoint by path, such as `params/params/decoder/decoder_norm/scale`.

    Args:
        checkpoint: DST, DST/0 or DST/0/items.
        cache_bytes: The most memory for decoded chunks. 0 keeps none.

    Attributes:
        stored: The leaves under their stored names.
        not_read: A line for each part of the tree that has no weights and was not opened.

    Raises:
        BadInput: It is not a checkpoint, or two leaves have the same path.
        OutsideFailure: A bucket cannot be read.
    """

    def __init__(self, checkpoint: Where, *, cache_bytes: int = 0) -> None:
        self.stored = OrbaxSource(checkpoint, wanted=_is_weight, cache_bytes=cache_bytes)
        self.not_read = _lines(self.stored.unopened)
        self._names: dict[str, str] = {}
        tensors: dict[str, TensorInfo] = {}
        for name, info in self.stored.tensors.items():
            path = canonical(tuple(name.split("/")))
            if path in tensors:
                raise BadInput(f"{self.stored.items}: leaves {self._names[path]} and {name} are both {path}")
            self._names[path] = name
            tensors[path] = TensorInfo(path, info.shape, info.dtype, f"{info.file}, leaf {name}")
        self.tensors: Mapping[str, TensorInfo] = tensors

    @property
    def maxtext(self) -> str | None:
        """The MaxText release that wrote it; None if the tree does not show that."""
        return "0.2.5" if any(name.startswith(OF_0_2_5) for name in self._names.values()) else None

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of the weight's stored chunks, as `OrbaxSource.chunk_shape`."""
        return self.stored.chunk_shape(self._names[name])

    def read(self, name: str, box: Box | None = None) -> Array:
        return self.stored.read(self._names[name], box)

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return self.stored.requires(self._names[name], box)


def canonical(keys: Keys) -> str:
    """Returns the path of a weight under `params/params`, or the unchanged path of a leaf outside the model."""
    start = next((index for index, key in enumerate(keys) if key in MODEL), None)
    if start is None:
        return "/".join(keys)
    parts: list[str] = []
    for key in keys[start:]:
        if key.isdigit():
            parts[-1] += f"_{key}"
        else:
            parts.append(key)
    if parts[-1] == "value":
        parts.pop()
    return "/".join([ROOT, *parts])


def _is_weight(keys: Keys) -> bool:
    if keys[0] in ("step", "opt_state", "optimizer") or any(key in ("vision_encoder", "mtp_block") for key in keys):
        return False
    return not any(key in ("rngs", "dropout") or key.endswith("_rngs") for key in keys)


def _lines(unopened: Iterable[Keys]) -> tuple[str, ...]:
    counts = Counter(next((key for key in keys if key in NOT_READ), "") for keys in unopened)
    return tuple(f"{key}: {count} arrays are not read; {NOT_READ[key]}" for key, count in counts.items() if key)
