"""DeepSeek V2, V3 and V3.2, and Kimi K2, which has V3's architecture."""

from __future__ import annotations

from dataclasses import replace

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    LAYER_NORMS,
    Readers,
    experts_per_token,
    mlp,
    model,
    refuse_switches,
    rope,
)
from conversion_lib.logits.forward.config import ForwardConfig, Indexer, Latent, Layer, LayerPath, Mlp, Moe
from conversion_lib.logits.forward.rope import yarn_mscale
from conversion_lib.models.hf_config import ModelConfig, shown

V2, V32 = "deepseek_v2", "deepseek_v32"
METHODS = ("greedy", "group_limited_greedy")

LATENT_EPS = 1e-6
"""Of the norms within latent attention: DeepSeek's own code and transformers leave `rms_norm_eps` aside here, and no
key of config.json says it. What says `latent_norm_eps` is what Ferry has of MaxText's model."""


def parse(config: ModelConfig) -> ForwardConfig:
    """Reads DeepSeek: two stacks, dense_layers and moe_layers, which both count from 0."""
    refuse_switches(config, "attention_bias", "mlp_bias")
    count = config.count("num_hidden_layers")
    dense = _dense_layers(config, count)
    attention, dense_mlp, moe = _latent(config), mlp(config), _deepseek_moe(config)

    def layer(n: int) -> Layer:
        stack, index, size = ("dense_layers", n, dense) if n < dense else ("moe_layers", n - dense, count - dense)
        path = LayerPath(stack, (index,), (size,), f"{stack}_{index}")
        return Layer(path, LAYER_NORMS, "self_attention", attention, dense_mlp if n < dense else moe)

    return model(config, tuple(layer(n) for n in range(count)))


def _dense_layers(config: ModelConfig, count: int) -> int:
    """How many leading layers have no experts; V3.2's files may say it layer by layer, and that counts."""
    dense = min(config.count("first_k_dense_replace", least=0), count)
    kinds = config.texts("mlp_layer_types", "num_hidden_layers") if config.model_type == V32 else None
    if kinds is None:
        return dense
    dense = kinds.index("sparse") if "sparse" in kinds else count
    if set(kinds[:dense]) - {"dense"} or set(kinds[dense:]) - {"sparse"}:
        raise BadInput(f"{config.path}: mlp_layer_types {shown(list(kinds))} should be dense first, then sparse")
    return dense


def _latent(config: ModelConfig) -> Latent:
    turning = config.count("qk_rope_head_dim")
    pairs = config.model_type in (V2, V32) or config.flag("rope_interleave")
    rotation = rope(config, turning, pairs=pairs)
    # under YaRN query and key are both stretched by its temperature (arXiv:2309.00071, section 3.4)
    weight = rotation.values.get("mscale_all_dim")
    stretch = yarn_mscale(rotation.values["factor"], weight) if rotation.kind != "default" and weight else 1.0
    nope = config.count("qk_nope_head_dim")
    attention = Latent(
        heads=config.count("num_attention_heads"),
        q_rank=config.optional_count("q_lora_rank"),
        kv_rank=config.count("kv_lora_rank"),
        nope_dim=nope,
        value_dim=config.count("v_head_dim"),
        rope=rotation,
        scale=(nope + turning) ** -0.5 * stretch**2,
        norm_eps=config.number("latent_norm_eps", default=LATENT_EPS, least=0),
    )
    return replace(attention, indexer=_indexer(config, turning)) if config.model_type == V32 else attention


def _indexer(config: ModelConfig, turning: int) -> Indexer:
    config.count("q_lora_rank")  # the indexer's queries come from the low-rank query
    heads, dim, top_k = (config.count(f"index_{key}") for key in ("n_heads", "head_dim", "topk"))
    if dim < turning:
        raise BadInput(f"{config.path}: index_head_dim {dim} is less than qk_rope_head_dim {turning}")
    return Indexer(heads, dim, top_k)


def _deepseek_moe(config: ModelConfig) -> Moe:
    sigmoid = config.model_type != V2
    method = METHODS[0] if sigmoid else config.text("topk_method")
    if method not in METHODS:
        raise BadInput(f"{config.path}: topk_method {shown(method)}; the logit check supports {' and '.join(METHODS)}")
    width, experts = config.count("moe_intermediate_size"), config.count("n_routed_experts")
    per_token = experts_per_token(config, experts)
    score = 2 if sigmoid else 1
    groups, kept = _groups(config, experts, per_token, score) if sigmoid or method != METHODS[0] else (1, 1)
    block = "DeepSeekMoeBlock_0"
    return Moe(
        path=f"{block}/MoeBlock_0",
        experts=experts,
        per_token=per_token,
        width=width,
        scores="sigmoid" if sigmoid else "softmax",
        correction_bias=sigmoid,
        normalize=sigmoid and config.flag("norm_topk_prob"),
        scaling=config.number("routed_scaling_factor"),
        groups=groups,
        groups_kept=kept,
        group_score=score,
        shared=Mlp(f"{block}/shared_experts", width * config.count("n_shared_experts"), "silu"),
    )


def _groups(config: ModelConfig, experts: int, per_token: int, score: int) -> tuple[int, int]:
    """Returns the groups of experts, and how many of them a token may go to; `score` experts rank a group."""
    groups, kept = config.count("n_group"), config.count("topk_group")
    size, rest = divmod(experts, groups)
    if rest or size < score or kept > groups or per_token > kept * size:
        raise BadInput(
            f"{config.path}: n_group {groups} should divide n_routed_experts {experts} into groups of at least "
            f"{score}, and topk_group {kept} of them should have num_experts_per_tok {per_token} experts"
        )
    return groups, kept


READERS: Readers = {
    "deepseek_v2": parse,
    "deepseek_v3": parse,
    "deepseek_v32": parse,
    "kimi_k2": parse,
}
