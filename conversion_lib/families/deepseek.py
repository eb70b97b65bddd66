"""What DeepSeek V2, V3 and V3.2 share: latent attention, leading dense layers, shared and routed experts."""

from __future__ import annotations

from conversion_lib.families.common import MLP, NORMS, base_dims, expert_dims, experts, from_heads, linear, to_heads
from conversion_lib.mapping.rules import Block, Drop, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims


def dims(config: ModelConfig) -> Dims:
    sizes = base_dims(config)
    nope, rope, value = (config.count(f"{name}_head_dim") for name in ("qk_nope", "qk_rope", "v"))
    heads, moe = sizes["heads"], config.count("moe_intermediate_size")
    layers = sizes["layers"]
    return sizes | {
        "dense": min(config.count("first_k_dense_replace", least=0), layers),
        "q_lora": config.optional_count("q_lora_rank") or 0,
        "kv_lora": config.count("kv_lora_rank"),
        "qk": nope + rope,
        "q": heads * (nope + rope),
        "kv_a": config.count("kv_lora_rank") + rope,
        "nope_v": nope + value,
        "kv_b": heads * (nope + value),
        "v": value,
        "attn": heads * value,
        **expert_dims(config.count("n_routed_experts", least=0), moe),
        "shared": moe * config.count("n_shared_experts", least=0),
        "after_mtp": layers + config.count("num_nextn_predict_layers", default=1, least=0),
    }


ATTENTION = (
    *NORMS,
    Rule(
        "self_attn.q_proj.weight",
        "self_attention/query/kernel",
        ("q", "hidden"),
        to_heads("heads", "qk"),
        when="!q_lora",
    ),
    Rule("self_attn.q_a_proj.weight", "self_attention/wq_a/kernel", ("q_lora", "hidden"), linear, when="q_lora"),
    Rule("self_attn.q_a_layernorm.weight", "self_attention/q_norm/scale", ("q_lora",), when="q_lora"),
    Rule(
        "self_attn.q_b_proj.weight",
        "self_attention/wq_b/kernel",
        ("q", "q_lora"),
        to_heads("heads", "qk"),
        when="q_lora",
    ),
    Rule("self_attn.kv_a_proj_with_mqa.weight", "self_attention/wkv_a/kernel", ("kv_a", "hidden"), linear),
    Rule("self_attn.kv_a_layernorm.weight", "self_attention/kv_norm/scale", ("kv_lora",)),
    Rule("self_attn.kv_b_proj.weight", "self_attention/wkv_b/kernel", ("kv_b", "kv_lora"), to_heads("heads", "nope_v")),
    Rule("self_attn.o_proj.weight", "self_attention/out/kernel", ("hidden", "attn"), from_heads("heads", "v")),
)

SHARED, ROUTED = "DeepSeekMoeBlock_0/shared_experts", "DeepSeekMoeBlock_0/MoeBlock_0"

EXPERTS = (
    Rule("mlp.shared_experts.gate_proj.weight", f"{SHARED}/wi_0/kernel", ("shared", "hidden"), linear, when="shared"),
    Rule("mlp.shared_experts.up_proj.weight", f"{SHARED}/wi_1/kernel", ("shared", "hidden"), linear, when="shared"),
    Rule("mlp.shared_experts.down_proj.weight", f"{SHARED}/wo/kernel", ("hidden", "shared"), linear, when="shared"),
    Rule("mlp.gate.weight", f"{ROUTED}/gate/kernel", ("experts", "hidden"), linear),
    *experts(ROUTED),
)

# The axes of the scanned bias depend on the MaxText that loads it: both loaders of 0.2.5 expect (layers, experts), main
# expects (experts, layers). Rounding it to bfloat16 would change the routing of tokens.
CORRECTION_BIAS = Rule(
    "mlp.gate.e_score_correction_bias",
    f"{ROUTED}/gate/bias",
    ("experts",),
    keep_float32=True,
    scan_axis={"0.2.5": 0, "main": 1},
)

MTP = Drop(
    "multi-token prediction",
    r"model\.layers\.(?P<layer>\d{1,9})\..*",
    "layers from num_hidden_layers on predict more tokens; MaxText's model has none",
    layers=("layers", "after_mtp"),
    marker="model.layers.{layer}.eh_proj.weight",
)


LINE = "first_k_dense_replace"


def scanned(attention: tuple[Rule, ...], experts: tuple[Rule, ...]) -> tuple[Block, ...]:
    """Returns the blocks of the leading dense layers and of the mixture-of-experts layers, each in one scan."""
    return (
        Block("dense_layers", (*attention, *MLP), 0, "dense", because=LINE),
        Block("moe_layers", (*attention, *experts), "dense", "layers", because=LINE),
    )


def unscanned(attention: tuple[Rule, ...], experts: tuple[Rule, ...]) -> tuple[Block, ...]:
    """Returns the same blocks unscanned; each kind is counted from its own first layer."""
    return (
        Block("dense_layers_{place}", (*attention, *MLP), 0, "dense", because=LINE),
        Block("moe_layers_{place}", (*attention, *experts), "dense", "layers", because=LINE),
    )
