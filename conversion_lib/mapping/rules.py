"""What a family's table is made of: rules, blocks of layers, and named drops.

A family is data. `to_maxtext` and `to_hugging_face` give it meaning; a file in `families/` only lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.plan.ops import Op
from conversion_lib.sources.joined import Dims, Join

OpsOf = Callable[[Dims], tuple[Op, ...]]


@dataclass(frozen=True)
class Rule:
    """One line of a table: a Hugging Face tensor, the MaxText leaf it goes to, and the ops between.

    hf: its name, in a block's rule what follows `model.layers.<i>.`. `{expert}` stands for an expert's index, and
        the experts are stacked on axis 0 of the leaf.
    maxtext: the leaf's path under `params/params/`; in a block's rule, what follows `decoder/<block>/`.
    shape: the tensor's shape, in names of dims.
    ops: from the tensor to its place in the leaf, for given dims.
    when: the dim that must not be zero for the rule to hold; a leading "!" turns that round.
    keep_float32: the leaf keeps a float32 source's dtype under `--save-dtype bfloat16`.
    always_float32: the leaf is float32 under either: MaxText computes it in float32 and does not round it.
    scan_axis: the layers' axis of the scanned leaf, by the MaxText that will load it (param_scan_axis is 1).
    """

    hf: str
    maxtext: str
    shape: tuple[str, ...]
    ops: OpsOf = lambda dims: ()
    when: str | None = None
    keep_float32: bool = False
    always_float32: bool = False
    scan_axis: Mapping[str, int] = field(default_factory=lambda: {"0.2.5": 1, "main": 1})

    def holds(self, dims: Dims) -> bool:
        return _holds(self.when, dims)


@dataclass(frozen=True)
class Block:
    """Layers that share a table, and where MaxText has them.

    name: the leaves' path under `decoder/`. Without a placeholder the layers are stacked: one scan. `{layer}` is a
        layer's number in the checkpoint, `{place}` its number counted from the block's first: a leaf for each layer.
    start, stop, step: every `step`-th layer from `start` up to before `stop`; numbers, or names of dims.
    run: how many consecutive layers each step takes; where more than one, a second stacked axis follows the first.
    because: the config key that draws the line between blocks, for messages.
    """

    name: str
    rules: tuple[Rule, ...]
    start: int | str = 0
    stop: int | str = "layers"
    step: int | str = 1
    run: int | str = 1
    because: str | None = None

    @property
    def stacked(self) -> bool:
        return "{" not in self.name

    def layers(self, dims: Dims) -> tuple[int, ...]:
        """The numbers of its layers in the checkpoint, in the order of the stack."""
        start, stop, step, run = (_number(value, dims) for value in (self.start, self.stop, self.step, self.run))
        return tuple(first + i for first in range(start, stop, step) for i in range(run))

    def stack(self, dims: Dims) -> tuple[int, ...]:
        """The sizes of the axes that its layers are stacked along."""
        run, count = _number(self.run, dims), len(self.layers(dims))
        return (count,) if run == 1 else (count // run, run)


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
class DetectedFlag:
    """A dim that a checkpoint's names show: 1 where one of them ends with `suffix`, and 0 where none does.

    published: what it is of the checkpoints on the Hub, whose names an export writes.
    """

    suffix: str
    published: int


@dataclass(frozen=True)
class Family:
    """An architecture: how to recognise it, its sizes, its table.

    model_type: config.json's, for one that names no architecture.
    scanned, unscanned: where MaxText has the layers with `scan_layers` and without.
    fits: whether it is the one for a config, where two share an architecture.
    prefixes: what may stand in a checkpoint where the table says `model.`; files and classes differ.
    joins: tensors that rules take as one.
    detected: further dims, that a checkpoint's names show.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    dims: Callable[[ModelConfig], Dims]
    rules: tuple[Rule, ...]
    scanned: tuple[Block, ...]
    unscanned: tuple[Block, ...]
    drops: tuple[Drop, ...] = ()
    prefixes: tuple[str, ...] = ("model.",)
    fits: Callable[[ModelConfig], bool] = lambda config: True
    joins: tuple[Join, ...] = ()
    detected: Mapping[str, DetectedFlag] = field(default_factory=dict)


def _number(value: int | str, dims: Dims) -> int:
    return dims[value] if isinstance(value, str) else value


def _holds(when: str | None, dims: Dims) -> bool:
    if when is None:
        return True
    return not dims[when[1:]] if when.startswith("!") else bool(dims[when])
