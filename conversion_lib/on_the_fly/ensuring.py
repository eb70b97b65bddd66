"""Provides a checkpoint for a training run that has only a model's name: an existing one that fits, or a new one.

The conversion is a subprocess that uses only the CPU. Of all processes that ask for the same directory, on one or more
machines, one converts and the others wait for the checkpoint's commit.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from conversion_lib.core.child import Child
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.on_the_fly.child import Job
from conversion_lib.on_the_fly.output import Foreign, Output
from conversion_lib.on_the_fly.wanted import Wanted, target_of, wanted
from conversion_lib.progress import Reporter
from conversion_lib.runs.options import DEFAULT_BUDGET
from conversion_lib.storage.lease import Note

WAIT_SECONDS = 6 * 3600.0
POLL_SECONDS = 2.0
LAST_LINES = 12
ENDING_SECONDS = 30.0
"""Time for a conversion to journal its finished work, before it is killed."""

OF_THE_PARENT = re.compile(
    r"(JAX|XLA|TPU|CLOUD_TPU|PJRT|IFRT|CUDA|NVIDIA|NCCL|ROCR|HIP|HSA|ROCM|GPU|TF|M)_.*|.*(PATHWAYS|LIBTPU|MEGASCALE).*"
)
"""Variables for accelerators and for reaching other hosts. `M_` is the prefix of MaxText's overrides."""

CPU_ONLY = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}


def ensure_checkpoint(
    model: str | Path,
    output_directory: str | Path,
    *,
    scan_layers: bool = True,
    param_scan_axis: int = 1,
    dtype: Any = "bfloat16",
    checkpoint_storage_use_ocdbt: bool = True,
    checkpoint_storage_use_zarr3: bool = True,
    maxtext: str = "0.2.5",
    revision: str = "main",
    token: str | None = None,
    may_convert: bool = True,
    reconvert: bool = False,
    wait_seconds: float = WAIT_SECONDS,
    memory_budget: int = DEFAULT_BUDGET,
    reporter: Reporter | None = None,
) -> Path | str:
    """Returns the path for MaxText's `load_parameters_path`, `output_directory`/0/items, and converts first if needed.

    Args:
        model: A name from `ferry models` or one of MaxText's, a Hub repository, or a directory with safetensors.
        output_directory: MaxText's `base_output_directory`: a directory that all hosts of the run share, or
            gs://bucket/prefix.
        scan_layers: The run's own setting.
        param_scan_axis: The run's own setting. Only 1 is supported.
        dtype: Dtype of the arrays, bfloat16 or float32: a name, or numpy's, jax's or MaxText's object.
        checkpoint_storage_use_ocdbt: The run's own setting. Pathways reads neither OCDBT nor zarr3.
        checkpoint_storage_use_zarr3: The run's own setting.
        maxtext: The release that will load the checkpoint, 0.2.5 or main.
        revision: Branch, tag or commit of the repository.
        token: The Hub's token, passed to the subprocess in its environment. None: HF_TOKEN, or the Hub client's file.
        may_convert: False only waits. For all hosts but one, such as `jax.process_index() == 0`.
        reconvert: Replaces a checkpoint that does not fit, instead of raising BadInput.
        wait_seconds: How long to wait for another process's conversion.
        memory_budget: Bytes, for the conversion.
        reporter: Gets the conversion's messages. None: standard error.

    Returns:
        A path for a directory, text for gs://bucket/prefix.

    Raises:
        BadInput: The source or a setting is wrong, or the directory holds another checkpoint. The message names what
            differs.
        OutsideFailure: The conversion failed, with its exit code and last lines: the next call resumes it. Or nothing
            was committed within `wait_seconds`.
    """
    if param_scan_axis != 1:
        raise BadInput(f"param_scan_axis={param_scan_axis}: ferry stacks layers on axis 1, MaxText's default")
    target = target_of(
        dtype,
        scan_layers=scan_layers,
        ocdbt=checkpoint_storage_use_ocdbt,
        zarr3=checkpoint_storage_use_zarr3,
        maxtext=maxtext,
    )
    output = Output(output_directory)
    asked = wanted(str(model), revision, target, token)
    job = Job(
        source=asked.source,
        revision=revision,
        model=asked.model,
        destination=output.destination,
        target=target,
        memory_budget=memory_budget,
        overwrite=reconvert,
    )
    return _Ensurance(asked, output, job, reporter or Reporter()).run(may_convert, reconvert, wait_seconds)


