"""Opens what a command reads: a directory, a Hub id (downloaded first), or a bucket (read in place)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion_lib.core.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.families import family_named, family_of
from conversion_lib.mapping.stored_checkpoint import MaxTextInput
from conversion_lib.mapping.stored_leaves import MAXTEXTS, export_dims, scanned
from conversion_lib.maxtext.names import size_notes
from conversion_lib.models import catalog
from conversion_lib.models.hf_config import CONFIG_NAME, config_of
from conversion_lib.plan.parts import WHOLE, Part
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.record import HF_DIR_NAME, RECORD_NAME, WORK_NAME, Origin
from conversion_lib.sources.files import Files, LocalFiles
from conversion_lib.sources.maxtext import MaxTextSource
from conversion_lib.sources.orbax import Where, checkpoint_at, is_orbax, record_of, root_of
from conversion_lib.storage.files import expanded
from conversion_lib.storage.interface import Location
from conversion_lib.storage.links import refuse_links_out
from conversion_lib.storage.locations import location


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
) -> Iterator[Location | Files]:
    """Opens the checkpoint that SRC names.

    Args:
        src: A directory, gs://bucket/prefix, or a Hub id.
        dst: The destination of the conversion, in which a streamed download keeps its shards.
        part: The part of the conversion that a streamed download serves. None: the whole.
        memory_budget: Bytes, of which reading a bucket takes a share.
        revision: Branch, tag or commit of a Hub id. None: main.
        stream: Downloads a Hub id shard by shard instead of completely.
        reporter: Shows progress and messages.

    Yields:
        The location of a MaxText checkpoint, or the files of a Hugging Face one.

    Raises:
        BadInput: SRC is none of the three, there is no checkpoint, or an option does not apply to it.
        OutsideFailure: The Hub or Cloud Storage failed.
    """
    where = named(src)
    if where is not None:
        for option, given in (("--stream-download", stream), (f"--revision {revision}", revision is not None)):
            if given:
                raise BadInput(f"{option}: the option is for a Hub id, and {src} is not one")
        with files_at(where, memory_budget) as found:
            yield found
    elif not stream:
        from conversion_lib import hub

        yield LocalFiles(hub.cached_download(src, revision=revision or "main", reporter=reporter))
    else:
        from conversion_lib.hub.streaming import cache_directory, streamed

        name, output = f"shards-{(part or WHOLE).index}", location(dst).local
        cache = (output.absolute() / WORK_NAME if output else cache_directory(dst)) / name
        with streamed(src, revision or "main", cache, output=output, reporter=reporter) as files:
            yield files


@contextmanager
def headers(src: str, revision: str | None, reporter: Reporter) -> Iterator[Location | Files]:
    """Opens SRC for planning: like `opened`, but fetches only the headers of a Hub id.

    Raises:
        BadInput: As for `opened`.
        OutsideFailure: As for `opened`.
    """
    where = named(src)
    if where is None:
        from conversion_lib.hub.headers import headers_of

        with headers_of(src, revision or "main", reporter=reporter) as files:
            yield files
        return
    if revision is not None:
        raise BadInput(f"--revision {revision}: the option is for a Hub id, and {src} is not one")
    with files_at(where, 0) as found:
        yield found


@contextmanager
def files_at(where: Location, memory_budget: int) -> Iterator[Location | Files]:
    """Opens a checkpoint of either kind.

    Args:
        where: A local directory or a location in a bucket.
        memory_budget: Bytes, of which reading a bucket takes a share. 0: for headers alone.

    Yields:
        `where` itself for a MaxText checkpoint, or the files of a Hugging Face one. A local directory is not checked.

    Raises:
        BadInput: `where` is in a bucket and there is no checkpoint.
        OutsideFailure: Cloud Storage failed.
    """
    if is_orbax(where):
        yield where
    elif where.local is not None:
        yield LocalFiles(where.local)
    else:
        from conversion_lib.sources.cloud import in_bucket

        with in_bucket(str(where), memory_budget) as files:
            yield files


def named(src: str) -> Location | None:
    """Returns the location that SRC names, or None for a Hub id.

    Raises:
        BadInput: SRC is neither. A path that does not exist counts as a Hub id if it looks like `org/name`.
    """
    where = location(src)
    if where.local is None:
        return where
    path = expanded(where.local)
    if path.is_dir():
        return location(path)
    if path.exists() or src.count("/") != 1 or src.startswith((".", "/", "~")):
        raise BadInput(f"{src} is not a directory")
    return None


def known_directory(src: str) -> Path | None:
    """Returns the directory that SRC names, or None for a Hub id.

    Raises:
        BadInput: SRC is neither.
    """
    where = named(src)
    if where is not None and where.local is None:
        raise BadInput(f"{src} is in a bucket: expected a directory or a Hub id; `ferry convert` reads gs://")
    return None if where is None else where.local


def open_maxtext(
    checkpoint: Where, *, model: str | None, hf_config: Path | None, written_by: str | None, cache_bytes: int
) -> MaxTextInput:
    """Opens a MaxText checkpoint. Only its weights are read, nothing else that training saved.

    Args:
        checkpoint: DST, DST/0 or DST/0/items.
        model: A name in the catalogue, which determines the family. None: the record or config.json determines it.
        hf_config: A directory with the model's config.json. None: `hf/` beside the checkpoint, which Ferry writes.
        written_by: The MaxText release that wrote the checkpoint. None: what the record or the checkpoint says.
        cache_bytes: Memory for decoded chunks. At least two must fit, since a piece may need that many.

    Raises:
        BadInput: There is no checkpoint or no config, or a chunk is too large for `cache_bytes`.
    """
    if written_by is not None and written_by not in MAXTEXTS:
        raise BadInput(f"--written-by {written_by}: expected one of {', '.join(MAXTEXTS)}")
    record = record_of(checkpoint)
    source = MaxTextSource(checkpoint, cache_bytes=cache_bytes)
    _require_memory(source, cache_bytes)
    root = root_of(checkpoint)
    hf = location(hf_config) if hf_config else root / HF_DIR_NAME
    if hf.local is not None:
        refuse_links_out(hf.local, within=None if hf_config else root.local, recursive=False)
    if (content := (hf / CONFIG_NAME).read()) is None:
        raise BadInput(
            f"{hf} has no {CONFIG_NAME}: give --hf-config, a directory with the model's config and tokenizer"
        )
    config = config_of(content, str(hf / CONFIG_NAME))
    named = catalog.model_named(model) if model else None
    known = named or record
    family = family_named(known.family, f"{root}/{RECORD_NAME}") if known else family_of(config)
    origin = record.origin if record else Origin(path=str(checkpoint_at(checkpoint)))
    name = record.model_name if record else _name(origin)
    return MaxTextInput(
        source=source,
        hf=hf,
        config=config,
        family=family,
        model_name=name,
        scan_layers=scanned(source.tensors, family, export_dims(family, config), source.stored.scan_layers),
        maxtext=written_by or (record.target.maxtext if record else source.maxtext),
        record=record,
        origin=origin,
        notes=size_notes(named, config),
    )


def _name(origin: Origin) -> str:
    return catalog.published_name(origin.repo, Path(origin.path).name)


def _require_memory(source: MaxTextSource, cache_bytes: int) -> None:
    """Raises BadInput if two decoded chunks do not fit into `cache_bytes`."""
    for name, info in source.tensors.items():
        nbytes = math.prod(source.chunk_shape(name)) * itemsize(info.dtype)
        if 2 * nbytes > cache_bytes:
            raise BadInput(
                f"{info.file} is stored in chunks of {format_bytes(nbytes)}, and each is decoded as a whole: give "
                f"{2 * nbytes / cache_bytes:.1f} times the memory budget"
            )
