"""What a command is given to read: a directory, a Hub id that is downloaded first, or what is read where it lies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from conversion_lib.core.dtypes import itemsize
from conversion_lib.errors import BadInput
from conversion_lib.families import FAMILIES, family_of
from conversion_lib.mapping.stored_checkpoint import MaxTextInput
from conversion_lib.mapping.stored_leaves import MAXTEXTS, export_dims, scanned
from conversion_lib.models import catalog
from conversion_lib.models.hf_config import CONFIG_NAME, config_of
from conversion_lib.plan.parts import WHOLE, Part
from conversion_lib.progress import Reporter, format_bytes
from conversion_lib.record import HF_DIR_NAME, WORK_NAME, Origin
from conversion_lib.sources.files import Files, LocalFiles
from conversion_lib.sources.maxtext import MaxTextSource
from conversion_lib.sources.orbax import Where, checkpoint_at, is_orbax, record_of, root_of
from conversion_lib.storage.interface import Location
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
    """The checkpoint that SRC names: of MaxText's its location, of Hugging Face's its files.

    stream: a Hub id is not downloaded as a whole; dst and part say what for. Ignored for buckets. Raises BadInput
    where SRC is none of the three, and for options that do not go with what it is.
    """
    where = named(src)
    if where is not None:
        for option, given in (("--stream-download", stream), (f"--revision {revision}", revision is not None)):
            if given:
                raise BadInput(f"{option}: the option is for a Hub id, and {src} is none")
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
    """What to plan SRC from: as `opened`, but of a Hub id the headers alone."""
    where = named(src)
    if where is None:
        from conversion_lib.hub.headers import headers_of

        with headers_of(src, revision or "main", reporter=reporter) as files:
            yield files
        return
    if revision is not None:
        raise BadInput(f"--revision {revision}: the option is for a Hub id, and {src} is none")
    with files_at(where, 0) as found:
        yield found


@contextmanager
def files_at(where: Location, memory_budget: int) -> Iterator[Location | Files]:
    """The checkpoint of either kind at `where`: of MaxText's the location itself, of Hugging Face's the files.

    Raises BadInput where it is in a bucket and there is no checkpoint.
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
    """The location that SRC names, None where it is a Hub id. Raises BadInput where it is neither."""
    where = location(src)
    if where.local is None:
        return where
    path = where.local.expanduser()
    if path.is_dir():
        return location(path)
    if path.exists() or src.count("/") != 1 or src.startswith((".", "/", "~")):
        raise BadInput(f"{src} is no directory")
    return None


def known_directory(src: str) -> Path | None:
    """The directory of SRC, None where it is a Hub id. Raises BadInput where it is neither."""
    where = named(src)
    if where is not None and where.local is None:
        raise BadInput(f"{src} is in a bucket, and a directory or a Hub id is read here; `ferry convert` reads gs://")
    return None if where is None else where.local


def open_maxtext(
    checkpoint: Where, *, model: str | None, hf_config: Path | None, written_by: str | None, cache_bytes: int
) -> MaxTextInput:
    """Opens the checkpoint at DST, DST/0 or DST/0/items; what training needs besides the weights stays unread.

    hf_config: a directory with the model's config.json; None: `hf/` beside the checkpoint, which Ferry writes.
    model: a name of the catalogue, which then says the family. written_by: the release of MaxText that did, where the
    checkpoint does not tell.
    cache_bytes: what decoded chunks may take of the memory; two at least must fit, since a piece may need as many.
    Raises BadInput where it is no checkpoint, there is no config, or a chunk is too large.
    """
    if written_by is not None and written_by not in MAXTEXTS:
        raise BadInput(f"--written-by {written_by}: it is one of {', '.join(MAXTEXTS)}")
    record = record_of(checkpoint)
    source = MaxTextSource(checkpoint, cache_bytes=cache_bytes)
    _require_memory(source, cache_bytes)
    hf = location(hf_config) if hf_config else root_of(checkpoint) / HF_DIR_NAME
    if (content := (hf / CONFIG_NAME).read()) is None:
        raise BadInput(
            f"{hf} has no {CONFIG_NAME}: --hf-config names a directory with the model's config and tokenizer"
        )
    config = config_of(content, str(hf / CONFIG_NAME))
    named = catalog.model_named(model) if model else None
    known = named or record
    family = FAMILIES[known.family] if known else family_of(config)
    origin = record.origin if record else Origin(path=str(checkpoint_at(checkpoint)))
    name = named.name if named else record.model_name if record else _name(origin)
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
    )


def _name(origin: Origin) -> str:
    return catalog.published_name(origin.repo, Path(origin.path).name)


def _require_memory(source: MaxTextSource, cache_bytes: int) -> None:
    """Raises BadInput where a chunk, which is decoded as a whole, leaves no memory for another beside it."""
    for name, info in source.tensors.items():
        nbytes = math.prod(source.chunk_shape(name)) * itemsize(info.dtype)
        if 2 * nbytes > cache_bytes:
            raise BadInput(
                f"{info.file} is stored in chunks of {format_bytes(nbytes)}, and each is decoded as a whole: give "
                f"{2 * nbytes / cache_bytes:.1f} times the memory budget"
            )
