"""The runs of a check: checkpoint and reference in step, layer by layer, or one of them alone."""

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
    """The checkpoint that is checked, and how it is read. `bias_order` is as in `Weights`."""

    checkpoint: Checkpoint
    config: ForwardConfig
    bias_order: BiasOrder | None
    memory: Memory


@dataclass
class Findings:
    """What a run found.

    Attributes:
        logits: The checkpoint's logits, float32 (tokens, vocabulary) for each prompt.
        layers: Differences layer by layer; empty if only one side's layers were seen.
        output: Difference of the final norm and the output projection; None if `layers` is empty.
        lost: The first block of the checkpoint with a NaN or an infinity.
        source_lost: The first block of the original with a NaN or an infinity.
        idle_experts: (layer, expert) pairs that received no token.
        allowed: The largest KL of a token that rounding or float32 explains, in nats.
        allowed_mean: The same for the mean KL. None: the mean is not limited.
        dither: How this was measured. None: it was not.
    """

    logits: list[Array] = field(default_factory=list)
    layers: list[LayerDifference] = field(default_factory=list)
    output: BlockDifference | None = None
    lost: Spot | None = None
    source_lost: Spot | None = None
    idle_experts: int = 0
    allowed: float = EXACT_KL
    allowed_mean: float | None = None
    dither: Dither | None = None


class Candidate:
    """The checkpoint's forward pass, one layer at a time: `step` for the embedding and each layer, then `finish`.

    Where the threshold has to be measured, a dithered pass runs next to it.

    Args:
        subject: The checkpoint.
        prompts: Token ids, int (tokens,) each.
        source_dtype: Dtype of the original's weights; empty if unknown.
        task: Advanced by the bytes read.

    Raises:
        BadInput: The checkpoint does not match config.json.
    """

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

    def step(self, expected: blocks.States | None = None) -> None:
        """Runs the next layer and compares it with the outputs of the original's blocks, if they are given."""
        for one in self._runs:
            one.original = expected
        number, found = next(self._steps)
        dithered = next(self._dithered_steps)[1] if self._dithered_steps else None
        if self.findings.lost is None:
            self.findings.lost = not_finite(number, found)
        if self.findings.source_lost is None and expected is not None:
            self.findings.source_lost = not_finite(number, expected)
        if expected is not None:
            self.findings.layers.append(self._compared(number, expected, found, dithered))
            self._before = expected[blocks.STREAM if blocks.STREAM in expected else blocks.EMBEDDING]

    def _compared(
        self, number: int, expected: blocks.States, found: blocks.States, dithered: blocks.States | None
    ) -> LayerDifference:
        """Compares a layer with the original's.

        Where a block departs, the layer runs once more on the original's stream, so that the errors and the rounding of
        earlier layers do not count.
        """
        if self._before is None:
            return compare_layer(number, expected, found, self._allowance.of_blocks(found, dithered))
        compared = compare_layer(number, expected, found, self._allowance.of_blocks(found, None))
        if compared.departs or self._pass.is_taken_from(number):
            again, *moved = [one.again(number, self._before, expected) for one in self._runs]
            allowed = self._allowance.of_blocks(again, moved[0] if moved else None)
            return compared.model_copy(update={"blocks": compare_blocks(expected, again, allowed)})
        return compared

    def finish(self, expected: Sequence[Array] | None = None) -> Findings:
        """Computes the logits and returns what was found.

        Args:
            expected: The original's logits, float32 (tokens, vocabulary) for each prompt. None: its layers were not
                seen.
        """
        self.findings.logits, self.findings.idle_experts = self._pass.logits(), self._pass.idle_experts
        if self._dithered is not None:
            self._allowance.of_logits(self.findings.logits, self._dithered.logits())
        self.findings.allowed, self.findings.allowed_mean = self._allowance.max_kl, self._allowance.mean_kl
        if expected is not None:
            self.findings.output = self._output([logits[:, : self._tokens] for logits in expected])
        return self.findings

    def _output(self, expected: Sequence[Array]) -> BlockDifference:
        """Compares the logits; where they depart, those that the checkpoint makes of the original's stream."""
        off = relative_difference(*zip(expected, self.findings.logits, strict=True))
        compared = BlockDifference(relative=off, allowed=self._allowance.of_block(None))
        if not compared.departs:
            return compared
        again, *moved = [one.logits(self._before) for one in self._runs]
        by_rounding = relative_difference(*zip(again, moved[0], strict=True)) if moved else None
        off = relative_difference(*zip(expected, again, strict=True))
        return BlockDifference(relative=off, allowed=self._allowance.of_block(by_rounding))


def in_step(
    subject: Subject, directory: Path, prompts: Sequence[Array], reporter: Reporter
) -> tuple[Reference, Findings]:
    """Runs original and checkpoint in step, so that only the states of one layer are held.

    Args:
        subject: The checkpoint.
        directory: The original, a Hugging Face directory.
        prompts: Token ids, int32 (tokens,) each.
        reporter: Shows progress.

    Raises:
        BadInput: One of them does not match its config.json, or torch or transformers is missing.
    """
    source = open_reference(directory)
    dtype = dtype_of(source)
    total = _nbytes(source) + _nbytes(subject.checkpoint) * _passes(subject, dtype)
    with reporter.task("comparing layer by layer", total) as task:
        candidate = Candidate(subject, prompts, dtype, task)

        def observe(_: int, expected: blocks.States) -> None:
            candidate.step(expected)

        reference = transformers_reference(directory, prompts, memory=subject.memory, observe=observe, task=task)
        return reference, candidate.finish(reference.logits)


def alone(subject: Subject, prompts: Sequence[Array], source_dtype: str, reporter: Reporter) -> Findings:
    """Runs the checkpoint alone, for a reference that is a golden file.

    Args:
        subject: The checkpoint.
        prompts: Token ids, int32 (tokens,) each.
        source_dtype: Dtype of the original's weights; empty if unknown.
        reporter: Shows progress.

    Raises:
        BadInput: The checkpoint does not match config.json.
    """
    total = _nbytes(subject.checkpoint) * _passes(subject, source_dtype)
    with reporter.task("logits of the checkpoint", total) as task:
        candidate = Candidate(subject, prompts, source_dtype, task)
        for _ in range(len(subject.config.layers) + 1):
            candidate.step()
        return candidate.finish()


def original(directory: Path, prompts: Sequence[Array], memory: Memory, reporter: Reporter) -> Reference:
    """Runs the original in the Hugging Face directory `directory` alone.

    Raises:
        BadInput: It does not match its config.json, or torch or transformers is missing.
    """
    with reporter.task("logits of the original", _nbytes(open_reference(directory))) as task:
        return transformers_reference(directory, prompts, memory=memory, task=task)


def _passes(subject: Subject, source_dtype: str) -> int:
    return 2 if dither_of(subject.config, subject.checkpoint.tensors, source_dtype) else 1


def _nbytes(source: Source) -> int:
    return sum(info.nbytes for info in source.tensors.values())
