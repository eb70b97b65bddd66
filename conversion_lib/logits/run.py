"""The runs of a check: the checkpoint's own forward pass in step with the reference, or one of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from conversion_lib.logits import blocks
from conversion_lib.logits.compare import LayerDifference, Spot, compare_layer, not_finite
from conversion_lib.logits.config import ForwardConfig
from conversion_lib.logits.forward import ForwardPass
from conversion_lib.logits.memory import Memory
from conversion_lib.logits.reference import Reference, dtype_of, open_reference, transformers_reference
from conversion_lib.logits.rounding import EXACT_KL, Allowance, exact_limits, rounded_leaves
from conversion_lib.logits.weights import BiasOrder, Checkpoint
from conversion_lib.progress import Reporter, Task
from conversion_lib.sources.base import Array, Source


@dataclass(frozen=True)
class Subject:
    """The checkpoint that is checked, and how it is read."""

    checkpoint: Checkpoint
    config: ForwardConfig
    bias_order: BiasOrder | None
    memory: Memory


@dataclass
class Findings:
    """What a run found. `layers`: empty where only one side's layers were seen. lost: where the checkpoint's values
    were no longer finite. allowed, allowed_mean: the largest and the mean KL that rounding explains. rounded: of how
    many leaves."""

    logits: list[Array] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    lost: Spot | None = None
    idle_experts: int = 0
    allowed: float = EXACT_KL
    allowed_mean: float | None = None
    rounded: int = 0


def exact(subject: Subject) -> Findings:
    """What is allowed where nothing is rounded, and nothing else yet."""
    limits = exact_limits(subject.config)
    return Findings(allowed=limits.max_kl, allowed_mean=limits.mean_kl)


class _Candidate:
    """The checkpoint's forward pass, a layer at a time, with a dithered one beside it where the plan rounds."""

    def __init__(self, subject: Subject, prompts: Sequence[Array], source_dtype: str, task: Task) -> None:
        leaves = rounded_leaves(subject.config, subject.checkpoint.tensors, source_dtype)
        forward = partial(
            ForwardPass,
            subject.checkpoint,
            subject.config,
            prompts,
            bias_order=subject.bias_order,
            memory=subject.memory,
            task=task,
        )
        self._pass = forward()
        self._dithered = forward(dithered=leaves) if leaves else None
        self._steps = self._pass.layers()
        self._dithered_steps = self._dithered.layers() if self._dithered else None
        self._allowance = Allowance(subject.config)
        self.findings = Findings(rounded=len(leaves))

    def step(self, wanted: blocks.States | None = None) -> None:
        """The next layer, compared with what the reference's `wanted` has of it."""
        for one in filter(None, (self._pass, self._dithered)):
            one.original = wanted
        number, found = next(self._steps)
        dithered = next(self._dithered_steps)[1] if self._dithered_steps else None
        if self.findings.lost is None:
            self.findings.lost = not_finite(number, found)
        if wanted is not None:
            allowed = self._allowance.of_blocks(found, dithered)
            self.findings.layers.append(compare_layer(number, wanted, found, allowed))

    def finish(self) -> Findings:
        self.findings.logits, self.findings.idle_experts = self._pass.logits(), self._pass.idle_experts
        if self._dithered is not None:
            self._allowance.of_logits(self.findings.logits, self._dithered.logits())
        self.findings.allowed, self.findings.allowed_mean = self._allowance.max_kl, self._allowance.mean_kl
        return self.findings


def in_step(
    subject: Subject, directory: Path, prompts: Sequence[Array], reporter: Reporter
) -> tuple[Reference, Findings]:
    """Runs the original in `directory` and the checkpoint, each layer of one after the same layer of the other, so
    that neither's states need to be kept."""
    source = open_reference(directory)
    dtype = dtype_of(source)
    total = _nbytes(source) + _nbytes(subject.checkpoint) * _passes(subject, dtype)
    with reporter.task("comparing layer by layer", total) as task:
        candidate = _Candidate(subject, prompts, dtype, task)

        def observe(_: int, wanted: blocks.States) -> None:
            candidate.step(wanted)

        reference = transformers_reference(directory, prompts, memory=subject.memory, observe=observe, task=task)
        return reference, candidate.finish()


def alone(subject: Subject, prompts: Sequence[Array], source_dtype: str, reporter: Reporter) -> Findings:
    """Runs the checkpoint where the reference is a file of logits."""
    total = _nbytes(subject.checkpoint) * _passes(subject, source_dtype)
    with reporter.task("logits of the checkpoint", total) as task:
        candidate = _Candidate(subject, prompts, source_dtype, task)
        for _ in range(len(subject.config.layers) + 1):
            candidate.step()
        return candidate.finish()


def original(directory: Path, prompts: Sequence[Array], memory: Memory, reporter: Reporter) -> Reference:
    """Runs the original in `directory` alone."""
    with reporter.task("logits of the original", _nbytes(open_reference(directory))) as task:
        return transformers_reference(directory, prompts, memory=memory, task=task)


def _passes(subject: Subject, source_dtype: str) -> int:
    return 2 if rounded_leaves(subject.config, subject.checkpoint.tensors, source_dtype) else 1


def _nbytes(source: Source) -> int:
    return sum(info.nbytes for info in source.tensors.values())
