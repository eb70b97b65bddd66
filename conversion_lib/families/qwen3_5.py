"""Qwen 3.5's mixture-of-experts models: Qwen 3 Next with separate tensors for the projections into a delta net."""

from __future__ import annotations

from collections.abc import Sequence

from conversion_lib.families import qwen3_next
from conversion_lib.families.common import DROPS, TOP, fused_experts_flag, linear
from conversion_lib.families.qwen3_next import CYCLE, DELTA_NET, FULL, LAST, MTP, SHARED
from conversion_lib.mapping.rules import Block, Drop, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims, Join


def dims(config: ModelConfig) -> Dims:
    sizes = qwen3_next.dims(config)
    return {
        **sizes,
        "key_heads": config.count("linear_num_key_heads"),
        "key_dim": config.count("linear_key_head_dim"),
    }


def qkvz_rows(dims: Dims) -> Sequence[tuple[int, int, int]]:
    """Returns, for each key head, the rows of query, key and values in the first part, and of gates in the second."""
    heads, key = dims["key_heads"], dims["key_dim"]
    value, keys = dims["values"] // heads, heads * key
    rows = []
    for head in range(heads):
        rows += [(0, start + head * key, start + (head + 1) * key) for start in (0, keys)]
        rows += [(part, start + head * value, start + (head + 1) * value) for part, start in ((0, 2 * keys), (1, 0))]
    return rows


def ba_rows(dims: Dims) -> Sequence[tuple[int, int, int]]:
    """Returns, for each key head, its rows in the first part and in the second."""
    each = dims["value_heads"] // dims["key_heads"]
    return [(part, head * each, (head + 1) * each) for head in range(dims["key_heads"]) for part in (0, 1)]


JOINS = (
    Join(
        "linear_attn.in_proj_{qkv,z}.weight",
        ("linear_attn.in_proj_qkv.weight", "linear_attn.in_proj_z.weight"),
        qkvz_rows,
    ),
    Join(
        "linear_attn.in_proj_{b,a}.weight",
        ("linear_attn.in_proj_b.weight", "linear_attn.in_proj_a.weight"),
        ba_rows,
    ),
)

INTO = (
    Rule("linear_attn.in_proj_{qkv,z}.weight", "attention/in_proj_qkvz/kernel", ("qkvz", "hidden"), linear),
    Rule("linear_attn.in_proj_{b,a}.weight", "attention/in_proj_ba/kernel", ("ba", "hidden"), linear),
)

LINEAR_LAYER = (*SHARED, *INTO, *DELTA_NET)
FULL_LAYER = (*SHARED, *FULL)

VISION = Drop("vision tower", r"(model\.)?visual\..*", "only the text model is converted")


def cycles(name: str, stop: str) -> tuple[Block, ...]:
    """Returns a block for each position in a cycle, which replaces `{}` in `name`; `stop` as in Block."""
    layers = [*[LINEAR_LAYER] * LAST, FULL_LAYER]
    return tuple(Block(name.replace("{}", str(i)), rules, i, stop, len(CYCLE)) for i, rules in enumerate(layers))


FAMILY = Family(
    name="qwen3.5",
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    model_type="qwen3_5_moe",
    dims=dims,
    rules=TOP,
    scanned=cycles("layers/layer_{}", "cycles_end"),
    unscanned=cycles("layers_{layer}", "layers"),
    drops=(*DROPS, MTP, VISION),
    prefixes=("model.language_model.", "model."),
    joins=JOINS,
    # published in bfloat16: one tensor for all experts; quantized or written by transformers: one for each
    detected=fused_experts_flag(published_fused=True),
)
