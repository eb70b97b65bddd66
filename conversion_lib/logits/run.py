"""The runs of a check: the checkpoint's own forward pass in step with the reference, or one of them alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from conversion_lib.core.tensors import Array, Source
from conversion_lib.logits.forward.config import ForwardConfig
from conversion_lib.logits.forward.forward import ForwardPass
from conversion_lib.logits.forward.memory import Memory
from conversion_lib.logits.forward.weights import BiasOrder, Checkpoint
from conversion_lib.logits.reference.reference import Reference, dtype_of, open_reference, transformers_reference
from conversion_lib.logits.verdict import blocks
from conversion_lib.logits.verdict.compare import (
    BlockDifference,
    LayerDifference,
    Spot,
    compare_blocks,
    compare_layer,
    not_finite,
    relative_difference,
)
from conversion_lib.logits.verdict.rounding import EXACT_KL, Allowance, Dither, dither_of, tie_share
from conversion_lib.progress import Reporter, Task


@dataclass(frozen=True)
class Subject:
    """The checkpoint that is checked, and how it is read."""

    checkpoint: Checkpoint
    config: ForwardConfig
    bias_order: BiasOrder | None
    memory: Memory


@dataclass
class Findings:
    """What a run found. `layers` and `output`, the final norm and the projection to logits: empty where only one side's
    layers were seen. lost: where the checkpoint's values were no longer finite. allowed, allowed_mean: the largest and
    the mean KL that a loss of accuracy explains. dither: how that was measured, None where it was not."""

    logits: list[Array] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    output: BlockDifference | None = None
    lost: Spot | None = None
    idle_experts: int = 0
    allowed: float = EXACT_KL
    allowed_mean: float | None = None
    dither: Dither | None = None


class Candidate:
    """The checkpoint's forward pass, a layer at a time, with a dithered one beside it where what is allowed has to be
    measured: `step` for the embedding and each layer, then `finish`. source_dtype: as `dither_of` has it."""

    def __init__(self, subject: Subject, prompts: Sequence[Array], source_dtype: str, task: Task | None = None) -> None:
        dither = dither_of(subject.config, subject.checkpoint.tensors, source_dtype)
        forward = partial(
            ForwardPass,
            subject.checkpoint,
            subject.config,
            prompts,
            bias_order=subject.bias_order,
            memory=subject.memory,
            tie=tie_share(subject.config, dither),
            task=task,
        )
        self._pass = forward()
        self._dithered = forward(dither=dither) if dither else None
        self._runs = [self._pass, *([self._dithered] if self._dithered else [])]
        self._steps = self._pass.layers()
        self._dithered_steps = self._dithered.layers() if self._dithered else None
        self._allowance, self._tokens = Allowance(), subject.config.tokens
        self._before: Array | None = None
        self.findings = Findings(dither=dither)

    def step(self, wanted: blocks.States | None = None) -> None:
        """The next layer, compared with what the reference's `wanted` has of it."""
        for one in self._runs:
            one.original = wanted
        number, found = next(self._steps)
        dithered = next(self._dithered_steps)[1] if self._dithered_steps else None
        if self.findings.lost is None:
            self.findings.lost = not_finite(number, found)
        if wanted is not None:
            self.findings.layers.append(self._compared(number, wanted, found, dithered))
            self._before = wanted[blocks.STREAM if blocks.STREAM in wanted else blocks.EMBEDDING]

    def _compared(
        self, number: int, wanted: blocks.States, found: blocks.States, dithered: blocks.States | None
    ) -> LayerDifference:
        """The layer against the original's. Where a block is off, the layer runs once more from the original's own
        stream: what earlier layers add up to, rounding among it, is not for this one to answer for."""
        if self._before is None:
            return compare_layer(number, wanted, found, self._allowance.of_blocks(found, dithered))
        compared = compare_layer(number, wanted, found, self._allowance.of_blocks(found, None))
        if compared.departs or self._pass.is_taken_from(number):
            again, *moved = [one.again(number, self._before, wanted) for one in self._runs]
            allowed = self._allowance.of_blocks(again, moved[0] if moved else None)
            return compared.model_copy(update={"blocks": compare_blocks(wanted, again, allowed)})
        return compared

    def finish(self, wanted: Sequence[Array] | None = None) -> Findings:
        """What was found. wanted: the reference's logits, where its layers were seen."""
        self.findings.logits, self.findings.idle_experts = self._pass.logits(), self._pass.idle_experts
        if self._dithered is not None:
            self._allowance.of_logits(self.findings.logits, self._dithered.logits())
        self.findings.allowed, self.findings.allowed_mean = self._allowance.max_kl, self._allowance.mean_kl
        if wanted is not None:
            self.findings.output = self._output([logits[:, : self._tokens] for logits in wanted])
        return self.findings

    def _output(self, wanted: Sequence[Array]) -> BlockDifference:
        """The logits against the original's; where they are off, those of the original's own stream."""
        off = relative_difference(*zip(wanted, self.findings.logits, strict=True))
        compared = BlockDifference(relative=off, allowed=self._allowance.of_block(None))
        if not compared.departs:
            return compared
        again, *moved = [one.logits(self._before) for one in self._runs]
        by_rounding = relative_difference(*zip(again, moved[0], strict=True)) if moved else None
        off = relative_difference(*zip(wanted, again, strict=True))
        return BlockDifference(relative=off, allowed=self._allowance.of_block(by_rounding))


def in_step(
    subject: Subject, directory: Path, prompts: Sequence[Array], reporter: Reporter
) -> tuple[Reference, Findings]:
    """Runs the original in `directory` and the checkpoint, each layer of one after the same layer of the other, so
    that neither's states need to be kept."""
    source = open_reference(directory)
    dtype = dtype_of(source)
    total = _nbytes(source) + _nbytes(subject.checkpoint) * _passes(subject, dtype)
    with reporter.task("comparing layer by layer", total) as task:
        candidate = Candidate(subject, prompts, dtype, task)

        def observe(_: int, wanted: blocks.States) -> None:
            candidate.step(wanted)

        reference = transformers_reference(directory, prompts, memory=subject.memory, observe=observe, task=task)
        return reference, candidate.finish(reference.logits)


def alone(subject: Subject, prompts: Sequence[Array], source_dtype: str, reporter: Reporter) -> Findings:
    """Runs the checkpoint where the reference is a file of logits."""
    total = _nbytes(subject.checkpoint) * _passes(subject, source_dtype)
    with reporter.task("logits of the checkpoint", total) as task:
        candidate = Candidate(subject, prompts, source_dtype, task)
        for _ in range(len(subject.config.layers) + 1):
            candidate.step()
        return candidate.finish()


def original(directory: Path, prompts: Sequence[Array], memory: Memory, reporter: Reporter) -> Reference:
    """Runs the original in `directory` alone."""
    with reporter.task("logits of the original", _nbytes(open_reference(directory))) as task:
        return transformers_reference(directory, prompts, memory=memory, task=task)


def _passes(subject: Subject, source_dtype: str) -> int:
    return 2 if dither_of(subject.config, subject.checkpoint.tensors, source_dtype) else 1


def _nbytes(source: Source) -> int:
    return sum(info.nbytes for info in source.tensors.values())
