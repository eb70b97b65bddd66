"""The weights of a MaxText checkpoint under one set of names, whoever wrote it and in whichever tree.

Trees that are met, `X` being the leaf's path in the model, such as `decoder/layers/mlp/wi_0/kernel`::

    params/params/X                       a conversion, and a training run of MaxText, Linen or NNX
    params/X, X, base/X, model/X          trees of NNX models; each leaf may have a `value` below it
    nnx_aux/model/X, params/MoEBiasVar/X  a router's bias, which MaxText 0.2.5 does not count among the parameters
    opt_state/..., optimizer/..., step    what training needs besides: never read

An NNX list of layers has the layer's number as a key of its own: `layers/0` is `layers_0`.
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
"""Where that release alone has weights."""

MODEL = ("token_embedder", "decoder")
"""What a model's own tree begins with; whatever stands before is a collection."""

NOT_READ = {
    "opt_state": "the optimizer's state is no weight of the model",
    "optimizer": "the optimizer's state is no weight of the model",
    "nnx_aux": "the state of random generators is no weight of the model",
    "vision_encoder": "the text model alone is converted",
    "mtp_block": "Hugging Face's model predicts no further tokens",
}
"""Parts of a tree by the key that they begin with, and why they are left out."""


class MaxTextSource:
    """The weights of the checkpoint at DST, DST/0 or DST/0/items, by path such as `params/params/decoder/...`.

    cache_bytes: decoded chunks that are kept in memory.
    not_read: one line for each part of the tree that holds no weights and was not opened.
    Raises BadInput where it is no checkpoint, or has one weight in two places.
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
        """The release that wrote it, where the tree shows that."""
        return "0.2.5" if any(name.startswith(OF_0_2_5) for name in self._names.values()) else None

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        return self.stored.chunk_shape(self._names[name])

    def read(self, name: str, box: Box | None = None) -> Array:
        return self.stored.read(self._names[name], box)

    def requires(self, name: str, box: Box | None = None) -> Sequence[StoredSlice]:
        return self.stored.requires(self._names[name], box)


def canonical(keys: Keys) -> str:
    """The path of a weight under `params/params`; a leaf outside the model keeps its own."""
    start = next((place for place, key in enumerate(keys) if key in MODEL), None)
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
