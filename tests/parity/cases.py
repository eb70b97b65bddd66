"""What is compared with MaxText: models, and the targets that each is converted to. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_KL = 1e-6
"""Per token, float32 on both sides. Seen: 1e-11."""

ROUNDED_TABLE = 1e-3
"""Where MaxText's rounding of a tied table to bfloat16 for the logits loses bits. Seen: 1e-4 (Gemma 3), 2e-5."""

LONG = 512
"""Tokens; a short prompt hides errors in RoPE."""


@dataclass(frozen=True)
class Model:
    """A small checkpoint of a family; `config` goes to `make_tiny`.

    names_known: whether MaxText's own conversion finds its tensors under the names that they have.
    max_kl: how far MaxText's logits may be from transformers'.
    """

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    tokens: int = 64
    scans: tuple[bool, ...] = (True, False)
    fp8: bool = False
    names_known: bool = True
    max_kl: float = MAX_KL


@dataclass(frozen=True)
class Case:
    """One conversion."""

    model: Model
    scan: bool
    save_dtype: str = "bfloat16"
    ocdbt: bool = True
    zarr3: bool = True
    maxtext: str = "0.2.5"
    logits: bool = True

    @property
    def layers(self) -> str:
        return "scanned" if self.scan else "unscanned"

    @property
    def storage(self) -> str:
        return "+".join(word for word, on in (("ocdbt", self.ocdbt), ("zarr3", self.zarr3)) if on) or "neither"

    @property
    def name(self) -> str:
        words = [self.model.name, self.layers, self.save_dtype, self.storage]
        return "-".join(words + ["for_main"] * (self.maxtext == "main"))

    @property
    def maxtext_converts(self) -> bool:
        readable = self.model.names_known and not self.model.fp8
        return readable and (self.model.family, self.scan) not in CANNOT_CONVERT


# What MaxText 0.2.5 cannot convert -> (why, what its error says).
_AXIS = (
    "it stacks the router's gate on the experts' axis instead of the layers'",
    "cannot reshape array",
)
_GATE = (_AXIS[0], "Shape mismatch")
_BIAS = (
    "its model has the router's bias in the collection MoEBiasVar, its table of names does not have it",
    "MoEBiasVar",
)
CANNOT_CONVERT = {
    ("mixtral", True): _GATE,
    ("deepseek_v2", True): _AXIS,
    ("deepseek_v3", True): _BIAS,
    ("deepseek_v3", False): _BIAS,
    ("deepseek_v32", True): _BIAS,
    ("deepseek_v32", False): _BIAS,
}

FAMILIES = (
    "llama3.1",
    "qwen2.5",
    "qwen3",
    "qwen3_moe",
    "mixtral",
    "gpt_oss",
    "gemma2",
    "gemma3",
    "gemma4",
    "gemma4_small",
    "qwen3_next",
    "qwen3.5",
    "olmo3",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
)
UNSCANNED_ONLY = ("gemma4_small",)
# MaxText's table has the names of transformers' class, not those of the published files. And with the usual seed, two
# experts' scores for one token of DeepSeek V2 lie 7e-7 apart, less than float32 tells for sure.
OTHERWISE = {"gemma3": {"own_names": True}, "deepseek_v2": {"seed": 50}}
# Families with layers in cycles, of which a scan takes two or more. Unscanned, each layer is compiled by itself: a
# smaller model does, of a number of layers that is no multiple of the cycle where MaxText allows one.
UNSCANNED_LAYERS = {"gpt_oss": 3, "gemma2": 2, "gemma3": 7, "gemma4": 6, "qwen3_next": 5, "qwen3.5": 5, "olmo3": 5}
BASES = {
    family: Model(
        family,
        family,
        OTHERWISE.get(family, {}),
        tokens=LONG,
        scans=(False,) if family in UNSCANNED_ONLY else (True,) if family in UNSCANNED_LAYERS else (True, False),
    )
    for family in FAMILIES
}
UNSCANNED = tuple(
    Model(f"{family}-fewer_layers", family, OTHERWISE.get(family, {}) | {"layers": layers}, LONG, scans=(False,))
    for family, layers in UNSCANNED_LAYERS.items()
)

