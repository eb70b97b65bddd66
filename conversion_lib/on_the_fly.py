"""A checkpoint for a training run that has only a model's name: what is there and fits, or else a conversion.

The conversion is a subprocess on the processor alone. Of all processes that ask for the same directory, on one machine
or many, one converts and the others wait for the checkpoint's own commit.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from conversion_lib.claim import Note
from conversion_lib.conversion_child import Job
from conversion_lib.errors import BadInput, FerryError, OutsideFailure
from conversion_lib.maxtext_names import is_model_name, model_of
from conversion_lib.outputs import BucketOutput, DirectoryOutput, Foreign, RightToConvert, output_at
from conversion_lib.progress import Reporter
from conversion_lib.record import CheckpointRecord, Target

WAIT_SECONDS = 6 * 3600.0
POLL_SECONDS = 2.0
HUB_SECONDS = 30.0
LAST_LINES = 12
ENDING_SECONDS = 30.0
"""What a conversion gets to note what it has finished, before it is killed."""

DEFAULT_BUDGET = 2 << 30

OF_THE_PARENT = re.compile(
    r"(JAX|XLA|LIBTPU|TPU|CLOUD_TPU|PJRT|MEGASCALE|IFRT|CUDA|NVIDIA|NCCL|ROCR|HIP|ROCM|GPU|TF|M)_.*|.*PATHWAYS.*"
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
    target = _target(scan_layers, dtype, checkpoint_storage_use_ocdbt, checkpoint_storage_use_zarr3, maxtext)
    output = output_at(output_directory)
    wanted = _wanted(str(model), revision, target, token)
    job = Job(
        source=wanted.source,
        revision=revision,
        model=wanted.model,
        destination=output.destination,
        target=target,
        memory_budget=memory_budget,
        overwrite=reconvert,
    )
    return _Ensurance(wanted, output, job, reporter or Reporter()).run(may_convert, reconvert, wait_seconds)


def _target(scan_layers: bool, dtype: Any, ocdbt: bool, zarr3: bool, maxtext: str) -> Target:
    from conversion_lib.commands.options import build_target

    dtype = dtype.value if isinstance(dtype, Enum) else dtype
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    return build_target(scan_layers=scan_layers, save_dtype=name, ocdbt=ocdbt, zarr3=zarr3, maxtext=maxtext)


@dataclass(frozen=True)
class _Wanted:
    """What the checkpoint is to be made of. source: a repository, or the path of a directory."""

    source: str
    directory: Path | None
    model: str | None
    revision: str
    target: Target
    token: str | None

    @cached_property
    def commit(self) -> str | None:
        """The commit that `revision` names now; None where the Hub cannot tell."""
        if re.fullmatch(r"[0-9a-f]{40}", self.revision):
            return self.revision
        import huggingface_hub

        from conversion_lib.hub import hub_endpoint

        try:
            api = huggingface_hub.HfApi(hub_endpoint(), token=self.token)
            return api.model_info(self.source, revision=self.revision, timeout=HUB_SECONDS).sha
        except Exception:  # whatever the reason, what is there is not worse for it
            return None

    def differences(self, record: CheckpointRecord, *, at_commit: bool) -> list[str]:
        """How a checkpoint that Ferry wrote is not what is wanted; at_commit: whether the Hub may be asked."""
        there, here = record.target, self.target
        pairs: dict[str, tuple[object, object]] = {
            "scan_layers": (there.scan_layers, here.scan_layers),
            "dtype": (there.save_dtype, here.save_dtype),
            "checkpoint_storage_use_ocdbt": (there.ocdbt, here.ocdbt),
            "checkpoint_storage_use_zarr3": (there.zarr3, here.zarr3),
            "maxtext": (there.maxtext, here.maxtext),
        }
        if self.directory is None:
            pairs["source"] = (record.origin.repo or record.origin.path, self.source)
            asked = self.commit if at_commit else None
            if asked is not None and record.origin.repo == self.source:
                pairs["commit"] = (record.origin.commit, asked)
        elif (content := _content(self.directory)) is not None:
            same = record.identity.get("source") == content
            pairs["source"] = (self.source if same else f"other files, of {record.origin.path}", self.source)
        return _named(pairs)

    def differences_of_foreign(self, there: Foreign) -> list[str]:
        """The same of a checkpoint that MaxText wrote, as far as its metadata tell."""
        here = self.target
        pairs: dict[str, tuple[object, object]] = {
            "scan_layers": (there.scan_layers, here.scan_layers),
            "checkpoint_storage_use_ocdbt": (there.ocdbt, here.ocdbt),
            "checkpoint_storage_use_zarr3": (there.zarr3, here.zarr3),
        }
        if there.dtypes is not None and here.save_dtype not in there.dtypes:
            pairs["dtype"] = (" and ".join(sorted(there.dtypes)), here.save_dtype)
        return _named({name: pair for name, pair in pairs.items() if pair[0] is not None})


def _named(pairs: dict[str, tuple[object, object]]) -> list[str]:
    return [f"{name}: {there} there, {here} here" for name, (there, here) in pairs.items() if there != here]


def _wanted(model: str, revision: str, target: Target, token: str | None) -> _Wanted:
    """Raises BadInput where `model` is no model, repository or directory."""
    from conversion_lib.commands.options import known_directory

    if is_model_name(model):
        named = model_of(model)
        return _Wanted(named.repo, None, named.name, revision, target, token)
    if "/" not in model and not Path(model).expanduser().is_dir():
        model_of(model)  # raises, with the nearest names
    directory = known_directory(model)
    source = model if directory is None else str(directory.absolute())
    return _Wanted(source, directory and directory.absolute(), None, revision, target, token)


def _content(directory: Path) -> str | None:
    """What is known of a directory's weights without reading them, as a record keeps it; None where they are gone."""
    from conversion_lib.identity import source_content
    from conversion_lib.sources.safetensors import SafetensorsSource

    try:
        return json.dumps(source_content(SafetensorsSource(directory)))
    except BadInput:
        return None


