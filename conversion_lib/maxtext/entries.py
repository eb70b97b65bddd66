"""What may stand in the table of MaxText's models: the ways in which MaxText treats a key of config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Takes:
    """MaxText has a setting for it.

    Attributes:
        setting: Its name.
        words: How MaxText writes a value, where not as config.json does.
        whole: Whether MaxText refuses a fraction: then it has the nearest whole number.
    """

    setting: str
    words: Mapping[Any, Any] = field(default_factory=dict)
    whole: bool = False


@dataclass(frozen=True)
class Fixed:
    """MaxText's code has this value, whatever config.json says."""

    value: Any


@dataclass(frozen=True)
class Lacks:
    """MaxText's model has nothing like it: it computes what config.json says with this value."""

    value: Any = None


@dataclass(frozen=True)
class Chooses:
    """MaxText has the values that come with the choices of a setting, and no others.

    Attributes:
        setting: Its name.
        values: By choice, of the keys of config.json or of its RoPE; where none is the original's, the
            nearest number is taken, else the first.
    """

    setting: str
    values: Callable[[Mapping[str, Any]], Mapping[Any, Any]]


@dataclass(frozen=True)
class Follows:
    """MaxText has the value of another key here, and transformers' code has a number.

    Attributes:
        key: The other key.
        original: The number.
    """

    key: str
    original: float


@dataclass(frozen=True)
class Cycle:
    """The kinds of MaxText's layers repeat, whatever config.json says."""

    kinds: Sequence[str]


@dataclass(frozen=True)
class InWeights:
    """The conversion puts it into the weights, so MaxText need not know it."""


Entry = Takes | Fixed | Lacks | Chooses | Follows | Cycle | InWeights
Entries = dict[str, Entry]


@dataclass(frozen=True)
class Scaling:
    """One kind of RoPE.

    Attributes:
        settings: That choose it.
        keys: Of config.json's `rope_parameters`.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    keys: Entries = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """MaxText's models of one architecture.

    Attributes:
        names: Of MaxText's files of settings; the first for sizes that none has.
        keys: Of config.json.
        rope: By the kind of layer ("" where all have one RoPE) and by `rope_type`. A kind of RoPE that is not here
            MaxText computes as `default`.
        expert_width: The key of the experts' width where every layer has experts: MaxText wants it under both names.
        divides_logits: Whether a tied head's logits are divided by the root of the hidden size, as Gemma's need it.
        layers_in_one: How many of config.json's layers are one of MaxText's.
    """

    names: Sequence[str]
    keys: Entries
    rope: Mapping[str, Mapping[str, Scaling]]
    expert_width: str | None = None
    divides_logits: bool = False
    layers_in_one: int = 1
