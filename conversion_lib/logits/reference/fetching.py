"""Weights of a Hugging Face checkpoint by the names of a transformers model's parameters, as float32 tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from conversion_lib.core.boxes import Box, Shape, whole
from conversion_lib.core.tensors import Array, Source
from conversion_lib.errors import BadInput
from conversion_lib.progress import Task

EXPERT_NAMES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
"""What checkpoints call an expert's matrices. transformers' modules hold all experts' in one parameter each:
`gate_up_proj`, gate and up one after the other, and `down_proj`."""


class Fetcher:
    """base: the path of the language model within the transformers model, such as `model`. aliases: parameters that
    are another one's weights, as a tied output is the embedding's."""

    def __init__(self, source: Source, base: str, aliases: Mapping[str, str], task: Task | None = None) -> None:
        self._source, self._aliases, self._task = source, aliases, task
        embeddings = [name for name in source.tensors if re.search(r"(^|\.)embed_tokens\.weight$", name)]
        if not embeddings:
            raise BadInput("the reference has no tensor embed_tokens.weight")
        # multimodal checkpoints keep their language model under a longer prefix than the text model's own
        self._prefix, self._base = min(embeddings, key=len).removesuffix("embed_tokens.weight"), f"{base}."

    def find(self, parameter: str) -> str | None:
        """The tensor that holds `parameter`, None where none does."""
        parameter = self._aliases.get(parameter, parameter)
        inner = parameter.removeprefix(self._base)
        names = [parameter, self._prefix + inner, self._prefix.removesuffix(self._base) + parameter]
        names += [name.replace(".mlp.", ".block_sparse_moe.") for name in names]
        return next((name for name in names if name in self._source.tensors), None)

    def require(self, parameter: str, shape: Shape) -> None:
        """Raises BadInput where the checkpoint lacks a parameter or has it in another shape."""
        name = self._found(parameter)
        info = self._source.tensors[name]
        if info.shape != shape:
            raise BadInput(f"{info.file}: tensor {name} is {list(info.shape)}, and config.json asks for {list(shape)}")

    def require_experts(self, module: str, parameters: Mapping[str, Shape]) -> None:
        """The same for a module that holds experts on the first axis of its parameters."""
        for parameter, shape in parameters.items():
            if self.find(f"{module}.{parameter}") is not None:
                self.require(f"{module}.{parameter}", shape)
                continue
            parts = self._parts(module, parameter)
            each = (shape[1] // len(parts), *shape[2:])
            for expert in range(shape[0]):
                for part in parts:
                    self.require(f"{module}.{expert}.{part}.weight", each)

    def read(self, parameter: str, rows: tuple[int, int] | None = None) -> torch.Tensor:
        """A parameter, or `rows` of its first axis."""
        name = self._found(parameter)
        shape = self._source.tensors[name].shape
        box: Box = whole(shape) if rows is None else (rows, *whole(shape[1:]))
        array = self._source.read(name, box)
        if self._task is not None:
            self._task.advance(array.nbytes)
        return _float32(array)

    def read_rows(self, parameter: str, rows: Sequence[int]) -> torch.Tensor:
        """Single rows of a parameter, (len(rows), ...)."""
        return torch.cat([self.read(parameter, (row, row + 1)) for row in rows])

    def experts(self, module: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Experts `start` to `stop` of a parameter that has them on its first axis, however they are stored."""
        if self.find(f"{module}.{parameter}") is not None:
            return self.read(f"{module}.{parameter}", (start, stop))
        parts, result = self._parts(module, parameter), None
        for expert in range(start, stop):
            tensors = [self.read(f"{module}.{expert}.{part}.weight") for part in parts]
            if result is None:
                result = torch.empty((stop - start, sum(map(len, tensors)), *tensors[0].shape[1:]))
            torch.cat(tensors, out=result[expert - start])
        assert result is not None
        return result

    def _parts(self, module: str, parameter: str) -> list[str]:
        """The matrices that an expert's part of `parameter` is made of."""
        known = (names for names in EXPERT_NAMES if self.find(f"{module}.0.{names[2]}.weight") is not None)
        gate, up, down = next(known, EXPERT_NAMES[0])
        return [down] if parameter == "down_proj" else [gate, up]

    def _found(self, parameter: str) -> str:
        name = self.find(parameter)
        if name is None:
            raise BadInput(f"the reference lacks weights of the model: {parameter}")
        return name


def _float32(array: Array) -> torch.Tensor:
    array = np.ascontiguousarray(array)
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()
    return torch.from_numpy(array).float()
