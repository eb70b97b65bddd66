"""DeepSeek V3, V3.1 and R1: a correction bias in the router."""

from __future__ import annotations

from conversion_lib.families.common import DROPS, TOP, fused_experts_flag
from conversion_lib.families.deepseek import ATTENTION, CORRECTION_BIAS, EXPERTS, MTP, dims, scanned, unscanned
from conversion_lib.mapping.rules import Family

FAMILY = Family(
    name="deepseek_v3",
    architectures=("DeepseekV3ForCausalLM",),
    model_type="deepseek_v3",
    dims=dims,
    rules=TOP,
    scanned=scanned(ATTENTION, (*EXPERTS, CORRECTION_BIAS)),
    unscanned=unscanned(ATTENTION, (*EXPERTS, CORRECTION_BIAS)),
    drops=(*DROPS, MTP),
    detected=fused_experts_flag(),
)
