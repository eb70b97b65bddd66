"""Gemma 4 26b and 31b: five layers with local attention for each with global attention.

The heads of global attention are wider. 26b has experts.
"""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.families.common import (
    DROPS,
    GATE_UP,
    expert_dims,
    experts_transposed,
    from_heads,
    grouped_query_dims,
    half,
    linear,
    require_layer_types,
    to_heads,
    whole_cycles,
)
from conversion_lib.families.gemma import embedding, mlp, norms
from conversion_lib.mapping.rules import Block, Drop, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims

CYCLE = (*["sliding_attention"] * 5, "full_attention")
LAST = len(CYCLE) - 1


def has_per_layer_inputs(config: ModelConfig) -> bool:
    """Returns whether the model is E2B or E4B, which are another model in MaxText."""
    return config.count("hidden_size_per_layer_input", least=0) > 0


def attention_dims(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes of both kinds of attention; those of the global kind begin with `global_`."""
    sizes = grouped_query_dims(config)
    wide, kv_heads = _global_sizes(config, sizes)
    return sizes | {
        "maxtext_vocab": sizes["vocab"],
        "one": 1,
        "shared_kv": int(config.flag("attention_k_eq_v")),
        "global_dim": wide,
        "global_q": sizes["heads"] * wide,
        "global_kv_heads": kv_heads,
        "global_kv": kv_heads * wide,
    }


def _global_sizes(config: ModelConfig, sizes: Dims) -> tuple[int, int]:
    """Returns the head_dim and the number of key-value heads of global attention.

    Published files have separate keys for them, transformers 5 writes them for each layer.
    """
    local = sizes["head_dim"], sizes["kv_heads"]
    by_layer = config.section("per_layer_config")
    if by_layer is not None and (layers := by_layer.sections()):
        found = {(one.count("head_dim", local[0]), one.count("num_key_value_heads", local[1])) for one in layers}
        if len(found) > 1:
            raise BadInput(f"{config.path}: per_layer_config gives layers several sizes, and MaxText's model has one")
        return found.pop()
    kv_heads = config.optional_count("num_global_key_value_heads") or sizes["kv_heads"]
    shared_kv = config.flag("attention_k_eq_v")
    return config.count("global_head_dim"), kv_heads if shared_kv else sizes["kv_heads"]


def dims(config: ModelConfig) -> Dims:
    require_layer_types(config, CYCLE)
    sizes = attention_dims(config)
    moe = config.flag("enable_moe_block")
    return sizes | {
        "moe_block": int(moe),
        **(expert_dims(config.count("num_experts"), config.count("moe_intermediate_size")) if moe else {}),
        "cycles_end": whole_cycles(sizes["layers"], CYCLE),
    }


def attention(q: str, kv: str, kv_heads: str, head_dim: str, value: str | None = None) -> tuple[Rule, ...]:
    """Returns the rules of attention.

    Args:
        q: The dim of the query's rows.
        kv: The dim of the rows of key and value.
        kv_heads: The dim of the number of key-value heads.
        head_dim: The dim of the size of a head.
        value: The condition of the value projection, as in Rule; None: always.
    """
    to = "self_attention"
    return (
        Rule("self_attn.q_proj.weight", f"{to}/query/kernel", (q, "hidden"), to_heads("heads", head_dim)),
        Rule("self_attn.k_proj.weight", f"{to}/key/kernel", (kv, "hidden"), to_heads(kv_heads, head_dim)),
        Rule("self_attn.v_proj.weight", f"{to}/value/kernel", (kv, "hidden"), to_heads(kv_heads, head_dim), when=value),
        Rule("self_attn.o_proj.weight", f"{to}/out/kernel", ("hidden", q), from_heads("heads", head_dim)),
        Rule("self_attn.q_norm.weight", f"{to}/query_norm/scale", (head_dim,)),
        Rule("self_attn.k_norm.weight", f"{to}/key_norm/scale", (head_dim,)),
    )


LOCAL = attention("q", "kv", "kv_heads", "head_dim")
GLOBAL = attention("global_q", "global_kv", "global_kv_heads", "global_dim", value="!shared_kv")

BLOCK, ROUTED = "mlp/moe_block", "mlp/moe_block/MoeBlock_0"

MOE_NORMS = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")

SHARED = (
    *norms(from_zero=False),
    Rule("layer_scalar", "layer_scalar", ("one",)),
    *mlp("mlp", when="!moe_block"),
    *mlp(f"{BLOCK}/shared_experts", when="moe_block"),
    *(Rule(f"{norm}.weight", f"mlp/{norm}/scale", ("hidden",), when="moe_block") for norm in MOE_NORMS),
    Rule("router.scale", "mlp/pre_forward_scale_2", ("hidden",), when="moe_block"),
    Rule("router.per_expert_scale", f"{ROUTED}/per_expert_scale", ("experts",), when="moe_block"),
    Rule("router.proj.weight", f"{ROUTED}/gate/kernel", ("experts", "hidden"), linear, when="moe_block"),
    Rule("experts.gate_up_proj", f"{ROUTED}/wi_0", GATE_UP, half(0), when="moe_block"),
    Rule("experts.gate_up_proj", f"{ROUTED}/wi_1", GATE_UP, half(1), when="moe_block"),
    Rule("experts.down_proj", f"{ROUTED}/wo", ("experts", "hidden", "moe"), experts_transposed, when="moe_block"),
)

TOP = (
    Rule("model.embed_tokens.weight", "token_embedder/embedding", ("vocab", "hidden"), embedding("float32")),
    Rule("model.norm.weight", "decoder/decoder_norm/scale", ("hidden",)),
)

TOWERS = Drop(
    "vision and audio towers",
    r"(model\.)?(vision_tower|embed_vision|audio_tower|embed_audio)\..*",
    "only the text model is converted",
)

PREFIXES = ("model.language_model.", "language_model.model.", "model.")

FAMILY = Family(
    name="gemma4",
    architectures=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    model_type="gemma4",
    fits=lambda config: not has_per_layer_inputs(config),
    dims=dims,
    rules=TOP,
    scanned=(
        Block("scanned_blocks/local_layers", (*LOCAL, *SHARED), 0, "cycles_end", len(CYCLE), run=LAST),
        Block("scanned_blocks/global_layer", (*GLOBAL, *SHARED), LAST, "cycles_end", len(CYCLE)),
    ),
    unscanned=(
        Block("layers_{layer}", (*LOCAL, *SHARED), 0, "cycles_end", len(CYCLE), run=LAST),
        Block("layers_{layer}", (*GLOBAL, *SHARED), LAST, "cycles_end", len(CYCLE)),
    ),
    drops=(*DROPS, TOWERS),
    prefixes=PREFIXES,
)
