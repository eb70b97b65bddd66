"""A checkpoint for a training run that has only a model's name: what is there and fits, or else a conversion.

The conversion is a subprocess on the processor alone. Of all processes that ask for the same directory, on one machine
or many, one converts and the others wait for the checkpoint's own commit.
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
"""What a conversion gets to note what it has finished, before it is killed."""

OF_THE_PARENT = re.compile(
    r"(JAX|XLA|TPU|CLOUD_TPU|PJRT|IFRT|CUDA|NVIDIA|NCCL|ROCR|HIP|HSA|ROCM|GPU|TF|M)_.*|.*(PATHWAYS|LIBTPU|MEGASCALE).*"
)
"""Variables that say which accelerators a process has and how it reaches others; `M_` begins MaxText's overrides."""

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
    """`output_directory`/0/items, MaxText's `load_parameters_path`, converted first if it is not there.

    model: a name of `ferry models` or of MaxText's, a repository on the Hub, or a directory with safetensors.
    output_directory: MaxText's `base_output_directory`: a directory that all hosts of the run share, or
        gs://bucket/prefix, for which text is returned and not a path.
    scan_layers, param_scan_axis, checkpoint_storage_use_ocdbt, checkpoint_storage_use_zarr3: the run's own settings;
        Pathways reads neither OCDBT nor zarr3. dtype: of the arrays, bfloat16 or float32, by name or as numpy, jax and
        MaxText have it. maxtext: the version that will load the checkpoint, 0.2.5 or main.
    revision: a branch, a tag or a commit of the repository. token: the Hub's, else HF_TOKEN or the client's own file;
        it reaches the subprocess in its environment.
    may_convert: False only waits: for hosts that are to leave it to one, as `jax.process_index() == 0` tells.
    reconvert: replaces a checkpoint that does not fit instead of refusing it.
    wait_seconds: how long to wait for another process's conversion. memory_budget: bytes, of the conversion.
    reporter: where the conversion's messages go; None: standard error.

    Raises BadInput where the source, the settings or what is at the directory are not as they must be, naming what
    differs; OutsideFailure where the conversion died, with its exit code and last lines (the next call goes on from
    what it had finished), and where nothing was committed within `wait_seconds`.
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
                    "another directory, the settings that it has, or reconvert=True"
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
        """How the checkpoint that is there differs from what is wanted; None where there is none."""
        there = self._output.found()
        if there is None:
            return None
        if isinstance(there, Foreign):
            self._reporter.say(f"{self._output.items} was not written by ferry: which weights it holds cannot be told")
            return self._wanted.differences_of_foreign(there)
        found = self._wanted.differences(there, at_commit=at_commit)
        if not found and at_commit and self._wanted.directory is None and self._wanted.commit is None:
            self._reporter.say(
                f"the Hub does not tell which commit {self._wanted.revision} of {self._wanted.source} is now: "
                f"taking {there.origin.commit}, which is there"
            )
        return found

    def _convert(self, *, at_commit: bool) -> Path | str:
        """Converts, with the lease held, unless somebody has while it was free."""
        failure, final = None, False
        try:
            if self._look(at_commit=at_commit) != []:
                self._run_child()
            if self._look(at_commit=False) != []:
                raise OutsideFailure(
                    f"the conversion ended well, but {self._output.items} is not there: was it removed?"
                )
            return self._output.items
        except FerryError as error:
            failure, final = str(error), isinstance(error, BadInput)
            raise
        finally:
            self._lease.release(failure=failure, final=final)

    def _run_child(self) -> None:
        """Raises BadInput or OutsideFailure, by the exit code, where the conversion fails."""
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
        """Called where the lease was taken over."""
        if self._child is not None:
            self._child.end()

    def _refuse_failure(self, note: Note | None, before: Note | None, may_convert: bool) -> None:
        """Raises what ended the conversion that this call waited for, where trying again is of no use here."""
        if note is None or note.failure is None or (before is not None and before.failure and before.id == note.id):
            return
        if note.failure_is_final:
            raise BadInput(f"{note} could not convert: {note.failure}")
        if not may_convert:
            raise OutsideFailure(f"{note} could not convert: {note.failure}")

    def _nothing_came(self, note: Note | None, wait_seconds: float) -> str:
        return (
            f"{self._output.items} was not committed within {wait_seconds:.0f} s{_whose(note)}. Is "
            f"{self._output.destination} what all hosts share, and is one of them converting? Where that takes longer, "
            "give longer wait_seconds"
        )


def _whose(note: Note | None) -> str:
    """Who is at work by a lease's note, or who was and failed."""
    if note is None:
        return ""
    return f"; {note} failed: {note.failure}" if note.failure else f"; {note} holds the lease"


def child_environment(environment: Mapping[str, str], token: str | None) -> dict[str, str]:
    """What the conversion sees of `environment`: nothing that says which accelerators the parent has."""
    kept = {name: value for name, value in environment.items() if not OF_THE_PARENT.fullmatch(name)}
    return {**kept, **CPU_ONLY, **({"HF_TOKEN": token} if token else {})}


def _failure(source: str, code: int, lines: list[str]) -> FerryError:
    """What to raise for a conversion that ended with `code`, negative for a signal."""
    ended = f"exit code {code}" if code > 0 else f"exit code {code}, {signal.Signals(-code).name}"
    shown = " | ".join(lines) or "none"
    text = f"the conversion of {source} ended with {ended}; its last lines: {shown}"
    if code == BadInput.exit_code:
        return BadInput(f"{text}; --overwrite is reconvert=True here" if "--overwrite" in shown else text)
    return OutsideFailure(f"{text}; the next start goes on from what it had finished")
