"""The blocks of a decoder layer that a check compares, and the names they go by in reports."""

from __future__ import annotations

from collections.abc import Mapping

from conversion_lib.core.tensors import Array

EMBEDDING_LAYER = -1
"""The number that the embedding goes by; decoder layers count from 0."""

EMBEDDING = "embedding"
NORM_BEFORE_ATTENTION = "norm before attention"
ATTENTION = "attention"
INDEXER = "indexer"
"""Not compared itself, as what it chooses shows in attention: the places of the tokens that each token looks at,
(all prompts' tokens, how many)."""
NORM_AFTER_ATTENTION = "norm after attention"
NORM_BEFORE_MLP = "norm before the MLP"
ROUTER = "router"
EXPERTS = "experts"
SHARED_EXPERT = "shared expert"
MLP = "MLP"
NORM_BEFORE_EXPERTS = "norm before the experts"
NORM_AFTER_EXPERTS = "norm after the experts"
NORM_AFTER_SHARED_EXPERT = "norm after the shared expert"
NORM_AFTER_MLP = "norm after the MLP"
PER_LAYER_INPUT = "per-layer input"
NORM_AFTER_PER_LAYER_INPUT = "norm after the per-layer input"
STREAM = "stream"

ORDER = (
    EMBEDDING,
    NORM_BEFORE_ATTENTION,
    ATTENTION,
    NORM_AFTER_ATTENTION,
    NORM_BEFORE_MLP,
    ROUTER,
    NORM_BEFORE_EXPERTS,
    EXPERTS,
    NORM_AFTER_EXPERTS,
    SHARED_EXPERT,
    NORM_AFTER_SHARED_EXPERT,
    MLP,
    NORM_AFTER_MLP,
    PER_LAYER_INPUT,
    NORM_AFTER_PER_LAYER_INPUT,
    STREAM,
)
"""The order in which a layer computes them. `stream` is what the layer hands on."""

States = Mapping[str, Array]
"""What blocks of one layer put out, float32 (all prompts' tokens, width) each. The router's width is the number of
experts: each token's share of each, zero for those that it does not go to."""
