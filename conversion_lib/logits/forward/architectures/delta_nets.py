"""Qwen 3 Next and 3.5: three layers of gated delta nets, then one of gated attention; experts in every layer."""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.logits.forward.architectures.common import (
    Raw,
    Readers,
    grouped_query,
    integer,
    kinds_of_layers,
    mlp,
    model,
    refuse_switches,
    rope,
)
from conversion_lib.logits.forward.config import DeltaNet, ForwardConfig, GroupedQuery, Layer, LayerPath, Moe, Norms

LINEAR, FULL = "linear_attention", "full_attention"
CYCLE = (LINEAR, LINEAR, LINEAR, FULL)
NORMS = Norms("input_layernorm/scale", None, "post_attention_layernorm/scale", None)
HEAD_DIM, ROTATED = 256, 0.25
"""Defaults of `head_dim` and `partial_rotary_factor` in transformers' classes."""


def qwen3_next(raw: Raw) -> ForwardConfig:
    """Reads Qwen 3 Next.

    In the scan, a cycle is three delta nets, stacked on an axis of their own, and one layer of attention. Remainder
    delta nets are one stack. Norms store their scale minus one, except the norm inside the delta net.
    """
    refuse_switches(raw, "mlp_only_layers")
    if raw.get("decoder_sparse_step", 1) != 1:
        raise BadInput(
            f"config.json: decoder_sparse_step {raw['decoder_sparse_step']}; the logit check supports only 1"
        )

    def path_of(n: int, count: int) -> LayerPath:
        cycle, within = divmod(n, len(CYCLE))
        cycles = count // len(CYCLE)
        if cycle == cycles:
            left_over = count % len(CYCLE)
            return LayerPath("layers_remainder/local_layers", (within,), (left_over,), f"layers_{n}")
        if CYCLE[within] == FULL:
            return LayerPath("layers/global_layer", (cycle,), (cycles,), f"layers_{n}")
        return LayerPath("layers/local_layers", (cycle, within), (cycles, CYCLE.index(FULL)), f"layers_{n}")

    count = integer(raw, "num_hidden_layers")
    return _model(raw, [path_of(n, count) for n in range(count)], normalize=bool(raw.get("norm_topk_prob", True)))


def qwen3_5(raw: Raw) -> ForwardConfig:
    """Reads Qwen 3.5: in the scan, each position of the cycle is a stack."""
    count = integer(raw, "num_hidden_layers")
    cycles = count // len(CYCLE)
    paths = [
        LayerPath(f"layers/layer_{n % len(CYCLE)}", (n // len(CYCLE),), (cycles,), f"layers_{n}") for n in range(count)
    ]
    return _model(raw, paths, normalize=True)


def _model(raw: Raw, paths: list[LayerPath], *, normalize: bool) -> ForwardConfig:
    refuse_switches(raw, "attention_bias")
    if raw.get("full_attention_interval", len(CYCLE)) != len(CYCLE) and not raw.get("layer_types"):
        raise BadInput(f"config.json: full_attention_interval {raw['full_attention_interval']}, expected 4")
    net, attention, moe = _delta_net(raw), _attention(raw), _moe(raw, normalize)
    layers = tuple(
        Layer(path, NORMS, "attention", net, moe)
        if kind == LINEAR
        else Layer(path, NORMS, "attention/attention", attention, moe)
        for path, kind in zip(paths, kinds_of_layers(raw, CYCLE), strict=True)
    )
    return model(raw, layers, norm_offset=1.0)


def _delta_net(raw: Raw) -> DeltaNet:
    return DeltaNet(
        key_heads=integer(raw, "linear_num_key_heads", 16),
        value_heads=integer(raw, "linear_num_value_heads", 32),
        key_dim=integer(raw, "linear_key_head_dim", 128),
        value_dim=integer(raw, "linear_value_head_dim", 128),
        taps=integer(raw, "linear_conv_kernel_dim", 4),
    )


def _attention(raw: Raw) -> GroupedQuery:
    rotation = rope(raw, integer(raw, "head_dim", HEAD_DIM), pairs=False, partial=ROTATED)
    return grouped_query(raw, head_dim=HEAD_DIM, rope=rotation, norms="head", norm_offset=1.0, gated=True)


def _moe(raw: Raw, normalize: bool) -> Moe:
    return Moe(
        path="mlp/routed_experts",
        experts=integer(raw, "num_experts", raw.get("num_local_experts")),
        per_token=integer(raw, "num_experts_per_tok"),
        width=integer(raw, "moe_intermediate_size", 512),
        scores="softmax",
        normalize=normalize,
        shared=mlp({"shared_expert_intermediate_size": 512, **raw}, "mlp/shared_expert", width=SHARED_WIDTH),
        shared_gate="mlp/shared_expert_gate/kernel",
    )


SHARED_WIDTH = "shared_expert_intermediate_size"


READERS: Readers = {
    "qwen3_next": qwen3_next,
    "qwen3_5_moe": qwen3_5,
    "qwen3_5_moe_text": qwen3_5,
}
