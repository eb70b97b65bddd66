"""What is compared with MaxText: models, and the targets that each is converted to. Data only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MAX_KL = 1e-6
"""Per token, float32 on both sides. Seen: 1e-11."""

LONG = 512
"""Tokens; a short prompt hides errors in RoPE."""


@dataclass(frozen=True)
class Model:
    """A small checkpoint of a family; `config` goes to `make_tiny`."""

    name: str
    family: str
    config: dict[str, Any] = field(default_factory=dict)
    tokens: int = 64
    scans: tuple[bool, ...] = (True, False)
    fp8: bool = False


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
        return not self.model.fp8 and (self.model.family, self.scan) not in CANNOT_CONVERT


# What MaxText 0.2.5 cannot convert -> (why, what its error says).
_AXIS = (
    "it stacks the router's gate on the experts' axis instead of the layers'",
    "cannot reshape array",
)
_BIAS = (
    "its model has the router's bias in the collection MoEBiasVar, its table of names does not have it",
    "MoEBiasVar",
)
CANNOT_CONVERT = {
    ("deepseek_v2", True): _AXIS,
    ("deepseek_v3", True): _BIAS,
    ("deepseek_v3", False): _BIAS,
    ("deepseek_v32", True): _BIAS,
    ("deepseek_v32", False): _BIAS,
}

FAMILIES = ("qwen3", "llama3.1", "deepseek_v2", "deepseek_v3", "deepseek_v32")
BASES = {family: Model(family, family, tokens=LONG) for family in FAMILIES}

# As many experts as MoE layers: a router bias on the wrong axes has the right shape.
SQUARE_BIAS = Model(
    "deepseek_v3-experts_equal_layers",
    "deepseek_v3",
    {"layers": 7, "n_routed_experts": 6, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2},
    scans=(True,),
)
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
    SQUARE_BIAS,
    Model("deepseek_v32-odd_vocabulary", "deepseek_v32", {"layers": 2, "vocab_size": 509, "seed": 4}, scans=(True,)),
    Model("deepseek_v3-fp8", "deepseek_v3", scans=(True,), fp8=True),
)
FLOAT32_SOURCES = tuple(
    Model(f"{family}-float32_source", family, {"layers": 2, "dtype": "float32"}) for family in ("qwen3", "llama3.1")
)


def dtype_of_logits(model: Model) -> str:
    """Llama's query is scaled before it is stored: in bfloat16 that rounds, and the logits are others."""
    return "float32" if model.family == "llama3.1" else "bfloat16"


CASES = (
    *(
        Case(model, scan, save_dtype, logits=save_dtype == dtype_of_logits(model))
        for model in BASES.values()
        for scan in (True, False)
        for save_dtype in ("bfloat16", "float32")
    ),
    *(Case(model, scan, dtype_of_logits(model)) for model in VARIANTS for scan in model.scans),
    *(Case(model, True, "float32", logits=False) for model in FLOAT32_SOURCES),
    *(
        Case(BASES["qwen3"], scan, "bfloat16", ocdbt, zarr3, logits=scan)
        for scan in (True, False)
        for ocdbt, zarr3 in ((True, False), (False, True), (False, False))
    ),
    Case(BASES["deepseek_v3"], True, ocdbt=False, zarr3=False),
)

# Loaded by a MaxText that it is not for: the comparison has to see it.
CONTROL = Case(SQUARE_BIAS, True, maxtext="main")
