"""What a family's table is made of: rules, blocks of layers, and named drops.

A family is data. `mapping.py` gives it meaning; a file in `families/` only lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from conversion_lib.config import ModelConfig
from conversion_lib.ops import Op

Dims = Mapping[str, int]
"""The sizes and switches of one model, by the names that its family's rules use."""

OpsOf = Callable[[Dims], tuple[Op, ...]]


@dataclass(frozen=True)
class Rule:
    """One line of a table: a Hugging Face tensor, the MaxText leaf it goes to, and the ops between.

    hf: its name; in a block's rule, what follows `model.layers.<i>.`. `{expert}` stands for an expert's index, and
        the experts are stacked on axis 0 of the leaf.
    maxtext: the leaf's path under `params/params/`; in a block's rule, what follows `decoder/<block>/`.
    shape: the tensor's shape, in names of dims.
    ops: from the tensor to its place in the leaf, for given dims.
    when: the dim that must not be zero for the rule to hold; a leading "!" turns that round.
    keep_float32: the leaf keeps a float32 source's dtype under `--save-dtype bfloat16`.
    scan_axis: the layers' axis of the scanned leaf, by the MaxText that will load it (param_scan_axis is 1).
    """

    hf: str
    maxtext: str
    shape: tuple[str, ...]
    ops: OpsOf = lambda dims: ()
    when: str | None = None
    keep_float32: bool = False
    scan_axis: Mapping[str, int] = field(default_factory=lambda: {"0.2.5": 1, "main": 1})

    def holds(self, dims: Dims) -> bool:
        return _holds(self.when, dims)


@dataclass(frozen=True)
class Block:
    """Layers `start` to `stop` (names of dims) that share a table: one scan in MaxText.

    name: `decoder/<name>` when scanned, `decoder/<name>_<i>` otherwise, i counted from the block's first layer.
    because: the config key that draws the line between blocks, for messages.
    """

    name: str
    rules: tuple[Rule, ...]
    start: str = "zero"
    stop: str = "layers"
    because: str | None = None


@dataclass(frozen=True)
class Drop:
    """Source tensors that are left out by name; the plan has a line for each drop that found something.

    pattern: a regular expression for the whole name.
    layers: where given, two dims: the pattern's group `layer` must lie from the first up to before the second.
    marker: where given, a tensor, with `{layer}` for that group, that must be there for the layer to be what it is
        taken for: an ordinary layer too many is not dropped.
    """

    name: str
    pattern: str
    reason: str
    when: str | None = None
    layers: tuple[str, str] | None = None
    marker: str | None = None

    def holds(self, dims: Dims) -> bool:
        return _holds(self.when, dims)


@dataclass(frozen=True)
class Family:
    """An architecture: how to recognise it, its sizes, its table.

    model_type: config.json's, for one that names no architecture.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    dims: Callable[[ModelConfig], Dims]
    rules: tuple[Rule, ...]
    blocks: tuple[Block, ...]
    drops: tuple[Drop, ...] = ()


def _holds(when: str | None, dims: Dims) -> bool:
    if when is None:
        return True
    return not dims[when[1:]] if when.startswith("!") else bool(dims[when])
