"""The stage `clean_up`: what a run leaves on the disk where it worked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from conversion_lib.errors import BadInput
from ferry_airflow.base import Manifest, StageOperator, handed_on, picked
from ferry_airflow.execution.base import Command, Result
from ferry_airflow.target import TARGET_FIELDS, target_of

POLICIES = {
    "keep": "keep: everything stays",
    "keep_on_failure": "keep_on_failure: of a run that did well only the download stays, for other targets",
    "remove": "remove: nothing stays, whether the run did well or not",
}
"""Values of `keep_files`, and what each means."""


class CleanUpOperator(StageOperator):
    """Removes a run's files by a policy. Files that another run works with stay.

    It is to be a teardown, so that it runs in the end whatever happened, and leaves the run's state alone.

    :param source: the manifest of `resolve`; None where that failed (templated)
    :param published: the manifest of `publish`; None where the run did not get there (templated)
    :param keep_files: `keep`, `keep_on_failure` (default: of a run that did well only the download stays, for other
        targets of the model; of one that failed everything stays, for a retry) or `remove` (templated)
    :param scan_layers: as in ConvertOperator (templated); default True
    :param save_dtype: as in ConvertOperator (templated); default `bfloat16`
    :param ocdbt: as in ConvertOperator (templated); default True
    :param zarr3: as in ConvertOperator (templated); default True
    :param maxtext: as in ConvertOperator (templated); default `0.2.5`
    :param place: as in StageOperator
    :param hf_conn_id: as in StageOperator
    :returns: manifest with `removed` (directories) and `bytes_freed`
    """

    stage: ClassVar[str] = "clean_up"
    template_fields: Sequence[str] = ("source", "published", "keep_files", *TARGET_FIELDS)

    def __init__(
        self,
        *,
        source: Mapping[str, Any] | None,
        published: Mapping[str, Any] | None,
        keep_files: str = "keep_on_failure",
        scan_layers: bool = True,
        save_dtype: str = "bfloat16",
        ocdbt: bool = True,
        zarr3: bool = True,
        maxtext: str = "0.2.5",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.published = published
        self.keep_files = keep_files
        self.scan_layers = scan_layers
        self.save_dtype = save_dtype
        self.ocdbt = ocdbt
        self.zarr3 = zarr3
        self.maxtext = maxtext

    def command(self) -> Command | Manifest:
        if self.keep_files not in POLICIES:
            raise BadInput(f"keep_files is {self.keep_files!r}: expected one of {', '.join(POLICIES)}")
        if self.source is None or self.source.get("published"):
            self.log.info("The run wrote nothing")
            return {"removed": [], "bytes_freed": 0}
        self.link_target = str(self.source["work_dir"])
        ended = "--succeeded" if self.published else "--failed"
        options = ["--run", self.run_id, "--target", target_of(vars(self)).slug, "--keep", self.keep_files, ended]
        return Command(("clean-up", self.link_target, *options), Command.STEPS)

    def manifest(self, result: Result) -> Manifest:
        return {**picked(result, "removed", "bytes_freed"), **handed_on(self.source or {})}
