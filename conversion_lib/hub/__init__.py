"""Looks up, downloads and streams repositories of the Hugging Face Hub."""

from conversion_lib.hub.downloading import (
    WORK_NAME,
    DownloadResult,
    Provenance,
    Resolved,
    cache_directory,
    cached_download,
    download,
    hub_endpoint,
    needed_files,
    now,
    read_provenance,
    resolve,
    write_provenance,
)

__all__ = [
    "WORK_NAME",
    "DownloadResult",
    "Provenance",
    "Resolved",
    "cache_directory",
    "cached_download",
    "download",
    "hub_endpoint",
    "needed_files",
    "now",
    "read_provenance",
    "resolve",
    "write_provenance",
]