class _Ensurance:
    """One call of ensure_checkpoint."""

    def __init__(self, wanted: _Wanted, output: DirectoryOutput | BucketOutput, job: Job, reporter: Reporter) -> None:
        self._wanted, self._output, self._job, self._reporter = wanted, output, job, reporter
        self._child: subprocess.Popen[str] | None = None
        self._claim: RightToConvert = output.claim(self._end_child)

    def run(self, may_convert: bool, reconvert: bool, wait_seconds: float) -> Path | str:
        deadline = time.monotonic() + wait_seconds
        before = self._claim.read()
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
            if may_convert and self._claim.take():
                return self._convert(at_commit=not waited)
            note = self._claim.read()
            self._refuse_failure(note, before, may_convert)
            if time.monotonic() >= deadline:
                raise OutsideFailure(self._nothing_came(note, wait_seconds))
            if not waited:
                self._reporter.say(f"waiting for {self._output.items}, which {note or 'another process'} is to write")
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
        """Converts, with the claim held, unless somebody has while it was free."""
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
            self._claim.release(failure=failure, final=final)

    def _run_child(self) -> None:
        """Raises BadInput or OutsideFailure, by the exit code, where the conversion fails."""
        lines: deque[str] = deque(maxlen=LAST_LINES)
        self._child = subprocess.Popen(
            [sys.executable, "-m", "conversion_lib.conversion_child", self._job.model_dump_json()],
            env=child_environment(os.environ, self._wanted.token),
            pass_fds=[self._claim.descriptor] if self._claim.descriptor >= 0 else [],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        try:
            assert self._child.stderr is not None
            for line in self._child.stderr:
                lines.append(line.rstrip())
                self._reporter.say(lines[-1])
            code = self._child.wait()
        finally:
            self._end_child()
        if code:
            raise _failure(self._job.source, code, list(lines))

    def _end_child(self) -> None:
        """Also called where this call is interrupted, or its claim was taken over."""
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.terminate()
        try:
            child.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()

    def _refuse_failure(self, note: Note | None, before: Note | None, may_convert: bool) -> None:
        """Raises what ended the conversion that this call waited for, where trying again is of no use here."""
        if note is None or note.failure is None or (before is not None and before.failure and before.id == note.id):
            return
        if note.failure_is_final:
            raise BadInput(f"{note} could not convert: {note.failure}")
        if not may_convert:
            raise OutsideFailure(f"{note} could not convert: {note.failure}")

    def _nothing_came(self, note: Note | None, wait_seconds: float) -> str:
        who = f"; {note} holds the claim" if note else ""
        return (
            f"{self._output.items} was not committed within {wait_seconds:.0f} s{who}. Is {self._output.destination} "
            "what all hosts share, and is one of them converting? Where that takes longer, give longer wait_seconds"
        )


def child_environment(environment: Mapping[str, str], token: str | None) -> dict[str, str]:
    """What the conversion sees of `environment`: nothing that says which accelerators the parent has."""
    kept = {name: value for name, value in environment.items() if not OF_THE_PARENT.fullmatch(name)}
    return {**kept, **CPU_ONLY, **({"HF_TOKEN": token} if token else {})}


def _failure(source: str, code: int, lines: list[str]) -> FerryError:
    """What to raise for a conversion that ended with `code`, negative for a signal."""
    ended = f"exit code {code}" if code > 0 else f"exit code {code}, {signal.Signals(-code).name}"
    shown = " | ".join(line for line in lines if line) or "none"
    text = f"the conversion of {source} ended with {ended}; its last lines: {shown}"
    if code == BadInput.exit_code:
        return BadInput(text)
    return OutsideFailure(f"{text}; the next start goes on from what it had finished")
