"""DeepSeek V3.2: V3 and the indexer of its sparse attention."""

from __future__ import annotations

from conversion_lib.families import deepseek
from conversion_lib.families.common import DROPS, TOP, fused_experts_flag, linear, to_heads
from conversion_lib.families.deepseek import ATTENTION, CORRECTION_BIAS, EXPERTS, MTP, scanned, unscanned
from conversion_lib.mapping.rules import Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims


def dims(config: ModelConfig) -> Dims:
    heads, size = config.count("index_n_heads"), config.count("index_head_dim")
    return {**deepseek.dims(config), "index_heads": heads, "index_dim": size, "index": heads * size}


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
