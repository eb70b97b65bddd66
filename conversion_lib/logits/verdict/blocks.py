"""The blocks of a decoder layer that a check compares, and their names in reports."""

from __future__ import annotations

from collections.abc import Mapping

from conversion_lib.core.tensors import Array

EMBEDDING_LAYER = -1
"""The layer number of the embedding; decoder layers count from 0."""

EMBEDDING = "embedding"
NORM_BEFORE_ATTENTION = "norm before attention"
ATTENTION = "attention"
INDEXER = "indexer"
"""Indices of the tokens that each query attends to, (all prompts' tokens, top_k). Not compared: a wrong choice shows in
attention."""
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
"""The order in which a layer computes them. `stream` is the residual stream after the layer."""

States = Mapping[str, Array]
"""Outputs of the blocks of one layer by name, float32 (all prompts' tokens, width) each. The router's output is each
token's share of each expert, (all prompts' tokens, experts), zero for experts that the token does not go to."""
