"""DeepSeek V3.2: V3 and the indexer of its sparse attention."""

from __future__ import annotations

from conversion_lib.errors import BadInput
from conversion_lib.families import deepseek
from conversion_lib.families.common import DROPS, TOP, fused_experts_flag, linear, to_heads
from conversion_lib.families.deepseek import ATTENTION, CORRECTION_BIAS, EXPERTS, MTP, scanned, unscanned
from conversion_lib.mapping.rules import Family, Rule
from conversion_lib.models.hf_config import ModelConfig, shown
from conversion_lib.sources.joined import Dims


def dims(config: ModelConfig) -> Dims:
    sizes, heads, size = deepseek.dims(config), config.count("index_n_heads"), config.count("index_head_dim")
    dense = _dense_layers(config, sizes)
    return {**sizes, "dense": dense, "index_heads": heads, "index_dim": size, "index": heads * size}


def _dense_layers(config: ModelConfig, sizes: Dims) -> int:
    """How many leading layers have no experts. Newer files say it layer by layer, and that counts."""
    kinds = config.texts("mlp_layer_types", "num_hidden_layers")
    if kinds is None:
        return sizes["dense"]
    dense = kinds.count("dense")
    if kinds != (*["dense"] * dense, *["sparse"] * (len(kinds) - dense)):
        raise BadInput(
            f"{config.path}: mlp_layer_types = {shown(list(kinds))} should be dense for the first layers and sparse "
            "for the others, as MaxText's model has them"
        )
    return dense


FROM, TO = "self_attn.indexer", "self_attention/indexer"

INDEXER = (
    Rule(f"{FROM}.wq_b.weight", f"{TO}/wq_b/kernel", ("index", "q_lora"), to_heads("index_heads", "index_dim")),
    Rule(f"{FROM}.wk.weight", f"{TO}/wk/kernel", ("index_dim", "hidden"), linear),
    Rule(f"{FROM}.k_norm.weight", f"{TO}/k_norm/scale", ("index_dim",)),
    Rule(f"{FROM}.k_norm.bias", f"{TO}/k_norm/bias", ("index_dim",)),
    Rule(f"{FROM}.weights_proj.weight", f"{TO}/weights_proj/kernel", ("index_heads", "hidden"), linear),
)

FAMILY = Family(
    name="deepseek_v32",
    architectures=("DeepseekV32ForCausalLM",),
    model_type="deepseek_v32",
    dims=dims,
    rules=TOP,
    scanned=scanned((*ATTENTION, *INDEXER), (*EXPERTS, CORRECTION_BIAS)),
    unscanned=unscanned((*ATTENTION, *INDEXER), (*EXPERTS, CORRECTION_BIAS)),
    drops=(*DROPS, MTP),
    detected=fused_experts_flag(),
)
