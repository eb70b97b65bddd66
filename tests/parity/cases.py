"""What is compared with MaxText: models, and the targets that each is converted to.

What belongs to one family is in its description, `tests/conversion_lib/families/test_<family>.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.support.family import MAX_KL, Description, Sizes, Variant, descriptions

LONG = 512
"""Tokens; a short prompt hides errors in RoPE."""

FAMILIES = descriptions()


@dataclass(frozen=True)
class Model:
    """A small checkpoint of a family; `config` goes to `make_tiny`. The rest as in `Variant`."""

    name: str
    family: str
    config: Sizes = field(default_factory=dict)
    tokens: int = 64
    scans: tuple[bool, ...] = (True, False)
    fp8: bool = False
    names_known: bool = True
    max_kl: float = MAX_KL


@dataclass(frozen=True)
class Case:
    """One conversion.

    core: whether `make parity` runs it: what a change can break. `make parity-all` runs every case.
    """

    model: Model
    scan: bool
    save_dtype: str = "bfloat16"
    ocdbt: bool = True
    zarr3: bool = True
    maxtext: str = "0.2.5"
    logits: bool = True
    core: bool = False

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


CANNOT_CONVERT = {
    (name, scan): reason for name, of in FAMILIES.items() for scan, reason in of.parity.cannot_convert.items()
}
"""What MaxText 0.2.5 cannot convert -> (why, what its error says)."""


def _base(of: Description) -> Model:
    """The plain model. Where a smaller one is unscanned, of the scanned layout alone."""
    scans = (True,) if of.parity.unscanned_layers else of.layouts
    return Model(of.name, of.name, of.parity.config, LONG, scans)


def _unscanned(of: Description) -> Model:
    config = of.parity.config | {"layers": of.parity.unscanned_layers}
    return Model(f"{of.name}-fewer_layers", of.name, config, LONG, scans=(False,))


def _variant(of: Description, variant: Variant) -> Model:
    return Model(
        name=f"{of.name}-{variant.name}",
        family=of.name,
        config=variant.config,
        scans=variant.scans or of.layouts,
        fp8=variant.fp8,
        names_known=variant.names_known,
        max_kl=variant.max_kl,
    )


BASES = {name: _base(of) for name, of in FAMILIES.items()}
UNSCANNED = tuple(_unscanned(of) for of in FAMILIES.values() if of.parity.unscanned_layers)
VARIANTS = tuple(_variant(of, variant) for of in FAMILIES.values() for variant in of.parity.variants)
FLOAT32_SOURCES = tuple(
    Model(f"{name}-float32_source", name, {"layers": 2, "dtype": "float32"})
    for name, of in FAMILIES.items()
    if of.parity.float32_source
)


def not_restored(case: Case) -> list[str]:
    """The ends of the names of tensors that an export cannot give back bit for bit."""
    widened = case.save_dtype == "float32" and case.model.config.get("dtype") != "float32"
    return ["self_attn.q_proj.weight"] if FAMILIES[case.model.family].scaled_query and not widened else []


def dtype_of_logits(model: Model) -> str:
    return "float32" if FAMILIES[model.family].rounds else "bfloat16"


def dtypes(model: Model, scan: bool) -> tuple[str, ...]:
    """What a model of each family is saved as: unscanned, one dtype does where nothing is rounded."""
    return ("bfloat16", "float32") if scan or FAMILIES[model.family].rounds else ("bfloat16",)


def _plain(model: Model, scan: bool, save_dtype: str) -> Case:
    """Of the core in bfloat16, which is the default, and in the dtype whose logits are compared."""
    logits = save_dtype == dtype_of_logits(model)
    return Case(model, scan, save_dtype, logits=logits, core=logits or save_dtype == "bfloat16")


CASES = (
    # each family in each of its layouts
    *(
        _plain(model, scan, save_dtype)
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
    # each combination of the storage flags once
    *(
        Case(BASES["qwen3"], True, "bfloat16", *flags, core=True)
        for flags in ((True, False), (False, True), (False, False))
    ),
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
CONTROL = Case(
    next(model for model in VARIANTS if model.name == "deepseek_v3-experts_equal_layers"), True, maxtext="main"
)
