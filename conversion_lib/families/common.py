"""The parts that many tables share: embeddings, norms, and the ops of a linear layer.

A family's `dims` follows the contract in `mapping.rules.Family`. The functions here that return ops say how they change
a tensor's shape.
"""

from __future__ import annotations

from collections.abc import Sequence

from conversion_lib.errors import BadInput
from conversion_lib.mapping.rules import Block, DetectedFlag, Drop, OpsOf, Rule
from conversion_lib.models.hf_config import ModelConfig, shown
from conversion_lib.plan.ops import Op, Permute, Pick, Split, Transpose
from conversion_lib.plan.value_ops import Scale
from conversion_lib.sources.joined import Dims
from conversion_lib.sources.quantization import activations


def linear(dims: Dims) -> tuple[Op, ...]:
    """Returns the ops (out, in) -> (in, out)."""
    return (Transpose(),)


def to_heads(heads: str, head_dim: str) -> OpsOf:
    """Returns the ops (heads·head_dim, in) -> (in, heads, head_dim), for the names of two dims."""
    return lambda dims: (Transpose(), Split(1, (dims[heads], dims[head_dim])))


def from_heads(heads: str, head_dim: str) -> OpsOf:
    """Returns the ops (out, heads·head_dim) -> (heads, head_dim, out), for the names of two dims."""
    return lambda dims: (Transpose(), Split(0, (dims[heads], dims[head_dim])))


def bias_to_heads(heads: str, head_dim: str) -> OpsOf:
    """Returns the ops (heads·head_dim,) -> (heads, head_dim), for the names of two dims."""
    return lambda dims: (Split(0, (dims[heads], dims[head_dim])),)


def scaled_query(root: str) -> OpsOf:
    """Returns the ops of `to_heads` and a division by the square root of the size `root`."""
    return lambda dims: (Transpose(), Split(1, (dims["heads"], dims["head_dim"])), Scale(dims[root]))


def half(index: int) -> OpsOf:
    """Returns the ops (experts, 2·moe, hidden) -> (experts, hidden, moe) for gate (index 0) or up (index 1)."""

    def ops(dims: Dims) -> tuple[Op, ...]:
        return Split(1, (2, dims["moe"])), Pick(1, index, 2), Permute((0, 2, 1))

    return ops


def experts_transposed(dims: Dims) -> tuple[Op, ...]:
    """Returns the ops (experts, out, in) -> (experts, in, out)."""
    return (Permute((0, 2, 1)),)


FUSED = "fused_experts"
GATE_UP = ("experts", "gate_up", "hidden")


def fused_experts(to: str, when: str) -> tuple[Rule, ...]:
    """Returns the rules for experts that are stacked in one tensor, as in transformers' classes.

    Args:
        to: The path of the experts in MaxText.
        when: The condition of the rules, as in Rule.
    """
    return (
        Rule("mlp.experts.gate_up_proj", f"{to}/wi_0", GATE_UP, half(0), when=when),
        Rule("mlp.experts.gate_up_proj", f"{to}/wi_1", GATE_UP, half(1), when=when),
        Rule("mlp.experts.down_proj", f"{to}/wo", ("experts", "hidden", "moe"), experts_transposed, when=when),
    )


def experts(to: str) -> tuple[Rule, ...]:
    """Returns the rules for experts, with one tensor for each or one for all.

    The family needs the dims of `expert_dims` and, in `detected`, `fused_experts_flag`.

    Args:
        to: The path of the experts in MaxText.
    """
    return (
        Rule("mlp.experts.{expert}.gate_proj.weight", f"{to}/wi_0", ("moe", "hidden"), linear, when=f"!{FUSED}"),
        Rule("mlp.experts.{expert}.up_proj.weight", f"{to}/wi_1", ("moe", "hidden"), linear, when=f"!{FUSED}"),
        Rule("mlp.experts.{expert}.down_proj.weight", f"{to}/wo", ("hidden", "moe"), linear, when=f"!{FUSED}"),
        *fused_experts(to, FUSED),
    )


def fused_experts_flag(*, published_fused: bool = False) -> dict[str, DetectedFlag]:
    """Returns the `detected` dims of a family with `experts`.

    Args:
        published_fused: Whether the checkpoints on the Hub have one tensor for all experts.
    """
    return {FUSED: DetectedFlag(".mlp.experts.gate_up_proj", int(published_fused))}


def expert_dims(experts: int, moe: int) -> dict[str, int]:
    """Returns the dims that the rules of `experts` and `fused_experts` need.

    Args:
        experts: The number of experts.
        moe: The intermediate size of an expert.
    """
    return {"experts": experts, "moe": moe, "gate_up": 2 * moe}


TOP = (
    Rule("model.embed_tokens.weight", "token_embedder/embedding", ("vocab", "hidden")),
    Rule("model.norm.weight", "decoder/decoder_norm/scale", ("hidden",)),
    Rule("lm_head.weight", "decoder/logits_dense/kernel", ("vocab", "hidden"), linear, when="!tied"),
)

NORMS = (
    Rule("input_layernorm.weight", "pre_self_attention_layer_norm/scale", ("hidden",)),
    Rule("post_attention_layernorm.weight", "post_self_attention_layer_norm/scale", ("hidden",)),
)

QUERY = Rule("self_attn.q_proj.weight", "self_attention/query/kernel", ("q", "hidden"), to_heads("heads", "head_dim"))
KEY = Rule("self_attn.k_proj.weight", "self_attention/key/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim"))
VALUE_AND_OUT = (
    Rule("self_attn.v_proj.weight", "self_attention/value/kernel", ("kv", "hidden"), to_heads("kv_heads", "head_dim")),
    Rule("self_attn.o_proj.weight", "self_attention/out/kernel", ("hidden", "q"), from_heads("heads", "head_dim")),
)