# As many experts as MoE layers: a router bias on the wrong axes has the right shape.
SQUARE_BIAS = Model(
    "deepseek_v3-experts_equal_layers",
    "deepseek_v3",
    {"layers": 7, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    scans=(True,),
)
DENSE_GEMMA4 = {"enable_moe_block": False, "num_experts": None, "top_k_experts": None, "moe_intermediate_size": None}
E4B = {
    "layers": 12,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 6,
    "use_double_wide_mlp": False,
    "layer_types": [*["sliding_attention"] * 5, "full_attention"] * 2,
}
VARIANTS = (
    Model("qwen3-one_layer-untied", "qwen3", {"layers": 1, "tie_word_embeddings": False}),
    Model(
        "qwen3-one_kv_head-odd_vocabulary-one_shard",
        "qwen3",
        {"layers": 2, "num_key_value_heads": 1, "vocab_size": 509, "single_shard": True, "seed": 1},
    ),
    Model(
        "llama3.1-one_layer-one_kv_head-odd_vocabulary",
        "llama3.1",
        {"layers": 1, "num_key_value_heads": 1, "vocab_size": 509, "seed": 2},
    ),
    Model("llama3.1-tied-as_llama3.2", "llama3.1", {"layers": 3, "tie_word_embeddings": True, "seed": 18}),
    Model("qwen2.5-tied-one_layer", "qwen2.5", {"layers": 1, "tie_word_embeddings": True, "seed": 5}),
    Model("qwen3_moe-one_layer", "qwen3_moe", {"layers": 1, "num_experts": 12, "seed": 6}, scans=(False,)),
    Model("mixtral-odd_vocabulary", "mixtral", {"layers": 2, "vocab_size": 509, "seed": 7}),
    Model(
        "gemma2-inexact_root",
        "gemma2",
        {"layers": 2, "hidden_size": 60, "num_key_value_heads": 1, "seed": 9},
        max_kl=ROUNDED_TABLE,
    ),
    Model(
        "gemma3-inexact_root-remainder_alone",
        "gemma3",
        {"layers": 5, "hidden_size": 60, "own_names": True, "seed": 10},
        max_kl=ROUNDED_TABLE,
    ),
    Model("gemma3-published_names", "gemma3", {"layers": 6, "vocab_size": 509, "seed": 11}, names_known=False),
    Model("gemma4-dense", "gemma4", {"layers": 6, **DENSE_GEMMA4, "seed": 13}),
    Model("gemma4_small-e4b", "gemma4_small", {**E4B, "seed": 14}, scans=(False,)),
    # MaxText's own conversion has no names for layers after the last whole cycle
    Model(
        "qwen3_next-remainder",
        "qwen3_next",
        {"layers": 7, "vocab_size": 509, "seed": 15},
        scans=(True,),
        names_known=False,
    ),
    Model("qwen3.5-expert_by_expert", "qwen3.5", {"layers": 4, "own_names": False, "seed": 16}, names_known=False),
    Model("deepseek_v2-query_lora", "deepseek_v2", {"layers": 2, "q_lora_rank": 52}, scans=(False,)),
    Model("deepseek_v2-dense_only", "deepseek_v2", {"layers": 1, "vocab_size": 509}),
    Model(
        "deepseek_v3-more_experts-two_layers",
        "deepseek_v3",
        {"layers": 2, "n_routed_experts": 48, "seed": 3},
        scans=(True,),
    ),
    Model("deepseek_v3-no_query_lora", "deepseek_v3", {"layers": 2, "q_lora_rank": None}, scans=(True,)),
    Model("deepseek_v3-no_dense_layer", "deepseek_v3", {"layers": 2, "first_k_dense_replace": 0}, scans=(True,)),
    Model("deepseek_v3-as_kimi_k2", "deepseek_v3", {"layers": 2, "n_group": 1, "topk_group": 1, "seed": 17}),
    SQUARE_BIAS,
    Model("deepseek_v32-odd_vocabulary", "deepseek_v32", {"layers": 2, "vocab_size": 509, "seed": 4}, scans=(True,)),
    Model("deepseek_v3-fp8", "deepseek_v3", scans=(True,), fp8=True),
)
FLOAT32_SOURCES = tuple(
    Model(f"{family}-float32_source", family, {"layers": 2, "dtype": "float32"}) for family in ("qwen3", "llama3.1")
)


SCALED_QUERY = ("llama3.1", "mixtral", "gemma2")
"""Families whose query MaxText stores divided by a root, that of 32 here: only a wider dtype has room for that."""


def not_restored(case: Case) -> list[str]:
    """The ends of the names of tensors that an export cannot give back bit for bit."""
    widened = case.save_dtype == "float32" and case.model.config.get("dtype") != "float32"
    return ["self_attn.q_proj.weight"] if case.model.family in SCALED_QUERY and not widened else []


# What these scale or shift before it is stored is rounded in bfloat16, and the logits are others.
ROUNDING = ("llama3.1", "mixtral", "gemma2", "gemma3", "gemma4", "gemma4_small")


def dtype_of_logits(model: Model) -> str:
    return "float32" if model.family in ROUNDING else "bfloat16"


def dtypes(model: Model, scan: bool) -> tuple[str, ...]:
    """What a model of each family is saved as: unscanned, one dtype does where nothing is rounded."""
    return ("bfloat16", "float32") if scan or model.family in ROUNDING else ("bfloat16",)


CASES = (
    *(
        Case(model, scan, save_dtype, logits=save_dtype == dtype_of_logits(model))
        for model in (*BASES.values(), *UNSCANNED)
        for scan in model.scans
        for save_dtype in dtypes(model, scan)
    ),
    # each in all its layouts, of which MaxText runs one: all families run in both above
    *(
        Case(model, scan, dtype_of_logits(model), logits=scan is model.scans[0])
        for model in VARIANTS
        for scan in model.scans
    ),
    *(Case(model, True, "float32", logits=False) for model in FLOAT32_SOURCES),
    *(Case(BASES["qwen3"], True, "bfloat16", *flags) for flags in ((True, False), (False, True), (False, False))),
)

# Asked of MaxText all the same, to notice when it can.
IMPOSSIBLE = tuple(
    case
    for case in CASES
    if case.model in BASES.values()
    and (case.model.family, case.scan) in CANNOT_CONVERT
    and (case.save_dtype, case.storage) == ("bfloat16", "ocdbt+zarr3")
)

# What MaxText's own training goes on from; DeepSeek's bias is no parameter there.
TRAINED = tuple(
    case
    for case in CASES
    if (case.model.name, case.scan)
    in (
        ("qwen3-one_kv_head-odd_vocabulary-one_shard", False),
        ("deepseek_v3-more_experts-two_layers", True),
    )
)

# Loaded by a MaxText that it is not for: the comparison has to see it.
CONTROL = Case(SQUARE_BIAS, True, maxtext="main")
