"""Options and arguments that several commands share, and what they stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import TypeAdapter

from conversion_lib.cli.command import Group, parse_size
from conversion_lib.errors import BadInput
from conversion_lib.record import Target
from conversion_lib.runs.options import Options

Src = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A directory or gs:// with safetensors, a Hub id such as Qwen/Qwen3-0.6B, or a CKPT.",
    ),
]
Dst = Annotated[str, typer.Argument(metavar="DST", help="The directory to write.")]
DstUrl = Annotated[str, typer.Argument(metavar="DST", help="The directory to write, or gs://bucket/prefix.")]
Ckpt = Annotated[
    str, typer.Argument(metavar="CKPT", help="A MaxText checkpoint: DST, DST/0 or DST/0/items; also gs://.")
]
Model = Annotated[
    str | None, typer.Option("--model", help="A name of `ferry models`; default: config.json tells the family.")
]
Scan = Annotated[
    bool, typer.Option("--scan-layers/--no-scan-layers", help="Layers stacked for jax.lax.scan, or each by itself.")
]
SaveDtype = Annotated[str, typer.Option("--save-dtype", metavar="bfloat16|float32", help="The dtype of the arrays.")]
Ocdbt = Annotated[bool, typer.Option("--ocdbt/--no-ocdbt", help="MaxText's checkpoint_storage_use_ocdbt.")]
Zarr3 = Annotated[bool, typer.Option("--zarr3/--no-zarr3", help="MaxText's checkpoint_storage_use_zarr3.")]
Pathways = Annotated[bool, typer.Option("--pathways", help="What Pathways reads: neither OCDBT nor zarr3.")]
MaxText = Annotated[str, typer.Option("--maxtext", metavar="0.2.5|main", help="The MaxText that will load it.")]
Compression = Annotated[str, typer.Option("--compression", metavar="zstd|none", help="The codec of the chunks.")]
ChunkBytes = Annotated[str, typer.Option("--chunk-bytes", help="The most bytes of a chunk, such as 64MiB.")]
HfConfig = Annotated[
    Path | None,
    typer.Option("--hf-config", help="A directory with config.json and tokenizer; default: hf/ beside the checkpoint."),
]
WrittenBy = Annotated[
    str | None,
    typer.Option("--written-by", metavar="0.2.5|main", help="The MaxText that wrote it, where that cannot be seen."),
]
Loader = Annotated[
    str,
    typer.Option("--loader", metavar="safetensors|transformers", help="transformers holds the whole model in memory."),
]
Budget = Annotated[str, typer.Option("--memory-budget", help="The most memory to use, such as 2GiB.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Worker threads; default: one a core, up to 16.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at the destination.")]
Revision = Annotated[
    str | None, typer.Option("--revision", help="Of a Hub id: a branch, a tag or a commit; default: main.")
]
SkipDisk = Annotated[bool, typer.Option("--skip-disk-check", help="Begin even where the disk looks too small.")]


def build_target(
    scan_layers: Scan = True,
    save_dtype: SaveDtype = "bfloat16",
    ocdbt: Ocdbt = True,
    zarr3: Zarr3 = True,
    pathways: Pathways = False,
    maxtext: MaxText = "0.2.5",
    compression: Compression = "zstd",
    chunk_bytes: ChunkBytes = "64MiB",
) -> Target:
    """The Target of the options. Raises BadInput for a value that none has, by name."""
    values = {
        "scan_layers": scan_layers,
        "save_dtype": save_dtype,
        "ocdbt": ocdbt and not pathways,
        "zarr3": zarr3 and not pathways,
        "maxtext": maxtext,
        "compression": compression,
        "chunk_bytes": parse_size(chunk_bytes, "--chunk-bytes"),
    }
    return Target.parse(values, lambda field: f"--{field.replace('_', '-')} ")


def build_options(
    memory_budget: Budget = "2GiB",
    threads: Threads = None,
    overwrite: Overwrite = False,
    skip_disk_check: SkipDisk = False,
) -> Options:
    """How to run what writes a checkpoint."""
    return Options(parse_size(memory_budget, "--memory-budget"), threads, overwrite, skip_disk_check)


TARGET = Group("target", build_target)
OPTIONS = Group("options", build_options)


def local_destination(dst: str) -> Path:
    """The directory of DST. Raises BadInput for what only `ferry convert` and `ferry publish` write to."""
    if "://" in dst:
        raise BadInput(f"{dst}: expected a directory; `ferry convert` and `ferry publish` are what writes to gs://")
    return Path(dst)


def plain(result: Any) -> dict[str, Any]:
    data = TypeAdapter(type(result)).dump_python(result, mode="json")
    return {str(key): value for key, value in data.items()}
