"""DeepSeek V2, V3 and V3.2, and Kimi K2, which has V3's architecture."""

from __future__ import annotations

from dataclasses import replace

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    LAYER_NORMS,
    Raw,
    Readers,
    integer,
    mlp,
    model,
    refuse_switches,
    rope,
)
from conversion_lib.logits.forward.config import ForwardConfig, Indexer, Latent, Layer, LayerPath, Mlp, Moe
from conversion_lib.logits.forward.rope import yarn_mscale


def parse(raw: Raw) -> ForwardConfig:
    """Reads DeepSeek: two stacks, dense_layers and moe_layers, which both count from 0."""
    refuse_switches(raw, "attention_bias", "mlp_bias")
    count = integer(raw, "num_hidden_layers")
    dense = min(int(raw.get("first_k_dense_replace", 0 if raw["model_type"] == "deepseek_v2" else 3)), count)
    attention, dense_mlp, moe = _latent(raw), mlp(raw), _deepseek_moe(raw)

    def layer(n: int) -> Layer:
        stack, index, size = ("dense_layers", n, dense) if n < dense else ("moe_layers", n - dense, count - dense)
        path = LayerPath(stack, (index,), (size,), f"{stack}_{index}")
        return Layer(path, LAYER_NORMS, "self_attention", attention, dense_mlp if n < dense else moe)

    return model(raw, tuple(layer(n) for n in range(count)))


def _latent(raw: Raw) -> Latent:
    turning = integer(raw, "qk_rope_head_dim")
    rotation = rope(raw, turning, pairs=bool(raw.get("rope_interleave", True)))
    # under YaRN, query and key are both scaled by its temperature (arXiv:2309.00071, section 3.4)
    weight = rotation.values.get("mscale_all_dim")
    stretch = yarn_mscale(rotation.values["factor"], weight) if rotation.kind != "default" and weight else 1.0
    nope = integer(raw, "qk_nope_head_dim")
    attention = Latent(
        heads=integer(raw, "num_attention_heads"),
        q_rank=raw.get("q_lora_rank"),
        kv_rank=integer(raw, "kv_lora_rank"),
        nope_dim=nope,
        value_dim=integer(raw, "v_head_dim"),
        rope=rotation,
        scale=(nope + turning) ** -0.5 * stretch**2,
    )
    if raw["model_type"] != "deepseek_v32":
        return attention
    integer(raw, "q_lora_rank")  # the indexer's queries come from the low-rank query
    heads, dim, top_k = (integer(raw, f"index_{key}") for key in ("n_heads", "head_dim", "topk"))
    return replace(attention, indexer=Indexer(heads, dim, top_k))


def _deepseek_moe(raw: Raw) -> Moe:
    sigmoid = raw["model_type"] != "deepseek_v2"
    method = raw.get("topk_method") or "greedy"
    if not sigmoid and method not in ("greedy", "group_limited_greedy"):
        raise BadInput(f"config.json: topk_method {method!r}; the logit check supports greedy and group_limited_greedy")
    grouped = sigmoid or method == "group_limited_greedy"
    width = integer(raw, "moe_intermediate_size")
    block = "DeepSeekMoeBlock_0"
    return Moe(
        path=f"{block}/MoeBlock_0",
        experts=integer(raw, "n_routed_experts"),
        per_token=integer(raw, "num_experts_per_tok"),
        width=width,
        scores="sigmoid" if sigmoid else "softmax",
        correction_bias=sigmoid,
        normalize=sigmoid and bool(raw.get("norm_topk_prob", True)),
        scaling=float(raw.get("routed_scaling_factor", 2.5 if sigmoid else 1.0)),
        groups=integer(raw, "n_group") if grouped else 1,
        groups_kept=integer(raw, "topk_group") if grouped else 1,
        group_score=2 if sigmoid else 1,
        shared=Mlp(f"{block}/shared_experts", width * integer(raw, "n_shared_experts"), "silu"),
    )


READERS: Readers = {
    "deepseek_v2": parse,
    "deepseek_v3": parse,
    "deepseek_v32": parse,
    "kimi_k2": parse,
}
