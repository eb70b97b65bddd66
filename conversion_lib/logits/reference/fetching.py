"""Weights of a Hugging Face checkpoint as float32 tensors, by the parameter names of a transformers model."""

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
"""Names of an expert's matrices (gate, up, down) in checkpoints. transformers' modules hold those of all experts in two
parameters: `gate_up_proj`, gate and up concatenated, and `down_proj`."""


class Fetcher:
    """Reads parameters of a transformers model from a checkpoint.

    Args:
        source: The checkpoint; the caller keeps it open.
        base: Path of the language model within the transformers model, such as `model`.
        aliases: Parameters that share the weights of another one, such as a tied output projection.
        task: Advanced by the bytes read.

    Raises:
        BadInput: The checkpoint has no embedding.
    """

    def __init__(self, source: Source, base: str, aliases: Mapping[str, str], task: Task | None = None) -> None:
        self._source, self._aliases, self._task = source, aliases, task
        embeddings = [name for name in source.tensors if re.search(r"(^|\.)embed_tokens\.weight$", name)]
        if not embeddings:
            raise BadInput("the reference has no tensor embed_tokens.weight")
        # multimodal checkpoints have a longer prefix for the language model than the text model itself
        self._prefix, self._base = min(embeddings, key=len).removesuffix("embed_tokens.weight"), f"{base}."

    def find(self, parameter: str) -> str | None:
        """Returns the name of the tensor that holds `parameter`; None if there is none."""
        parameter = self._aliases.get(parameter, parameter)
        inner = parameter.removeprefix(self._base)
        names = [parameter, self._prefix + inner, self._prefix.removesuffix(self._base) + parameter]
        names += [name.replace(".mlp.", ".block_sparse_moe.") for name in names]
        return next((name for name in names if name in self._source.tensors), None)

    def require(self, parameter: str, shape: Shape) -> None:
        """Checks that the checkpoint has a parameter in this shape.

        Raises:
            BadInput: It is missing, or has another shape.
        """
        name = self._found(parameter)
        info = self._source.tensors[name]
        if info.shape != shape:
            raise BadInput(
                f"{info.file}: tensor {name} has shape {list(info.shape)}, config.json requires {list(shape)}"
            )

    def require_experts(self, module: str, parameters: Mapping[str, Shape]) -> None:
        """Checks a module of experts, whether the checkpoint stores them stacked or one by one.

        Args:
            module: Path of the module.
            parameters: Shapes by parameter, with the experts on the first axis.

        Raises:
            BadInput: A weight is missing, or has another shape.
        """
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
        """Reads a parameter as float32. `rows`: (start, stop) of its first axis; None: all of it.

        Raises:
            BadInput: The checkpoint lacks it.
        """
        name = self._found(parameter)
        shape = self._source.tensors[name].shape
        box: Box = whole(shape) if rows is None else (rows, *whole(shape[1:]))
        array = self._source.read(name, box)
        if self._task is not None:
            self._task.advance(array.nbytes)
        return _float32(array)

    def read_rows(self, parameter: str, rows: Sequence[int]) -> torch.Tensor:
        """Reads single rows of a parameter, float32 (len(rows), ...)."""
        return torch.cat([self.read(parameter, (row, row + 1)) for row in rows])

    def experts(self, module: str, parameter: str, start: int, stop: int) -> torch.Tensor:
        """Reads experts `start` to `stop`, whether the checkpoint stores them stacked or one by one.

        Args:
            module: Path of the module.
            parameter: `gate_up_proj` or `down_proj`, with the experts on the first axis.
            start: The first expert.
            stop: The one after the last.

        Returns:
            float32 (stop - start, ...).

        Raises:
            BadInput: The checkpoint lacks one.
        """
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
        """The names of the matrices that make up an expert's part of `parameter`."""
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
