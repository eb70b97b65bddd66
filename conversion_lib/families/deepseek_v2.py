"""DeepSeek V2 and V2 Lite."""

from __future__ import annotations

from conversion_lib.families.common import DROPS, TOP, fused_experts_flag
from conversion_lib.families.deepseek import ATTENTION, EXPERTS, dims, scanned, unscanned
from conversion_lib.mapping.rules import Family

FAMILY = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    model_type="deepseek_v2",
    dims=dims,
    rules=TOP,
    scanned=scanned(ATTENTION, EXPERTS),
    unscanned=unscanned(ATTENTION, EXPERTS),
    drops=DROPS,
    detected=fused_experts_flag(),
)
