"""What the tests know of a family: the `DESCRIPTION` in its own test file, and no table elsewhere.

`family_tests.py` turns it into tests. Tests that want every family, such as those of parity, ask `descriptions()`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from conversion_lib.families import MODULES
from tests.support.sparse_checkpoints import Tensor

Sizes = dict[str, Any]
"""Keys of a config.json."""

TESTS = "tests.conversion_lib.families.test_{}"

MAX_KL = 1e-6
"""Per token, float32 on both sides. Seen: 1e-11."""

ROUNDED_TABLE = 1e-3
"""Where MaxText's rounding of a tied table to bfloat16 for the logits loses bits. Seen: 1e-4 (Gemma 3), 2e-5."""

GATE_ON_THE_EXPERTS_AXIS = "it stacks the router's gate on the experts' axis instead of the layers'"
"""Why MaxText 0.2.5 cannot convert some families."""


@dataclass(frozen=True)
class Published:
    """A published model.

    config: its config.json as the Hub has it, also where it leaves out what equals a default.
    parameters: of the text model; the embedding once where it is tied, nothing for multi-token prediction.
    tensors: lists its tensors, written down by hand from the Hub; None: they are those of transformers' class.
    """

    config: Sizes
    parameters: int
    tensors: Callable[[Sizes], Iterator[Tensor]] | None = None


@dataclass(frozen=True)
class Leaf:
    """A leaf of a published model, with the shape that it has in MaxText 0.2.5, and a tensor that it is made of.

    model: by its name in `Description.published`. path: below `params/params/decoder/`.
    tensor: of a stack, the one that is its second layer; of an unscanned leaf, the only one.
    """

    model: str
    path: str
    shape: tuple[int, ...]
    tensor: str
    scan_layers: bool = True


@dataclass(frozen=True)
class Refusal:
    """A published config with changes that the family refuses. message: a regular expression.

    name: what to call it where several change the same keys.
    """

    model: str
    changes: Sizes
    message: str
    scan_layers: bool = True
    name: str = ""

    def __str__(self) -> str:
        words = [self.model, self.name or "+".join(self.changes)]
        return "-".join(words if self.scan_layers else [*words, "unscanned"])


@dataclass(frozen=True)
class Towers:
    """Of a model that is more than text: transformers' class for it, and what its config has beside `text_config`."""

    model: str
    beside: Sizes


@dataclass(frozen=True)
class Variant:
    """A further small checkpoint that is held against MaxText.

    name: what follows the family's name. config: arguments of `make_tiny`.
    scans: its layouts; None: the family's. fp8: the demo's quantized checkpoint, whatever `config` says.
    names_known: whether MaxText's own conversion finds its tensors under the names that they have.
    max_kl: how far MaxText's logits may be from transformers'.
    """

    name: str
    config: Sizes = field(default_factory=dict)
    scans: tuple[bool, ...] | None = None
    fp8: bool = False
    names_known: bool = True
    max_kl: float = MAX_KL


@dataclass(frozen=True)
class Changed:
    """A tiny model, and other values for keys of its config.json, to see whether MaxText's logits follow.

    kind: the model's in `conversion_lib/maxtext/table.py`. changes, rope: keys of the config, and its
        `rope_parameters`. follows: whether MaxText computes what the changed config says.
    layers, make: arguments of `make_tiny`. scan: its layout. core: whether `make parity` runs it.
    """

    kind: str
    family: str
    changes: Sizes
    follows: bool = True
    rope: Sizes | None = None
    layers: int = 2
    make: Sizes = field(default_factory=dict)
    name: str = "default"
    scan: bool = True
    core: bool = False

    def __str__(self) -> str:
        return f"{self.kind}-{self.name}"


@dataclass(frozen=True)
class Engine:
    """What `ferry check --engine maxtext` is tried on: so many layers (None: all), and the largest divergence."""

    layers: int | None
    largest: float = 1e-7


@dataclass(frozen=True, kw_only=True)
class Parity:
    """How a family is held against MaxText, in `tests/parity`.

    config: arguments of `make_tiny` for the plain model.
    unscanned_layers: where a scan takes several layers at a time, how many an unscanned model does with: each of its
        layers is compiled by itself. No multiple of the cycle where MaxText allows one.
    cannot_convert: by layout, why MaxText 0.2.5 cannot convert the family, and what its error says.
    float32_source: whether a float32 checkpoint is tried as well.
    engine: None: MaxText's engine of the logit check is not tried on this family.
    changed: for `tests/parity/test_model_table.py`, which has those of the other families.
    """

    config: Sizes = field(default_factory=dict)
    unscanned_layers: int | None = None
    variants: tuple[Variant, ...] = ()
    cannot_convert: Mapping[bool, tuple[str, str]] = field(default_factory=dict)
    float32_source: bool = False
    engine: Engine | None = None
    changed: tuple[Changed, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Description:
    """Everything about a family that its tests need and its table does not say.

    name: the family's. layouts: what `scan_layers` may be.
    published: by the catalogue's name. same_sizes: names of the catalogue that differ from a published one in what
        they were trained on and how they are quantized alone, and that one's name.
    leaves, refusals: one or more of each.
    tiny: sizes of a small model, no two alike. config_class: transformers' class of its config.
    towers: of a model that is more than text, as it is published.
    mistake: for `CheckTests`: other settings of the small text model, which make another function.
    left_out: what the names of published tensors have that no leaf is made of, and the plan's word for them.
    several_leaves: what ends the names of published tensors that make more than one leaf.
    own_names: whether it is published under the names of transformers' class, not those that the class writes.
    norms_from_zero: whether norms multiply by 1 + weight, which is stored as float32.
    scaled_query: whether the query is stored divided by a root, here that of 32, which loses a bit in bfloat16.
    rounds: whether a conversion to bfloat16 rounds anything at the tiny sizes, so that the logits are others.
    """

    name: str
    published: Mapping[str, Published]
    same_sizes: Mapping[str, str] = field(default_factory=dict)
    leaves: tuple[Leaf, ...]
    refusals: tuple[Refusal, ...]
    tiny: Sizes
    config_class: str
    towers: Towers | None = None
    mistake: Sizes = field(default_factory=dict)
    layouts: tuple[bool, ...] = (True, False)
    left_out: Mapping[str, str] = field(default_factory=dict)
    several_leaves: tuple[str, ...] = ()
    own_names: bool = False
    norms_from_zero: bool = False
    scaled_query: bool = False
    rounds: bool = False
    parity: Parity = field(default_factory=Parity)


@cache
def descriptions() -> dict[str, Description]:
    """Every family's, by its name. A family without a test file is an error that says which file is missing."""
    return {module.FAMILY.name: description_in(module.__name__.rpartition(".")[2]) for module in MODULES}


def description_in(module: str) -> Description:
    """That of `tests/conversion_lib/families/test_<module>.py`."""
    name = TESTS.format(module)
    try:
        tests = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        path = f"{name.replace('.', '/')}.py"
        raise LookupError(f"family {module} has no tests: write {path}, as docs/add_a_family.md says") from None
    return tests.DESCRIPTION


def published(name: str) -> Published:
    """The published model of that name in the catalogue."""
    return next(of.published[name] for of in descriptions().values() if name in of.published)
