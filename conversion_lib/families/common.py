"""Lines that many tables share: embeddings, norms, and the ops of a linear layer."""

from __future__ import annotations

from conversion_lib.config import ModelConfig
from conversion_lib.ops import Op, Split, Transpose
from conversion_lib.rules import Block, Dims, Drop, OpsOf, Rule


def linear(dims: Dims) -> tuple[Op, ...]:
    """(out, in) -> (in, out)."""
    return (Transpose(),)


def to_heads(heads: str, head_dim: str) -> OpsOf:
    """(heads·head_dim, in) -> (in, heads, head_dim)."""
    return lambda dims: (Transpose(), Split(1, (dims[heads], dims[head_dim])))


def from_heads(heads: str, head_dim: str) -> OpsOf:
    """(out, heads·head_dim) -> (heads, head_dim, out)."""
    return lambda dims: (Transpose(), Split(0, (dims[heads], dims[head_dim])))


TOP = (
    Rule("model.embed_tokens.weight", "token_embedder/embedding", ("vocab", "hidden")),
    Rule("model.norm.weight", "decoder/decoder_norm/scale", ("hidden",)),
    Rule("lm_head.weight", "decoder/logits_dense/kernel", ("vocab", "hidden"), linear, when="!tied"),
)

NORMS = (
    Rule("input_layernorm.weight", "pre_self_attention_layer_norm/scale", ("hidden",)),
    Rule("post_attention_layernorm.weight", "post_self_attention_layer_norm/scale", ("hidden",)),
)

VALUE_AND_OUT = (
    Rule("self_attn.v_proj.weight", "self_attention/value/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.o_proj.weight", "self_attention/out/kernel", ("hidden", "q"), from_heads("heads", "head_dim")),
)

MLP = (
    Rule("mlp.gate_proj.weight", "mlp/wi_0/kernel", ("mlp", "hidden"), linear),
    Rule("mlp.up_proj.weight", "mlp/wi_1/kernel", ("mlp", "hidden"), linear),
    Rule("mlp.down_proj.weight", "mlp/wo/kernel", ("hidden", "mlp"), linear),
)

DROPS = (
    Drop(
        "tied head", r"lm_head\.weight", "tie_word_embeddings: MaxText takes the embedding for the logits", when="tied"
    ),
    Drop("rotary tables", r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from the config, not read"),
)


def base_dims(config: ModelConfig, *, tied_by_default: bool = False) -> dict[str, int]:
    """The sizes that every decoder has."""
    return {
        "zero": 0,
        "layers": config.count("num_hidden_layers"),
        "vocab": config.count("vocab_size"),
        "hidden": config.count("hidden_size"),
        "mlp": config.count("intermediate_size"),
        "heads": config.count("num_attention_heads"),
        "tied": int(config.flag("tie_word_embeddings", tied_by_default)),
    }


def grouped_query_dims(config: ModelConfig, *, head_dim: int | None = None) -> dict[str, int]:
    """Those of grouped-query attention besides; `head_dim` is the class's own default, None for hidden / heads."""
    dims = base_dims(config)
    default = head_dim or (dims["hidden"] // dims["heads"] if dims["heads"] else 0)
    size = config.count("head_dim", default=default)
    kv_heads = config.count("num_key_value_heads", default=dims["heads"])
    return dims | {"kv_heads": kv_heads, "head_dim": size, "q": dims["heads"] * size, "kv": kv_heads * size}


def one_block(*rules: Rule) -> tuple[Block, ...]:
    """All layers alike."""
    return (Block("layers", rules),)
