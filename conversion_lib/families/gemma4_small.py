"""Gemma 4 E2B and E4B: a separate input for each layer; later layers share keys and values; unscanned only."""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.families import gemma4
from conversion_lib.families.common import DROPS, from_heads, linear, require_layer_types, to_heads
from conversion_lib.families.gemma import mlp, norms
from conversion_lib.mapping.rules import Block, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims

CYCLES = (5, 6)
"""Lengths of a cycle in E2B and E4B. A cycle ends with a layer with global attention."""


def dims(config: ModelConfig) -> Dims:
    sizes = gemma4.attention_dims(config)
    cycle = _cycle(config)
    layers, first_shared = sizes["layers"], sizes["layers"] - config.count("num_kv_shared_layers", least=0)
    if layers % cycle or first_shared % cycle or first_shared < 0:
        raise BadInput(
            f"{config.path}: num_hidden_layers = {layers} and num_kv_shared_layers = {layers - first_shared} should "
            f"both be multiples of {cycle}, the length of a cycle of layer_types, and the second should not be larger"
        )
    per_layer = config.count("hidden_size_per_layer_input")
    return sizes | {
        "per_layer": per_layer,
        "all_layers_input": layers * per_layer,
        "per_layer_vocab": config.count("vocab_size_per_layer_input"),
        "later_mlp": sizes["mlp"] * (2 if config.flag("use_double_wide_mlp") else 1),
        "cycle": cycle,
        "locals": cycle - 1,
        "first_shared": first_shared,
        "first_shared_global": first_shared + cycle - 1,
    }


def _cycle(config: ModelConfig) -> int:
    kinds = config.texts("layer_types")
    if kinds is None:
        return max(CYCLES)  # as the class has it
    cycle = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
    if cycle not in CYCLES:
        raise BadInput(
            f"{config.path}: layer_types should have full_attention in every {CYCLES[0]}th or {CYCLES[1]}th layer, "
            "as in MaxText's models"
        )
    require_layer_types(config, (*["sliding_attention"] * (cycle - 1), "full_attention"))
    return cycle


def without_keys(q: str, head_dim: str) -> tuple[Rule, ...]:
    """Returns the rules of attention that uses the keys and values of an earlier layer; as `gemma4.attention`."""
    to = "self_attention"
    return (
        Rule("self_attn.q_proj.weight", f"{to}/query/kernel", (q, "hidden"), to_heads("heads", head_dim)),
        Rule("self_attn.o_proj.weight", f"{to}/out/kernel", ("hidden", q), from_heads("heads", head_dim)),
        Rule("self_attn.q_norm.weight", f"{to}/query_norm/scale", (head_dim,)),
    )


COMMON = (
    *norms(from_zero=False),
    Rule("layer_scalar", "layer_scalar", ("one",)),
    Rule("per_layer_input_gate.weight", "per_layer_input_gate/kernel", ("per_layer", "hidden"), linear),
    Rule("per_layer_projection.weight", "per_layer_projection/kernel", ("hidden", "per_layer"), linear),
    Rule("post_per_layer_input_norm.weight", "post_per_layer_input_norm/scale", ("hidden",)),
)
EARLY, LATER = (*COMMON, *mlp("mlp")), (*COMMON, *mlp("mlp", "later_mlp"))
NAME = "layers_{layer}"

PER_LAYER = (
    Rule(
        "model.embed_tokens_per_layer.weight",
        "decoder/per_layer_embedder/embed_tokens_per_layer",
        ("per_layer_vocab", "all_layers_input"),
    ),
    Rule(
        "model.per_layer_model_projection.weight",
        "decoder/per_layer_embedder/per_layer_model_projection/kernel",
        ("all_layers_input", "hidden"),
        linear,
    ),
    Rule(
        "model.per_layer_projection_norm.weight",
        "decoder/per_layer_embedder/per_layer_projection_norm/scale",
        ("per_layer",),
    ),
)

FAMILY = Family(
    name="gemma4_small",
    architectures=("Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"),
    model_type="gemma4",
    fits=gemma4.has_per_layer_inputs,
    dims=dims,
    rules=(*gemma4.TOP, *PER_LAYER),
    scanned=(),
    unscanned=(
        Block(NAME, (*gemma4.LOCAL, *EARLY), 0, "first_shared", "cycle", run="locals"),
        Block(NAME, (*gemma4.GLOBAL, *EARLY), "locals", "first_shared", "cycle"),
        Block(NAME, (*without_keys("q", "head_dim"), *LATER), "first_shared", "layers", "cycle", run="locals"),
        Block(NAME, (*without_keys("global_q", "global_dim"), *LATER), "first_shared_global", "layers", "cycle"),
    ),
    drops=(*DROPS, gemma4.TOWERS),
    prefixes=gemma4.PREFIXES,
)
