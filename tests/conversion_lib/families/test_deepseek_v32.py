"""DeepSeek V3.2: V3 and the indexer of its sparse attention."""

from __future__ import annotations

from tests.conversion_lib.families.test_deepseek_v3 import BIAS_HAS_NO_NAME
from tests.support.family import Description, Leaf, Parity, Published, Refusal, Variant
from tests.support.family_tests import FamilyTests
from tests.support.sparse_checkpoints import DEEPSEEK_V3_CONFIG, deepseek_tensors
from tests.support.tiny_sizes import GROUPED_ROUTER, LATENT

V32 = {
    **DEEPSEEK_V3_CONFIG,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}

DESCRIPTION = Description(
    name="deepseek_v32",
    published={"deepseek3.2-671b": Published(V32, 671_877_944_064, deepseek_tensors)},
    leaves=(
        Leaf(
            "deepseek3.2-671b",
            "moe_layers/self_attention/indexer/wk/kernel",
            (7168, 58, 128),
            "model.layers.4.self_attn.indexer.wk.weight",
        ),
    ),
    refusals=(Refusal("deepseek3.2-671b", {"index_n_heads": 0}, "index_n_heads should be an integer of at least 1"),),
    tiny=LATENT | GROUPED_ROUTER | {"index_n_heads": 12, "index_head_dim": 24, "index_topk": 8},
    config_class="DeepseekV32Config",
    left_out={"model.layers.61.": "multi-token prediction"},
    parity=Parity(
        variants=(Variant("odd_vocabulary", {"layers": 2, "vocab_size": 509, "seed": 4}, scans=(True,)),),
        cannot_convert={True: BIAS_HAS_NO_NAME, False: BIAS_HAS_NO_NAME},
    ),
)


class TestDeepseekV32(FamilyTests):
    """Every leaf, and the logit check: `test_convert.py` and `test_forward.py`, from weights laid out by hand."""

    described = DESCRIPTION
