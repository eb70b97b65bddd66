"""Names of scales for activations and for the key-value cache, which weights do not depend on."""

from __future__ import annotations

import re

REASON = "they quantize the input or output of a layer or its cache, not its weights"

WHAT = (
    *("input", "output", "act", "activation", "cache"),
    *("q", "k", "v", "kv", "qkv", "query", "key", "value"),
    *("prob", "probs", "softmax", "score", "scores"),
)
"""Words for what is quantized, of which a name has one or more: `kv_cache_scale`, `input_activation_scale`."""
KINDS = (
    *("scale", "scales", "scale_inv", "scale_ub", "scaling_factor", "global_scale"),
    *("zero_point", "zero_points", "amax"),
)

_LAST = rf"(?:attn_|attention_)?(?:(?:{'|'.join(WHAT)})_)+(?:{'|'.join(KINDS)})"
_COMPILED = re.compile(_LAST)

PATTERN = rf"(?:.*\.)?{_LAST}"
"""A regular expression for the whole name of such a tensor."""


def is_of_activations(name: str) -> bool:
    """Returns whether a tensor with this name quantizes activations or the cache."""
    return _COMPILED.fullmatch(name, name.rfind(".") + 1) is not None
