"""Where each kind of conversion keeps its things at a destination."""

from __future__ import annotations

from pathlib import Path

from conversion_lib.progress import SILENT, Reporter
from conversion_lib.record import HF_DIR_NAME, HF_RECORD_NAME, RECORD_NAME, REPORT_DIR_NAME
from conversion_lib.runs.bucket_workspace import BucketLayout
from conversion_lib.runs.workspace import Layout
from conversion_lib.storage.gcs import SCHEME, BucketLocation


def layout_at(destination: Path | str, reporter: Reporter = SILENT) -> Layout | BucketLayout:
    """Of a MaxText checkpoint at `destination`, a directory or gs://bucket/prefix. reporter: hears of waits."""
    if isinstance(destination, str) and destination.startswith(SCHEME):
        return BucketLayout(BucketLocation.parse(destination), reporter=reporter)
    return maxtext_layout(Path(destination))


def unfinished_layouts(destination: str, reporter: Reporter = SILENT) -> list[Layout | BucketLayout]:
    """Of every kind of run that may have been left at `destination`."""
    layout = layout_at(destination, reporter)
    return [layout] if isinstance(layout, BucketLayout) else [layout, hf_layout(Path(destination))]


def maxtext_layout(destination: Path) -> Layout:
    """The paths of a MaxText checkpoint in the directory `destination`."""
    work = destination.absolute() / ".ferry"
    return Layout(
        final=destination.absolute() / "0",
        work=work,
        build=work / "0",
        record=destination.absolute() / RECORD_NAME,
        beside=(HF_DIR_NAME, RECORD_NAME),
        dropped=(REPORT_DIR_NAME,),
        alone=True,
    )


def hf_layout(destination: Path) -> Layout:
    """The paths of a Hugging Face checkpoint that is `destination` itself."""
    final = destination.absolute()
    work = final.with_name(f".{final.name}.ferry")
    return Layout(final=final, work=work, build=work / "build", record=final / HF_RECORD_NAME)
