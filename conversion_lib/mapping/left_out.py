"""Tensors that match no rule, and tensors that are missing: left out by name, or refused."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from conversion_lib.core.tensors import TensorInfo
from conversion_lib.errors import BadInput
from conversion_lib.mapping.names import in_checkpoint, in_table, nearest
from conversion_lib.mapping.rules import Block, Drop, Family, Rule
from conversion_lib.models.hf_config import ModelConfig
from conversion_lib.sources.joined import Dims
from conversion_lib.sources.weight_files import INDEX_NAME


@dataclass(frozen=True)
class Checkpoint:
    """The names of a checkpoint, for its family.

    Attributes:
        tensors: The tensors by name.
        family: The family.
        dims: The sizes of the model.
        config: The config.json.
        prefix: The prefix of names where the table has `model.`.
        absent: Tensors that only the index has, each with the shard that it names.
    """

    tensors: Mapping[str, TensorInfo]
    family: Family
    dims: Dims
    config: ModelConfig
    prefix: str
    absent: Mapping[str, str]

    def leave_out(self, taken: Collection[str]) -> list[str]:
        """Leaves out the tensors that are not among `taken`, those that rules use.

        Returns:
            A line for each drop with tensors, and one for each drop with tensors that only the index has.

        Raises:
            BadInput: A tensor, there or only in the index, matches no rule and no drop.
        """
        counts: dict[str, int] = {}
        missing: dict[str, int] = {}
        unknown = []
        for name in (*self.tensors, *self.absent):
            if name in taken:
                continue
            if (drop := self._drop_for(name)) is None:
                unknown.append(name)
            else:
                kind = counts if name in self.tensors else missing
                kind[drop.name] = kind.get(drop.name, 0) + 1
        if unknown:
            raise BadInput(self._refusal(unknown))
        reasons = {drop.name: drop.reason for drop in self.family.drops}
        lines = [f"{name}: {count} tensors left out; {reasons[name]}" for name, count in counts.items()]
        for name, count in missing.items():
            lines.append(f"{name}: {count} tensors are in the index alone; they would be left out: {reasons[name]}")
        return lines

    def _refusal(self, unknown: list[str]) -> str:
        first = unknown[0]
        if first in self.absent:
            return (
                f"tensor {first} is in {INDEX_NAME}, but not in {self.absent[first]}, and no rule of family "
                f"{self.family.name} leaves it out: download that file again, or take the tensor out of the index"
            )
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        return (
            f"{self.tensors[first].file}: tensor {first}{more} matches no rule of family {self.family.name}"
            f"{self._why_left_over(in_table(first, self.prefix))}"
        )

    def _why_left_over(self, name: str) -> str:
        """Returns the config key that may not fit, for a layer's tensor."""
        match = re.match(r"model\.layers\.(\d{1,9})\.", name)
        if match is None:
            return ""
        if int(match[1]) >= self.dims["layers"]:
            layers = self.dims["layers"]
            return f"; {self.config.path} says num_hidden_layers = {layers}, which may not fit these names"
        return self.because(next((block for block in self.family.scanned if block.because), None))

    def _drop_for(self, name: str) -> Drop | None:
        """Returns the drop that a tensor matches; None if there is none. Without the tensor, its name decides."""
        info = self.tensors.get(name)
        for drop in self.family.drops:
            if not drop.holds(self.dims) or (info is not None and len(info.shape) < drop.least_axes):
                continue
            spellings = (in_table(name, self.prefix), name)
            match = next((found for one in spellings if (found := re.fullmatch(drop.pattern, one))), None)
            if match is not None and self._in_its_layers(drop, match):
                return drop
        return None

    def _in_its_layers(self, drop: Drop, match: re.Match[str]) -> bool:
        if drop.layers is not None:
            first, stop = (self.dims[name] for name in drop.layers)
            if not first <= int(match["layer"]) < stop:
                return False
        if drop.marker is None:
            return True
        marker = in_checkpoint(drop.marker.format(**match.groupdict()), self.prefix)
        return marker in self.tensors or marker in self.absent

    def missing(self, name: str, leaf: str, rule: Rule, block: Block | None) -> BadInput:
        """Returns the error for a missing tensor that `rule` needs for `leaf`."""
        said = f"tensor {name} is missing: {leaf} needs it{self.because(block)}{self.omitted(('num_hidden_layers',))}"
        if name in self.absent:
            return BadInput(f"{said}. {INDEX_NAME} names it in {self.absent[name]}, which does not have it")
        if rule.when == "!tied":
            said += f"; {self.config.path} does not tie it to the embedding (tie_word_embeddings)"
        return BadInput(f"{said}. There {nearest(name, self.tensors)}")

    def because(self, block: Block | None) -> str:
        """Returns the config key that separates a block from others; empty if there is none."""
        if block is None or block.because is None:
            return ""
        value = self.config.get(block.because)
        return f"; {self.config.path} says {block.because} = {value}, which may not fit these names"

    def omitted(self, endings: tuple[str, ...]) -> str:
        """Returns which keys with these endings config.json omits: the class's default need not fit the tensors."""
        keys = [key for key in self.config.omitted() if key.endswith(endings)]
        return f"; {self.config.path} omits {', '.join(keys)}, so the default of its class holds" if keys else ""
