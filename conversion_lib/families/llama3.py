"""Llama 3.1, 3.2 and 3.3: MaxText divides the query by sqrt(head_dim), and interleaves query and key for RoPE.

MaxText has no model for the small Llama 3.2, whose head is tied. A run of it needs `logits_via_embedding=true` and
`normalize_embedding_logits=false` in addition to the sizes.
"""

from __future__ import annotations

from conversion_lib.families.common import (
    DROPS,
    MLP,
    NORMS,
    TOP,
    VALUE_AND_OUT,
    grouped_query_dims,
    one_by_one,
    one_scan,
)
from conversion_lib.mapping.rules import Family, Rule
from conversion_lib.plan.ops import Interleave, Op, Split, Transpose
from conversion_lib.plan.value_ops import Scale
from conversion_lib.sources.joined import Dims


def query(dims: Dims) -> tuple[Op, ...]:
    heads = Split(1, (dims["heads"], dims["head_dim"]))
    return Transpose(), heads, Interleave(2), Scale(dims["head_dim"])


def key(dims: Dims) -> tuple[Op, ...]:
    return Transpose(), Split(1, (dims["kv_heads"], dims["head_dim"])), Interleave(2)


LAYER = (
    *NORMS,
    Rule("self_attn.q_proj.weight", "self_attention/query/kernel", ("q", "hidden"), query),
    Rule("self_attn.k_proj.weight", "self_attention/key/kernel", ("kv", "hidden"), key),
    *VALUE_AND_OUT,
    *MLP,
)

FAMILY = Family(
    name="llama3.1",
    architectures=("LlamaForCausalLM",),
    model_type="llama",
    dims=grouped_query_dims,
    rules=TOP,
    scanned=one_scan(*LAYER),
    unscanned=one_by_one(*LAYER),
    drops=DROPS,
)