class _Ensurance:
    """One call of ensure_checkpoint."""

    def __init__(self, asked: Wanted, output: Output, job: Job, reporter: Reporter) -> None:
        self._wanted, self._output, self._job, self._reporter = asked, output, job, reporter
        self._child: Child | None = None
        self._lease = output.lease(self._end_child)

    def run(self, may_convert: bool, reconvert: bool, wait_seconds: float) -> Path | str:
        deadline = time.monotonic() + wait_seconds
        before = self._lease.read()
        waited = False
        while True:
            found = self._look(at_commit=not waited)
            if found == []:
                return self._output.items
            if found and not reconvert:
                raise BadInput(
                    f"{self._output.destination} holds another checkpoint; it differs in {'; '.join(found)}. Give "
                    "another directory, the settings of that checkpoint, or reconvert=True"
                )
            if may_convert and self._lease.acquire():
                return self._convert(at_commit=not waited)
            note = self._lease.read()
            self._refuse_failure(note, before, may_convert)
            if time.monotonic() >= deadline:
                raise OutsideFailure(self._nothing_came(note, wait_seconds))
            if not waited:
                self._reporter.say(f"waiting for {self._output.items}{_whose(note)}")
                waited = True
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))

    def _look(self, *, at_commit: bool) -> list[str] | None:
        """Returns how the existing checkpoint differs from what is wanted, or None if there is none."""
        there = self._output.found()
        if there is None:
            return None
        if isinstance(there, Foreign):
            self._reporter.say(f"{self._output.items} was not written by ferry: its weights cannot be identified")
            return self._wanted.differences_of_foreign(there)
        found = self._wanted.differences(there, at_commit=at_commit)
        if not found and at_commit and self._wanted.directory is None and self._wanted.commit is None:
            self._reporter.say(
                f"the Hub does not say which commit {self._wanted.revision} of {self._wanted.source} is now: "
                f"using the existing checkpoint of {there.origin.commit}"
            )
        return found

    def _convert(self, *, at_commit: bool) -> Path | str:
        """Converts while the lease is held, unless another process did before this one got it."""
        failure, final = None, False
        try:
            if self._look(at_commit=at_commit) != []:
                self._run_child()
            if self._look(at_commit=False) != []:
                raise OutsideFailure(
                    f"the conversion succeeded, but {self._output.items} is not there: was it removed?"
                )
            return self._output.items
        except FerryError as error:
            failure, final = str(error), isinstance(error, BadInput)
            raise
        finally:
            self._lease.release(failure=failure, final=final)

    def _run_child(self) -> None:
        """Runs the conversion. If it fails, raises BadInput or OutsideFailure, by its exit code."""
        lines: deque[str] = deque(maxlen=LAST_LINES)
        with Child(
            [sys.executable, "-m", "conversion_lib.on_the_fly", self._job.model_dump_json()],
            grace_seconds=ENDING_SECONDS,
            env=child_environment(os.environ, self._wanted.token),
            pass_fds=[self._lease.descriptor] if self._lease.descriptor >= 0 else [],
            stdin=subprocess.PIPE,
        ) as self._child:
            for line in self._child.lines():
                lines.append(line)
                self._reporter.say(line)
            code = self._child.wait()
        if code:
            raise _failure(self._job.source, code, list(lines))

    def _end_child(self) -> None:
        """Called if the lease is taken over."""
        if self._child is not None:
            self._child.end()

    def _refuse_failure(self, note: Note | None, before: Note | None, may_convert: bool) -> None:
        """Raises the error of the conversion that this call waited for, if this process cannot retry it."""
        if note is None or note.failure is None or (before is not None and before.failure and before.id == note.id):
            return
        if note.failure_is_final:
            raise BadInput(f"{note} could not convert: {note.failure}")
        if not may_convert:
            raise OutsideFailure(f"{note} could not convert: {note.failure}")

    def _nothing_came(self, note: Note | None, wait_seconds: float) -> str:
        return (
            f"{self._output.items} was not committed within {wait_seconds:.0f} s{_whose(note)}. Check that all hosts "
            f"share {self._output.destination} and that one of them converts. If it takes longer, raise wait_seconds"
        )


def _whose(note: Note | None) -> str:
    """Returns text that names the lease's holder, or the last holder and its failure."""
    if note is None:
        return ""
    return f"; {note} failed: {note.failure}" if note.failure else f"; {note} holds the lease"


def child_environment(environment: Mapping[str, str], token: str | None) -> dict[str, str]:
    """Returns the conversion's environment: `environment` without the variables for the parent's accelerators.

    Args:
        environment: The parent's.
        token: The Hub's token. None: HF_TOKEN of `environment`, if it is set.
    """
    kept = {name: value for name, value in environment.items() if not OF_THE_PARENT.fullmatch(name)}
    return {**kept, **CPU_ONLY, **({"HF_TOKEN": token} if token else {})}


def _failure(source: str, code: int, lines: list[str]) -> FerryError:
    """Returns the error for a conversion that ended with exit code `code`, negative for a signal."""
    ended = f"exit code {code}" if code > 0 else f"exit code {code}, {signal.Signals(-code).name}"
    shown = " | ".join(lines) or "none"
    text = f"the conversion of {source} ended with {ended}; its last lines: {shown}"
    if code == BadInput.exit_code:
        return BadInput(f"{text}; instead of --overwrite, give reconvert=True" if "--overwrite" in shown else text)
    return OutsideFailure(f"{text}; the next start resumes it")
