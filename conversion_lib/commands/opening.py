"""What a command is given to read: a directory, a Hub id that is downloaded first, or what is read where it lies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion_lib.cloud.place import SCHEME
from conversion_lib.commands.options import known_directory
from conversion_lib.errors import BadInput
from conversion_lib.parts import WHOLE, Part
from conversion_lib.progress import Reporter
from conversion_lib.sources.remote import Remote


@contextmanager
def opened(
    src: str,
    dst: str,
    part: Part | None,
    *,
    memory_budget: int,
    revision: str | None,
    stream: bool,
    reporter: Reporter,
) -> Iterator[tuple[Path, Remote | None]]:
    """The directory that has SRC's headers, and where its weights are when they are not there too.

    stream: a Hub id is not downloaded as a whole; dst and part say what for. Of a bucket nothing is. Raises BadInput
    where SRC is none of the three, and for options that do not go with what it is.
    """
    in_cloud = src.startswith(SCHEME)
    path = None if in_cloud else known_directory(src)
    if path is not None or in_cloud:
        for option, given in (("--stream-download", stream), (f"--revision {revision}", revision is not None)):
            if given:
                raise BadInput(f"{option}: the option is for a Hub id, and {src} is none")
    if path is not None:
        yield path, None
    elif in_cloud:
        from conversion_lib.sources.cloud import checkpoint_in_bucket

        with checkpoint_in_bucket(src, memory_budget) as found:
            yield found
    elif not stream:
        from conversion_lib import hub

        yield hub.cached_download(src, revision=revision or "main", reporter=reporter), None
    else:
        from conversion_lib.convert import maxtext_layout
        from conversion_lib.hub.streaming import shelf_directory, streamed

        name, output = f"shards-{(part or WHOLE).index}", None if dst.startswith(SCHEME) else Path(dst)
        shelf = (maxtext_layout(output).work if output else shelf_directory(dst)) / name
        with streamed(src, revision or "main", shelf, output=output, reporter=reporter) as remote:
            yield remote.headers, remote


@contextmanager
def headers(src: str, revision: str | None, reporter: Reporter) -> Iterator[Path]:
    """A directory to plan from: SRC itself, or a copy without the weights where it is a Hub id or in a bucket."""
    in_cloud = src.startswith(SCHEME)
    path = None if in_cloud else known_directory(src)
    if revision is not None and (in_cloud or path is not None):
        raise BadInput(f"--revision {revision}: the option is for a Hub id, and {src} is none")
    if in_cloud:
        from conversion_lib.sources.cloud import checkpoint_in_bucket

        with checkpoint_in_bucket(src, 0) as (directory, _):
            yield directory
    elif path is not None:
        yield path
    else:
        from conversion_lib.hub.headers import headers_of

        with headers_of(src, revision or "main", reporter=reporter) as directory:
            yield directory


@contextmanager
def opened_maxtext(ckpt: str) -> Iterator[Path]:
    """The directory of CKPT, or what stands for it where it is at gs://bucket/prefix."""
    if not ckpt.startswith(SCHEME):
        yield Path(ckpt)
        return
    from conversion_lib.cloud.mirror import mirrored

    with mirrored(ckpt) as mirror:
        yield mirror
