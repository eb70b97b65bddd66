"""The parts of a family's table: rules, blocks of layers, and named drops.

A family is data, listed in a file in `families/`. `to_maxtext` and `to_hugging_face` make plans from it.
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
    """One line of a table: a Hugging Face tensor, its MaxText leaf, and the ops between them.

    Attributes:
        hf: The tensor's name; in a block's rule, its part after `model.layers.<i>.`. `{expert}` is replaced by an
            expert's index, and the experts are stacked on axis 0 of the leaf.
        maxtext: The leaf's path under `params/params/`; in a block's rule, its part after `decoder/<block>/`.
        shape: The tensor's shape, as names of dims.
        ops: Returns the ops from the tensor to its tile of the leaf, for given dims.
        when: A dim: the rule holds if it is not zero. With a leading "!", the rule holds if it is zero.
        keep_float32: Whether a leaf from float32 tensors stays float32 with `--save-dtype bfloat16`.
        always_float32: Whether the leaf is always float32, because MaxText computes it in float32 without rounding.
        scan_axis: The axis on which layers are stacked, by the MaxText release that will load the leaf. MaxText's
            param_scan_axis is 1.
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
        """Returns whether `when` is met."""
        return _holds(self.when, dims)


@dataclass(frozen=True)
class Block:
    """Layers with the same rules, and their path in MaxText.

    The numbers may be given as names of dims.

    Attributes:
        name: The leaves' path under `decoder/`. Without a placeholder, the layers are stacked in one scan. With one,
            each layer has its own leaf: `{layer}` is the layer's number in the checkpoint, `{place}` its number counted
            from the block's first layer.
        rules: The rules for each layer.
        start: The first layer.
        stop: The end: the block's steps start before this layer.
        step: The distance between the starts of steps.
        run: The number of consecutive layers in each step. If it is more than one, the layers are stacked on two axes:
            steps, then layers of a step.
        because: The config key that sets the border between blocks, for messages.
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
        """Whether the layers are stacked in one leaf."""
        return "{" not in self.name

    def layers(self, dims: Dims) -> tuple[int, ...]:
        """Returns the numbers of its layers in the checkpoint, in the order of the stack."""
        start, stop, step, run = (_number(value, dims) for value in (self.start, self.stop, self.step, self.run))
        return tuple(first + i for first in range(start, stop, step) for i in range(run))

    def stack(self, dims: Dims) -> tuple[int, ...]:
        """Returns the sizes of the axes that its layers are stacked along."""
        run, count = _number(self.run, dims), len(self.layers(dims))
        return (count,) if run == 1 else (count // run, run)


@dataclass(frozen=True)
class Drop:
    """Source tensors that are left out by name. The plan has a line for each drop that leaves out tensors.

    Attributes:
        name: The kind of tensor, for the plan's line.
        pattern: A regular expression for the whole name.
        reason: Why the tensors are left out, for the plan's line.
        when: As for Rule.
        layers: Two dims: the pattern's group `layer` must be at least the first and less than the second. None: any.
        marker: The name of a tensor that must exist, with `{layer}` for that group, so that an ordinary extra layer is
            not dropped. None: no such check.
        least_axes: The fewest axes of such a tensor, if a weight may have the same name.
    """

    name: str
    pattern: str
    reason: str
    when: str | None = None
    layers: tuple[str, str] | None = None
    marker: str | None = None
    least_axes: int = 0

    def holds(self, dims: Dims) -> bool:
        """Returns whether `when` is met."""
        return _holds(self.when, dims)


@dataclass(frozen=True)
class DetectedFlag:
    """A dim that is 1 if the name of a tensor in the checkpoint ends with `suffix`, otherwise 0.

    Attributes:
        suffix: The end of the name.
        published: The value for the checkpoints on the Hub, whose names an export writes.
    """

    suffix: str
    published: int


@dataclass(frozen=True)
class Family:
    """An architecture: how to recognise it, its sizes, and its table.

    Attributes:
        name: Ferry's name of the family, such as `llama3.1`.
        architectures: The names in config.json's `architectures`.
        model_type: The `model_type` of transformers' class, whose defaults hold if a config omits a key.
        dims: Returns the sizes and flags that the rules use: always `layers`, and `experts` if a rule has `{expert}`.
            Raises BadInput for a config that does not fit MaxText's model. Call `sizes` instead.
        rules: The tensors outside the layers.
        scanned: The layers with `scan_layers`; empty if MaxText does not have the family scanned.
        unscanned: The layers without `scan_layers`.
        drops: The tensors to leave out.
        prefixes: The possible prefixes of names in a checkpoint where the table has `model.`; published files and
            transformers' classes differ. A checkpoint of the base class has them without `model.`.
        fits: Returns whether the family is the right one for a config, if two families share an architecture.
        joins: Tensors that rules use as one.
        detected: More dims, which depend on the names in the checkpoint.
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

    def sizes(self, config: ModelConfig) -> Dims:
        """The sizes and switches of a model, whatever class its config.json names. Raises BadInput for a wrong one."""
        return self.dims(config.of_class(self.model_type))


def _number(value: int | str, dims: Dims) -> int:
    return dims[value] if isinstance(value, str) else value


def _holds(when: str | None, dims: Dims) -> bool:
    if when is None:
        return True
    return not dims[when[1:]] if when.startswith("!") else bool(dims[when])
