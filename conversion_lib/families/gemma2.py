"""Gemma 2: MaxText's layer is a pair of layers, local attention first.

MaxText does not scale the scores: its query is divided by sqrt(query_pre_attn_scalar), which in 27B is not head_dim.
"""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    from_heads,
    grouped_query_dims,
    require_layer_types,
    scaled_query,
    to_heads,
    whole_cycles,
)
from conversion_lib.families.gemma import embedding, mlp, norm, norms
from conversion_lib.mapping.rules import Block, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims

CYCLE = ("sliding_attention", "full_attention")
MAXTEXT_VOCABULARY = {256000: 256128}
"""Rows in MaxText by rows in the published models. A vocabulary of another size is not changed."""


def dims(config: ModelConfig) -> Dims:
    sizes = grouped_query_dims(config)
    require_layer_types(config, CYCLE)
    vocab = sizes["vocab"]
    return sizes | {
        "query_root": config.count("query_pre_attn_scalar"),
        "maxtext_vocab": MAXTEXT_VOCABULARY.get(vocab, vocab),
        "cycles_end": whole_cycles(sizes["layers"], CYCLE),
    }


def layer(kind: str) -> tuple[Rule, ...]:
    """Returns the rules of one layer of a pair: `local` or `global`."""
    to = f"self_attention_{kind}"
    return (
        *norms(f"_{kind}", from_zero=True),
        Rule("self_attn.q_proj.weight", f"{to}/query/kernel", ("q", "hidden"), scaled_query("query_root")),
        Rule("self_attn.k_proj.weight", f"{to}/key/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
        Rule("self_attn.v_proj.weight", f"{to}/value/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
        Rule("self_attn.o_proj.weight", f"{to}/out/kernel", ("hidden", "q"), from_heads("heads", "head_dim")),
        *mlp(f"mlp_{kind}"),
    )


def pairs(name: str) -> tuple[Block, ...]:
    """Returns the blocks of the local and of the global layers of all pairs, under `name` in MaxText."""
    return tuple(Block(name, layer(kind), index, "cycles_end", 2) for index, kind in enumerate(("local", "global")))


FAMILY = Family(
    name="gemma2",
    architectures=("Gemma2ForCausalLM",),
    model_type="gemma2",
    dims=dims,
    rules=(
        Rule("model.embed_tokens.weight", "token_embedder/embedding", ("vocab", "hidden"), embedding("float32")),
        norm("model.norm", "decoder/decoder_norm", "hidden", from_zero=True),
    ),
    scanned=pairs("layers"),
    unscanned=pairs("layers_{place}"),
    drops=DROPS,
)