MLP = (
    Rule("mlp.gate_proj.weight", "mlp/wi_0/kernel", ("mlp", "hidden"), linear),
    Rule("mlp.up_proj.weight", "mlp/wi_1/kernel", ("mlp", "hidden"), linear),
    Rule("mlp.down_proj.weight", "mlp/wo/kernel", ("hidden", "mlp"), linear),
)

ATTENTION_MODULES = "self_attn|attn|attention"

DROPS = (
    Drop(
        "tied head",
        r"(.*\.)?lm_head\.weight",
        "tie_word_embeddings: MaxText uses the embedding for the logits",
        when="tied",
    ),
    Drop(
        "rotary tables",
        r"(.*\.)?((\w+_)?inv_freq|(cos|sin)_cached|cos_sin_cache|freqs_cis)",
        "computed from the config, not read",
    ),
    Drop(
        "causal masks",
        rf"(.*\.)?({ATTENTION_MODULES})\.(bias|mask|attn_mask|causal_mask)|(.*\.)?causal_mask",
        "made for the prompt, not read",
        least_axes=2,
    ),
    Drop(
        "constants of masks",
        rf"(.*\.)?({ATTENTION_MODULES})\.masked_bias|(.*\.)?position_ids",
        "made for the prompt, not read",
    ),
    Drop("activation scales", activations.PATTERN, activations.REASON),
)
"""Tensors that no family uses: buffers that older classes saved, and scales of activations."""


def base_dims(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes that every decoder has: layers, vocab, hidden, mlp, heads, and the flag tied.

    `mlp` is 0 for a class whose layers have no dense MLP.

    Raises:
        BadInput: A size is missing and the class has no default, or is not a positive integer.
    """
    return {
        "layers": config.count("num_hidden_layers"),
        "vocab": config.count("vocab_size"),
        "hidden": config.count("hidden_size"),
        "mlp": config.count("intermediate_size", default=0),
        "heads": config.count("num_attention_heads"),
        "tied": int(config.flag("tie_word_embeddings")),
    }


def grouped_query_dims(config: ModelConfig) -> dict[str, int]:
    """Returns the sizes of `base_dims` and those of grouped-query attention: kv_heads, head_dim, q, kv.

    If neither the config nor its class gives them, head_dim is hidden / heads, and kv_heads is heads.

    Raises:
        BadInput: As `base_dims` raises it.
    """
    dims = base_dims(config)
    size = config.optional_count("head_dim") or dims["hidden"] // dims["heads"]
    if not size:
        raise BadInput(
            f"{config.path}: hidden_size = {dims['hidden']} is less than num_attention_heads = {dims['heads']}"
        )
    kv_heads = config.optional_count("num_key_value_heads") or dims["heads"]
    return dims | {"kv_heads": kv_heads, "head_dim": size, "q": dims["heads"] * size, "kv": kv_heads * size}


def one_scan(*rules: Rule) -> tuple[Block, ...]:
    """Returns the block of a model whose layers are all alike, in one scan."""
    return (Block("layers", rules),)


def one_by_one(*rules: Rule) -> tuple[Block, ...]:
    """Returns the block of a model whose layers are all alike, each with leaves of its own."""
    return (Block("layers_{layer}", rules),)


def scan_of_cycles(name: str, cycle: Sequence[str], *rules: Rule) -> tuple[Block, ...]:
    """Returns blocks for layers in cycles of several kinds, stacked by their position in the cycle.

    The family needs the dim `cycles_end`: the end of the last whole cycle.

    Args:
        name: The blocks' path, with `{}` for the position in the cycle.
        cycle: The kinds of a cycle's layers.
        *rules: The rules of each layer.
    """
    return tuple(Block(name.format(index), rules, index, "cycles_end", len(cycle)) for index in range(len(cycle)))


def whole_cycles(layers: int, cycle: Sequence[str]) -> int:
    """Returns how many of `layers` are in whole cycles."""
    return layers - layers % len(cycle)


def require_layer_types(config: ModelConfig, cycle: Sequence[str], *, interval_key: str | None = None) -> None:
    """Refuses a config with other kinds of layers than MaxText's model.

    Args:
        config: The config.json. Without `layer_types` it is accepted.
        cycle: The kinds of layers in MaxText's model, repeated.
        interval_key: The key of older files for the length of a cycle, instead of `layer_types`; None: no such key.

    Raises:
        BadInput: A layer has another kind, or a cycle another length.
    """
    kinds = config.texts("layer_types", "num_hidden_layers")
    if kinds is None and interval_key is not None and (interval := config.count(interval_key)) != len(cycle):
        raise BadInput(f"{config.path}: {interval_key} = {interval}, but MaxText's model has cycles of {len(cycle)}")
    for layer, kind in enumerate(kinds or ()):
        expected = cycle[layer % len(cycle)]
        if kind != expected:
            raise BadInput(
                f"{config.path}: layer_types[{layer}] is {shown(kind)}, but MaxText's model has {expected} there: "
                f"its cycle is {', '.join(cycle)}"
            )


def require_no_dense_layers(config: ModelConfig) -> None:
    """Refuses a config in which some layers have no experts.

    Raises:
        BadInput: `mlp_only_layers` or `decoder_sparse_step` says so.
    """
    if layers := config.integers("mlp_only_layers"):
        raise BadInput(
            f"{config.path}: mlp_only_layers = {shown(list(layers))} leaves layers without experts, but MaxText's "
            "model has them in all"
        )
    if (step := config.count("decoder_sparse_step", default=1)) != 1:
        raise BadInput(
            f"{config.path}: decoder_sparse_step = {step} leaves layers without experts, but MaxText's model has them "
            "in all"
        )
