"""Looks up, downloads and streams repositories of the Hugging Face Hub."""

from conversion_lib.hub.downloading import (
    WORK_NAME,
    DownloadResult,
    Provenance,
    cache_directory,
    cached_download,
    download,
    now,
    read_provenance,
    resolve,
    write_provenance,
)
from conversion_lib.hub.files import Resolved, hub_endpoint
from conversion_lib.hub.needed import needed_files, side_files

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
    "side_files",
    "write_provenance",
]
