"""Gemma 3's text model: five layers with local attention for each with global attention, norms on query and key."""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    KEY,
    QUERY,
    VALUE_AND_OUT,
    grouped_query_dims,
    one_by_one,
    require_layer_types,
    scan_of_cycles,
    whole_cycles,
)
from conversion_lib.families.gemma import embedding, mlp, norm, norms
from conversion_lib.mapping.rules import Block, Drop, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims

CYCLE = (*["sliding_attention"] * 5, "full_attention")
MAXTEXT_VOCABULARY = {262208: 262144}
"""Rows in MaxText by rows in the published models, whose last rows have no token. Other sizes are not changed."""


def dims(config: ModelConfig) -> Dims:
    sizes = grouped_query_dims(config)
    require_layer_types(config, CYCLE, interval_key="sliding_window_pattern")
    vocab = sizes["vocab"]
    return sizes | {
        "maxtext_vocab": MAXTEXT_VOCABULARY.get(vocab, vocab),
        "cycles_end": whole_cycles(sizes["layers"], CYCLE),
    }


LAYER = (
    *norms(from_zero=True),
    QUERY,
    KEY,
    *VALUE_AND_OUT,
    norm("self_attn.q_norm", "self_attention/query_norm", "head_dim", from_zero=True),
    norm("self_attn.k_norm", "self_attention/key_norm", "head_dim", from_zero=True),
    *mlp("mlp"),
)

VISION = Drop(
    "vision tower",
    r"(model\.)?(vision_tower|multi_modal_projector)\..*",
    "only the text model is converted",
)

FAMILY = Family(
    name="gemma3",
    architectures=("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    model_type="gemma3",
    dims=dims,
    rules=(
        Rule("model.embed_tokens.weight", "token_embedder/embedding", ("vocab", "hidden"), embedding("bfloat16")),
        norm("model.norm", "decoder/decoder_norm", "hidden", from_zero=True),
    ),
    scanned=(
        *scan_of_cycles("layers/layers_{}", CYCLE, *LAYER),
        Block("layers_remainder/layers_{place}", LAYER, "cycles_end", "layers"),
    ),
    unscanned=one_by_one(*LAYER),
    drops=(*DROPS, VISION),
    prefixes=("language_model.model.", "model.language_model.", "model."),
)
